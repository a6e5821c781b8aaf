"""One loop with Accelerate's own checkpoints and with ours: five lines of difference."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import pytest

from ray_accel_ckpt import Checkpointer
from tests.accelerate_loops import after, before
from tests.accelerate_loops.data import SAVE_EVERY, made
from tests.accelerated import reset
from tests.pure.helpers import KilledError, checkpoints, digest, project, streams

LOOPS = Path(before.__file__).parent


def _run(loop: Any, monkeypatch: pytest.MonkeyPatch, *, die_at: int = 0, **config: Any) -> str:
    """One life of a loop, up to its end or to optimizer step `die_at`; what it ended with."""
    reset()
    ends: list[str] = []

    def dying() -> Any:
        model, optimizer, *others = made()
        steps = iter(range(1, 10**9))

        def stepped(*_: Any) -> None:
            if next(steps) == die_at:
                raise KilledError

        optimizer.register_step_post_hook(stepped)
        return model, optimizer, *others

    def on_epoch(accelerator: Any, model: Any, accuracy: float) -> None:
        held = [*accelerator._models, *accelerator._optimizers, *accelerator._schedulers]
        ends.append(digest(*(each.state_dict() for each in held), accuracy, streams()))

    monkeypatch.setattr(loop, "made", dying)
    kept = _kept(monkeypatch) if loop is after else []
    try:
        loop.train_loop_per_worker({"on_epoch": on_epoch, **config})
    except KilledError:
        # What it was writing when it died is there, so that the test always sees the same.
        for ckpt in kept:
            ckpt.flush()
        return ""
    return ends[-1]


def _kept(monkeypatch: pytest.MonkeyPatch) -> list[Checkpointer]:
    """Every checkpointer that the loop makes."""
    kept: list[Checkpointer] = []

    class Kept(Checkpointer):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            kept.append(self)

    monkeypatch.setattr(after, "Checkpointer", Kept)
    return kept


def test_five_lines_take_the_place_of_five() -> None:
    texts = [(LOOPS / name).read_text().splitlines() for name in ("before.py", "after.py")]
    lines = list(difflib.ndiff(*texts))
    assert len([line for line in lines if line.startswith("+ ")]) == 5
    assert len([line for line in lines if line.startswith("- ")]) == 5


def test_the_loop_of_before_resumes_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not _run(before, monkeypatch, die_at=3, resume_from=None, folder=tmp_path)
    newest = tmp_path / f"step_{SAVE_EVERY}"
    assert _run(before, monkeypatch, resume_from=str(newest), folder=tmp_path / "again")


@pytest.mark.parametrize("die_at", [2, 3, 5, 6, 8])
def test_the_loop_of_after_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die_at: int
) -> None:
    whole = _run(after, monkeypatch, to={"project_config": project(tmp_path / "whole")})
    killed = {"project_config": project(tmp_path / "killed")}
    assert not _run(after, monkeypatch, die_at=die_at, to=killed)
    assert checkpoints(tmp_path / "killed")
    assert _run(after, monkeypatch, to=killed) == whole
