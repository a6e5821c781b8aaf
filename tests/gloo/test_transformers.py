"""A 🤗 Trainer with several workers: the same bits after a kill, the same samples with fewer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ray_accel_ckpt.runtime.prepare import PinnedDDP
from tests.gloo.workers import spawn, write
from tests.pure.helpers import KilledError, checkpointer, seed_everything
from tests.pure.test_transformers import Die, Tokens, ended_with, trainer_of


def _as_launched(rank: int, world_size: int) -> None:
    """What Ray, or torchrun, tells Accelerate."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))


def _life(directory: Path, die_at: int, seed: int, **options: Any) -> Any:
    seed_everything(seed)
    ckpt = checkpointer(directory, 3)
    trainer = trainer_of(directory, ckpt, Die(die_at or -1, "on_step_begin"), **options)
    try:
        trainer.train()
    except KilledError:
        ckpt.flush()
        return None
    assert isinstance(trainer.model_wrapped, PinnedDDP)
    return ended_with(trainer)


def _killed(rank: int, world_size: int, directory: Path) -> None:
    _as_launched(rank, world_size)
    options = {"per_device_train_batch_size": 2, "data": Tokens(31)}
    whole = _life(directory / "whole", 0, 7, **options)
    assert _life(directory / "killed", 5, 7, **options) is None
    assert _life(directory / "killed", 0, 99, **options) == whole


def test_killed_workers_change_no_bit(tmp_path: Path) -> None:
    """Three: what two of them add up is the same in any order."""
    spawn(_killed, 3, tmp_path)


def _part(rank: int, world_size: int, directory: Path, die_at: int) -> None:
    _as_launched(rank, world_size)
    seed_everything(7)
    data = Tokens(32)
    ckpt = checkpointer(directory, 3)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4 // world_size}
    trainer = trainer_of(directory, ckpt, Die(die_at or -1, "on_step_begin"), data=data, **options)
    try:
        trainer.train()
    except KilledError:
        ckpt.flush()
    assert trainer.state.global_step == (die_at or 12)
    write(directory / f"asked-{world_size}-{rank}", json.dumps(data.asked))


def _asked(directory: Path, world_size: int) -> list[list[int]]:
    return [
        json.loads((directory / f"asked-{world_size}-{rank}").read_text())
        for rank in range(world_size)
    ]


def _steps(asked: list[list[int]]) -> list[set[int]]:
    """The samples of each step: eight, over all workers."""
    each = 8 // len(asked)
    count = len(asked[0]) // each
    return [{i for own in asked for i in own[n * each : (n + 1) * each]} for n in range(count)]


@pytest.mark.long
def test_another_number_of_workers_takes_the_same_samples_a_step(tmp_path: Path) -> None:
    spawn(_part, 2, tmp_path / "whole", 0)
    spawn(_part, 2, tmp_path / "elastic", 5)
    spawn(_part, 1, tmp_path / "elastic", 0)
    # Saved after three steps of the first epoch's four.
    again = _steps(_asked(tmp_path / "elastic", 1))
    assert again == _steps(_asked(tmp_path / "whole", 2))[3:]
