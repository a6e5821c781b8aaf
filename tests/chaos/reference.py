"""What a run ends with that nothing strikes: the bits, made without Ray; the order, computed."""

from __future__ import annotations

import json
from pathlib import Path

from ray_accel_ckpt import Checkpointer, ProjectConfiguration
from ray_accel_ckpt.state.orders import Shuffled
from tests.chaos.job import SAMPLES, SEED
from tests.gloo.workers import spawn
from tests.training import train


def digests(directory: Path) -> list[str]:
    """Of each of two ranks, over parameters, buffers, moments, schedule and random streams."""
    spawn(_train, 2, directory)
    return [json.loads((directory / f"rank-{rank}").read_text()) for rank in range(2)]


def _train(rank: int, world_size: int, directory: Path) -> None:
    naming = ProjectConfiguration(directory / "none", automatic_checkpoint_naming=True)
    digest = train(Checkpointer(project_config=naming), rank)
    (directory / f"rank-{rank}").write_text(json.dumps(digest))


def order(epoch: int) -> list[int]:
    """The samples of an epoch of the elastic job."""
    drawn: list[int] = Shuffled(SAMPLES).draw(SEED, epoch).tolist()
    return drawn
