"""What a run remembers of its lives, and saves that go by the clock in a script."""

from __future__ import annotations

import itertools
from pathlib import Path

from ray_accel_ckpt import (
    Checkpointer,
    EverySeconds,
    EverySteps,
    MaxOverhead,
    open_checkpoint,
)
from ray_accel_ckpt.runtime.lives import Lives
from tests.pure.helpers import checkpoints, project


def test_a_restart_is_counted_and_time_goes_on() -> None:
    first = Lives()
    assert first.mtbf() is None
    second = Lives()
    second.resume(restarts=first.restarts, seconds=500.0)
    assert second.restarts == 1
    assert 500.0 <= second.seconds < 560.0
    third = Lives()
    third.resume(restarts=second.restarts, seconds=900.0)
    mtbf = third.mtbf()
    assert mtbf is not None
    assert 450.0 <= mtbf < 480.0


def test_lives_are_saved(tmp_path: Path) -> None:
    seen = []
    for life in range(3):
        ckpt = Checkpointer(save=MaxOverhead(0.5), project_config=project(tmp_path))
        assert ckpt.load_state() is (life > 0)
        ckpt.step()
        saved = open_checkpoint(ckpt.save_state()).state_dict("progress")
        seen.append((saved["restarts"], saved["seconds"]))
    assert [restarts for restarts, _ in seen] == [0, 1, 2]
    assert all(a < b for (_, a), (_, b) in itertools.pairwise(seen))


def test_a_script_saves_by_the_clock(tmp_path: Path) -> None:
    ckpt = Checkpointer(save=EverySeconds(0.05), project_config=project(tmp_path))
    while len(checkpoints(tmp_path)) < 3:
        ckpt.step()
        ckpt.flush()
    found = [tmp_path / "checkpoints" / name for name in checkpoints(tmp_path)]
    steps = [open_checkpoint(path).step for path in found]
    assert steps == sorted(set(steps))


def test_the_same_state_is_not_saved_twice_by_a_heartbeat(tmp_path: Path) -> None:
    ckpt = Checkpointer(save=EverySeconds(1e-6), project_config=project(tmp_path))
    ckpt.step()
    ckpt.flush()
    assert len(checkpoints(tmp_path)) == 1
    for _ in range(100):
        ckpt.heartbeat()
    ckpt.flush()
    assert len(checkpoints(tmp_path)) == 1


def test_a_save_elsewhere_is_none_of_the_run(tmp_path: Path) -> None:
    ckpt = Checkpointer(save=EverySteps(1000), project_config=project(tmp_path / "run"))
    for _ in ckpt.epochs(1):
        ckpt.step()
        ckpt.save_state(tmp_path / "elsewhere")
    assert len(checkpoints(tmp_path / "run")) == 1, "the run has no end"


def test_a_start_from_another_run_is_no_restart(tmp_path: Path) -> None:
    first = Checkpointer(project_config=project(tmp_path / "a"))
    first.step()
    path = first.save_state()
    second = Checkpointer(project_config=project(tmp_path / "b"))
    assert second.load_state(path)
    saved = open_checkpoint(second.save_state()).state_dict("progress")
    assert (saved["global_step"], saved["restarts"]) == (1, 0)
