"""`ls`: which checkpoints there are, and which of them are good."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ray_accel_ckpt import Checkpointer, ProjectConfiguration
from ray_accel_ckpt.cli import output
from ray_accel_ckpt.runtime.record import SNAPSHOT
from ray_accel_ckpt.storage.reference import REFERENCE, encode
from tests.cli import runs
from tests.cli.commands import document, refused, told
from tests.helpers_image import edited

MANIFEST = "manifest-00001-of-00002.json"
SHARD = "shard-00000-of-00002.safetensors"
NAMES = [
    "checkpoint_00000060_5d8e3f",
    "checkpoint_00000040_5d8e3f",
    "checkpoint_00000030_0c1d2e",
    "checkpoint_00000020_5d8e3f",
]


def _by_name(listing: Any) -> dict[str, Any]:
    return {each["name"]: each for each in listing["checkpoints"]}


def test_the_newest_comes_first_with_what_ray_knows(digits: Path) -> None:
    listing = document("ls", digits)
    assert (listing["run"], listing["record"]) == (str(digits), "good")
    assert [each["name"] for each in listing["checkpoints"]] == NAMES
    found = _by_name(listing)
    assert [found[n]["condition"] for n in NAMES] == ["not whole", "good", "good", "good"]
    assert [found[n]["registered"] for n in NAMES] == [False, True, False, True]
    assert [n for n in NAMES if found[n]["latest"]] == [NAMES[1]]
    latest = found[NAMES[1]]
    files = [path.stat().st_size for path in (digits / NAMES[1]).iterdir()]
    assert latest == {
        "name": NAMES[1],
        "path": str(digits / NAMES[1]),
        "step": 40,
        "epoch": 1,
        "saved_at": runs.SAVED_AT + 40,
        "nbytes": sum(files),
        "world_size": 2,
        "condition": "good",
        "why": "",
        "stands_for": None,
        "registered": True,
        "latest": True,
    }


def test_the_table_says_it_line_by_line(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "now", lambda: runs.SAVED_AT + 40 + 7200)
    lines = told("ls", digits).splitlines()
    assert lines[0] == f"{digits}: 4 checkpoints"
    assert [line.split()[0] for line in lines[3:7]] == NAMES
    size = output.size(sum(path.stat().st_size for path in (digits / NAMES[1]).iterdir()))
    cells = [NAMES[1], "40", "1", "2", "h", *size.split(), "2", "good", "latest"]
    assert lines[4].split() == cells
    assert lines[3].split()[-3:] == ["not", "whole", "-"]
    assert lines[8].startswith(f"{NAMES[0]}: ")
    assert "1 of 2 manifests are missing" in lines[8]


@pytest.mark.parametrize(
    ("harm", "condition", "why"),
    [
        (lambda c: (c / MANIFEST).unlink(), "not whole", "1 of 2 manifests are missing"),
        (lambda c: (c / SHARD).unlink(), "damaged", "it is missing"),
        (lambda c: (c / SHARD).write_bytes(b"x"), "damaged", "it has 1 bytes"),
        (lambda c: (c / MANIFEST).write_bytes((c / MANIFEST).read_bytes()[:99]), "damaged", "cut"),
        (
            lambda c: (c / MANIFEST).write_bytes(
                edited((c / MANIFEST).read_bytes(), lambda body: body.update(version=9))
            ),
            "newer format",
            "format version 9",
        ),
    ],
)
def test_what_is_not_good_says_why(digits: Path, harm: Any, condition: str, why: str) -> None:
    harm(digits / NAMES[1])
    found = _by_name(document("ls", digits))[NAMES[1]]
    assert found["condition"] == condition
    assert why in found["why"]
    assert found["step"] is None
    assert why in told("ls", digits)


def test_what_ray_has_registered_and_is_gone_is_told(digits: Path) -> None:
    shutil.rmtree(digits / NAMES[1])
    found = _by_name(document("ls", digits))
    assert list(found) == NAMES
    assert (found[NAMES[1]]["condition"], found[NAMES[1]]["latest"]) == ("gone", True)


def test_a_torn_record_is_told(digits: Path) -> None:
    (digits / SNAPSHOT).write_text('{"ray_version"')
    listing = document("ls", digits)
    assert listing["record"] == "torn"
    assert not any(each["registered"] for each in listing["checkpoints"])
    assert "ray-accel-ckpt heal" in told("ls", digits)


def test_a_trial_that_took_over_anothers_checkpoint(tmp_path: Path) -> None:
    taken = tmp_path / "a" / runs.saved(tmp_path / "a", 20)
    standing = tmp_path / "b" / "checkpoint_000000"
    standing.mkdir(parents=True)
    (standing / REFERENCE).write_bytes(encode(str(standing), str(taken)))
    [found] = document("ls", standing.parent)["checkpoints"]
    assert (found["step"], found["stands_for"]) == (20, str(taken))
    assert found["nbytes"] == sum(path.stat().st_size for path in taken.iterdir())
    assert f"stands for {taken}" in told("ls", standing.parent)


def test_a_project_without_ray(tmp_path: Path) -> None:
    project = ProjectConfiguration(tmp_path, automatic_checkpoint_naming=True)
    ckpt = Checkpointer(project_config=project)
    ckpt.save_state()
    ckpt.flush()
    assert f"there are some in {tmp_path}/checkpoints" in refused("ls", tmp_path)
    listing = document("ls", tmp_path / "checkpoints")
    assert (listing["record"], len(listing["checkpoints"])) == ("absent", 1)


def test_what_is_no_run_is_refused(digits: Path, tmp_path: Path) -> None:
    assert "it is empty, or absent" in refused("ls", tmp_path / "nowhere")
    assert "this is a checkpoint itself" in refused("ls", digits / NAMES[1])


def test_in_a_pipe_no_name_is_cut_and_nothing_is_coloured(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    long = "checkpoint_00000040_5d8e3f" + "0" * 200
    (digits / NAMES[1]).rename(digits / long)
    screen = told("ls", digits)
    assert any(line.startswith(f"{long} ") for line in screen.splitlines())
    assert "\x1b" not in screen
    assert not any(line != line.rstrip() for line in screen.splitlines())


def test_the_document_is_all_of_stdout(digits: Path) -> None:
    text = told("ls", digits, "--json")
    assert json.loads(text)
    assert text.endswith("}\n")
