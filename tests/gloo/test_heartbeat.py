"""Saves by the clock under several workers: rank 0's clock is that of all."""

from __future__ import annotations

import time
from pathlib import Path

from torch import nn

from ray_accel_ckpt import Checkpointer, EverySeconds, ProjectConfiguration, open_checkpoint
from tests.gloo.workers import spawn


def _train(rank: int, world_size: int, directory: Path) -> None:
    ckpt = Checkpointer(
        # Only rank 0's is asked: by rank 1's, each step would save.
        save=EverySeconds(1.0 if rank == 0 else 1e-6),
        project_config=ProjectConfiguration(directory, automatic_checkpoint_naming=True),
    )
    ckpt.prepare(nn.Linear(2, 2))
    for _ in range(40):
        ckpt.step()
        time.sleep(0.05)  # the work of a step
    ckpt.flush()


def test_ranks_save_by_the_clock_of_rank_0(tmp_path: Path) -> None:
    spawn(_train, 2, tmp_path)
    found = list((tmp_path / "checkpoints").iterdir())
    assert 1 <= len(found) < 40
    for path in found:
        open_checkpoint(path).verify()
