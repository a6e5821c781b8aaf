"""What a run remembers of its lives, and saves that go by the clock in a script."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from ray_accel_ckpt import (
    Checkpointer,
    EverySeconds,
    EverySteps,
    open_checkpoint,
)
from ray_accel_ckpt.runtime.lives import Lives
from ray_accel_ckpt.storage.fakes import MemoryFilesystem
from tests.pure.helpers import checkpoints, project


def test_lives_are_told_from_the_names_of_their_journals() -> None:
    memory, now = MemoryFilesystem(), int(time.time() * 1000)
    for ago, writer, part in (
        (900_000, "aaaaaa", 0),
        (900_000, "aaaaaa", 1),
        (800_000, "controller", 0),
        (300_000, "bbbbbb", 0),
    ):
        memory.write(f"run/events/{now - ago}-{writer}-{part}.jsonl", [b""])
    memory.write("run/events/a-file-of-somebody", [b""])
    third = Lives()
    assert third.mtbf() is None
    third.begin(memory, "run")
    third.begin(memory, "run")
    mtbf = third.mtbf()
    assert mtbf is not None
    assert 450.0 <= mtbf < 480.0


def test_a_first_life_knows_of_no_failure() -> None:
    first = Lives()
    first.begin(MemoryFilesystem(), "run")
    assert first.mtbf() is None


def test_storage_that_refuses_costs_only_the_knowledge(caplog: pytest.LogCaptureFixture) -> None:
    class Refusing(MemoryFilesystem):
        def list(self, path: str) -> Any:
            raise PermissionError(path)

    life = Lives()
    life.begin(Refusing(), "run")
    assert life.mtbf() is None
    assert "will not be known" in caplog.text


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


def test_a_start_from_another_run_is_no_life_of_it(tmp_path: Path) -> None:
    first = Checkpointer(save=EverySeconds(600), project_config=project(tmp_path / "a"))
    path = first.save_state()
    second = Checkpointer(save=EverySeconds(600), project_config=project(tmp_path / "b"))
    assert second.load_state(path)
    assert not (tmp_path / "b" / "events").exists()
