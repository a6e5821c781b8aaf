"""Every file of `cluster/` is tested; the image and the page about it hold together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cluster.files import CLUSTER, LAUNCHER, PROVIDERS, ROOT, RUNS, UNIT, documents

README = (CLUSTER / "README.md").read_text()
DOCKERFILE = CLUSTER / "Dockerfile"
TESTED = {
    *(CLUSTER / "kuberay" / name for name in (*RUNS, *PROVIDERS)),  # test_kuberay.py
    *(CLUSTER / "vm" / name for name in (*LAUNCHER, UNIT.name, "logind.conf")),  # test_vm.py
    CLUSTER / "submit.sh",  # test_submit.py
    CLUSTER / "grafana.json",  # test_grafana.py
    DOCKERFILE,
    CLUSTER / "README.md",
}


def test_every_file_has_a_test() -> None:
    assert {path for path in CLUSTER.rglob("*") if path.is_file()} == TESTED


def instructions() -> list[tuple[str, str]]:
    lines = re.sub(r"\\\n", " ", DOCKERFILE.read_text()).splitlines()
    return [
        (line.split(maxsplit=1)[0], line.split(maxsplit=1)[1])
        for line in lines
        if line.strip() and not line.startswith("#")
    ]


def pinned(package: str) -> str:
    (version,) = re.findall(
        rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
    return version


def test_the_image_is_of_the_tested_ray_and_not_of_root() -> None:
    found = instructions()
    names = [name for name, _ in found]
    assert names[:2] == ["ARG", "FROM"]
    assert set(names) <= {"ARG", "FROM", "USER", "WORKDIR", "COPY", "RUN"}
    assert found[0][1] == f"BASE=rayproject/ray:{pinned('ray')}-py311-cpu"
    # By number: Kubernetes cannot prove of a name that it is not root's.
    assert [value for name, value in found if name == "USER"] == ["1000:100"]
    for name in RUNS:
        spec = documents(name)[0]["spec"]
        assert spec.get("rayClusterSpec", spec)["rayVersion"] == pinned("ray")


def test_the_image_copies_files_that_exist_to_where_the_job_looks_for_them() -> None:
    found = instructions()
    assert ("WORKDIR", "/home/ray/app") in found
    copied = set()
    for name, value in found:
        if name == "COPY":
            owner, *sources, target = value.split()
            assert owner == "--chown=1000:100"
            for source in sources:
                assert (ROOT / source).exists()
                if target != "./":
                    assert target == f"./{source}", "a directory's contents go into the target"
            copied |= set(sources)
    assert {"pyproject.toml", "README.md", "LICENSE", "ray_accel_ckpt", "examples"} <= copied


def test_the_links_of_the_page_lead_to_files_that_exist() -> None:
    """Its commands: tests/pure/test_pages.py."""
    links = re.findall(r"\]\(((?!https?:|#)[^)]+)\)", README)
    assert links
    for link in links:
        assert (CLUSTER / link.split("#")[0]).exists(), link


@pytest.mark.parametrize("path", sorted(TESTED), ids=lambda path: path.name)
def test_the_page_tells_of_every_file(path: Path) -> None:
    if path.name != "README.md":
        assert str(path.relative_to(CLUSTER)) in README
