"""`heal` and `sweep`: what they would change, and that they change nothing else."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from ray_accel_ckpt.runtime.quiet import sweep_quiet_run
from ray_accel_ckpt.runtime.record import SNAPSHOT
from ray_accel_ckpt.storage.fakes import MemoryFilesystem
from tests.cli import runs
from tests.cli.commands import document, refused, run, told

KNOWN = ["checkpoint_00000020_5d8e3f", "checkpoint_00000040_5d8e3f"]
NEVER_REGISTERED, CUT_OFF = "checkpoint_00000030_0c1d2e", "checkpoint_00000060_5d8e3f"


def _content(run: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}


def _written(run: Path, seconds: float) -> None:
    """So long ago."""
    then = time.time() - seconds
    for path in run.rglob("*"):
        os.utime(path, (then, then))


def _directories(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("checkpoint_*") if path.is_dir())


# --- heal ----------------------------------------------------------------------------------


def test_healing_says_what_it_would_mend_and_then_mends_it(digits: Path) -> None:
    shutil.rmtree(digits / KNOWN[0])
    adopted = runs.saved(digits, 80)
    before = _content(digits)
    sentences = [
        f"checkpoint {KNOWN[0]} is gone: taken out",
        f"checkpoint {adopted} is whole and was not registered: adopted",
    ]
    would = document("heal", digits, "--dry-run")
    assert would == {"run": str(digits), "dry_run": True, "mended": sentences}
    assert "would be mended" in told("heal", digits, "--dry-run")
    assert _content(digits) == before
    assert document("heal", digits) == {**would, "dry_run": False}
    assert "nothing is wrong" in told("heal", digits)
    state = json.loads((digits / SNAPSHOT).read_text())
    assert state["latest_checkpoint_result"]["checkpoint_dir_name"] == adopted


def test_a_run_that_has_lost_all_its_checkpoints(digits: Path) -> None:
    for name in _directories(digits):
        shutil.rmtree(digits / name)
    listing = document("ls", digits)
    assert {each["condition"] for each in listing["checkpoints"]} == {"gone"}
    assert len(document("heal", digits)["mended"]) == 2
    assert document("ls", digits)["checkpoints"] == []


def test_a_torn_record_is_kept_beside(digits: Path) -> None:
    (digits / SNAPSHOT).write_text("{")
    document("heal", digits, "--dry-run")
    assert (digits / SNAPSHOT).read_text() == "{"
    assert not (digits / f"{SNAPSHOT}.torn").exists()
    assert "was torn: written anew" in told("heal", digits)
    assert (digits / f"{SNAPSHOT}.torn").read_text() == "{"


@pytest.mark.parametrize(("order", "worst"), [("min", 1.7e308), ("max", -1.7e308)])
def test_with_a_score_what_lost_its_metrics_ranks_last(
    digits: Path, order: str, worst: float
) -> None:
    runs.saved(digits, 80)
    told("heal", digits, "--score", "loss", "--score-order", order)
    first = json.loads((digits / SNAPSHOT).read_text())["checkpoint_results"][0]
    assert first["checkpoint_dir_name"] == "checkpoint_00000080_5d8e3f"
    assert abs(first["metrics"]["loss"]) > 1.7e308
    assert (first["metrics"]["loss"] > 0) == (worst > 0)


def test_a_run_without_ray_gets_no_record_of_ray(digits: Path, tmp_path: Path) -> None:
    """It would name what `total_limit` removes later."""
    shutil.copytree(digits / KNOWN[0], tmp_path / "checkpoints" / "checkpoint_7")
    assert "nothing is wrong" in told("heal", tmp_path / "checkpoints")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint_7"]


# --- sweep ---------------------------------------------------------------------------------


def test_sweeping_says_what_it_would_remove_and_then_removes_it(digits: Path) -> None:
    _written(digits, 7200)
    before = _content(digits)
    would = document("sweep", digits, "--dry-run")
    assert (would["run"], would["dry_run"]) == (str(digits), True)
    swept = {each["name"]: each for each in would["directories"]}
    assert sorted(swept) == [NEVER_REGISTERED, CUT_OFF]
    assert swept[CUT_OFF]["why"] == "it never became whole"
    nbytes = sum(path.stat().st_size for path in (digits / CUT_OFF).iterdir())
    assert swept[CUT_OFF]["nbytes"] == nbytes
    assert _content(digits) == before
    screen = told("sweep", digits, "--dry-run")
    assert NEVER_REGISTERED in screen
    assert "would be removed" in screen
    assert document("sweep", digits) == {**would, "dry_run": False}
    assert _directories(digits) == KNOWN
    assert "nothing to sweep" in told("sweep", digits)


JOURNAL = "events/1700000000000-5d8e3f-0.jsonl"


@pytest.mark.parametrize("part", [SNAPSHOT, f"{CUT_OFF}/shard-00000-of-00002.safetensors", JOURNAL])
def test_a_run_that_may_be_going_is_left_alone(digits: Path, part: str) -> None:
    """Ray writes its record before it deletes a checkpoint, and a save its files."""
    (digits / JOURNAL).parent.mkdir()
    (digits / JOURNAL).touch()
    _written(digits, 7200)
    os.utime(digits / part)
    before = _content(digits)
    said = refused("sweep", digits)
    assert "the run may be going" in said
    assert f"{digits}/{part}" in said
    assert _content(digits) == before
    assert sorted(document("sweep", digits, "--older-than", "0s", "--dry-run")["directories"][0])
    told("sweep", digits, "--older-than", "0s")
    assert _directories(digits) == KNOWN


@pytest.mark.parametrize("time", ["3h", "180min", "10800s", "10800", "0.2d"])
def test_how_long_it_must_have_been_quiet(digits: Path, time: str) -> None:
    _written(digits, 7200)
    refused("sweep", digits, "--older-than", time)
    told("sweep", digits, "--older-than", "1.5h")


def test_what_is_no_time_is_wrong_usage(digits: Path) -> None:
    done = run("sweep", digits, "--older-than", "soon")
    assert done.exit_code == 2
    assert "'soon' is no time" in done.stderr


def test_without_a_record_that_can_be_read_nothing_is_swept(digits: Path) -> None:
    (digits / SNAPSHOT).write_text("{")
    before = _content(digits)
    said = refused("sweep", digits, "--older-than", "0s")
    assert "ray-accel-ckpt heal" in said
    assert _content(digits) == before


def test_where_storage_does_not_tell_the_time_somebody_has_to_say_so(digits: Path) -> None:
    memory = MemoryFilesystem(_content(digits))
    with pytest.raises(ValueError, match="is not known to the storage"):
        sweep_quiet_run(memory, str(digits), quiet_for=1.0)
    assert len(sweep_quiet_run(memory, str(digits), quiet_for=0).directories) == 2


def test_what_somebody_else_put_there_stays(digits: Path) -> None:
    (digits / CUT_OFF / "notes.txt").write_text("mine")
    told("sweep", digits, "--older-than", "0s")
    assert _directories(digits) == sorted([*KNOWN, CUT_OFF])


@pytest.mark.parametrize("command", [["heal"], ["sweep", "--older-than", "0s"]])
def test_where_no_run_is_nothing_is_done(tmp_path: Path, command: list[Any]) -> None:
    assert "no checkpoints there" in refused(*command, tmp_path)
    assert list(tmp_path.iterdir()) == []
