"""A Lightning fit with several workers ends with the same bits after a kill."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy

from ray_accel_ckpt.runtime.prepare import PinnedDDP
from tests.gloo.workers import spawn
from tests.pure.helpers import KilledError, checkpointer, digest, seed_everything, streams
from tests.pure.test_lightning import Die, Net, Remember, trainer_of


def _life(rank: int, world_size: int, directory: Path, die_at: int, seed: int) -> Any:
    seed_everything(seed + rank)
    ckpt, remember = checkpointer(directory, 2, seed=3), Remember()
    strategy = DDPStrategy()
    trainer = trainer_of(
        directory,
        ckpt,
        remember,
        Die(die_at or -1, "on_train_batch_start"),
        strategy=strategy,
        devices=world_size,
    )
    wrapped = []
    module = Net(size=58)
    module.on_fit_start = lambda: wrapped.append(trainer.strategy.model)
    try:
        trainer.fit(module)
    except KilledError:
        ckpt.flush()
        return None
    assert isinstance(wrapped[0], PinnedDDP)
    # What callbacks and hooks of the module save is rank 0's.
    own = [remember.values, module.seen] if rank == 0 else []
    return digest(module, *trainer.optimizers, streams(), dict(trainer.callback_metrics), own)


def _killed(rank: int, world_size: int, directory: Path) -> None:
    # As torchrun would have launched it; warnings of Lightning's about how it is used here.
    names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "TORCHELASTIC_RUN_ID")
    os.environ.update(dict(zip(names, (str(rank), str(rank), "0", "none"), strict=True)))
    os.environ.update(WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    warnings.simplefilter("ignore")
    whole = _life(rank, world_size, directory / "whole", 0, 7)
    assert _life(rank, world_size, directory / "killed", 8, 7) is None
    assert _life(rank, world_size, directory / "killed", 0, 99) == whole


@pytest.mark.long
def test_killed_workers_change_no_bit(tmp_path: Path) -> None:
    """Three: what two of them add up is the same in any order."""
    spawn(_killed, 3, tmp_path)
