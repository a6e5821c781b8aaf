"""A state saved by N workers and loaded by M is the same, bit for bit, for every pair."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_accel_ckpt import open_checkpoint
from tests.gloo.matrix import SIZES, kinds_of, run
from tests.gloo.workers import spawn

SAVED = [f"{kind}-{n}" for n in SIZES for kind in kinds_of(n)]


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Path, dict[str, list[str]]]]:
    """By case, what each rank had to say: nothing if all is well."""
    directory = tmp_path_factory.mktemp("matrix")
    spawn(run, max(SIZES), directory)
    found: dict[str, list[str]] = {}
    for file in sorted(directory.glob("*.json")):
        for case, problem in json.loads(file.read_text()).items():
            found.setdefault(case, []).append(problem)
    yield directory, found


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("m", SIZES)
def test_every_tensor_comes_back(
    results: tuple[Path, dict[str, list[str]]], saved: str, m: int
) -> None:
    _, said = results
    assert said[f"save {saved}"] == [""] * int(saved.rpartition("-")[2])
    for kind in kinds_of(m):
        problems = [problem for problem in said[f"{saved} to {kind}-{m}"] if problem]
        assert not problems, f"to {kind}: {problems[0]}"


@pytest.mark.parametrize("saved", SAVED)
def test_what_is_written_can_be_opened_and_holds_each_parameter_once(
    results: tuple[Path, dict[str, list[str]]], saved: str
) -> None:
    directory, _ = results
    checkpoint = open_checkpoint(directory / saved)
    checkpoint.verify()
    assert checkpoint.state_dict("model")["odd.weight"].shape == (7, 8)
