"""Accelerate loops of several workers: resumed anywhere, they end with the same bits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader

from ray_accel_ckpt import Checkpointer, ProjectConfiguration, errors
from ray_accel_ckpt.integrations.accelerate import from_accelerate, to_accelerate
from tests.accelerated import (
    SAMPLES,
    Augmented,
    Run,
    StatefulStream,
    Stream,
    by_index,
    own_batches,
    reset,
    resumed_from_each_step,
    train,
)
from tests.gloo.workers import smaller_group, spawn, write
from tests.pure.helpers import KilledError, seed_everything


def _in_torchrun(rank: int, world_size: int) -> None:
    """What Accelerate goes by to find out that there are others."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in ranks.items()})


def _stream() -> DataLoader[Any]:
    return DataLoader(Stream(), batch_size=3)


def _stateful_stream() -> DataLoader[Any]:
    return DataLoader(StatefulStream(), batch_size=3)


def _six_stream() -> DataLoader[Any]:
    return DataLoader(Stream(), batch_size=6)


def _six() -> DataLoader[Any]:
    return DataLoader(Augmented(), batch_size=6, shuffle=True)


def _dropping() -> DataLoader[Any]:
    return DataLoader(Augmented(), batch_size=3, shuffle=True, drop_last=True)


LOADERS: dict[str, tuple[Callable[[], DataLoader[Any]], dict[str, Any]]] = {
    "shuffled": (by_index, {}),
    "seedable": (by_index, {"use_seedable_sampler": True}),
    "uneven": (by_index, {"even_batches": False}),
    "dropping": (_dropping, {}),
    "split": (_six, {"split_batches": True}),
    "own batches": (own_batches, {}),
    "dispatched": (by_index, {"dispatch_batches": True}),
    "dispatched, dropping": (_dropping, {"dispatch_batches": True}),
    "dispatched, split": (_six, {"dispatch_batches": True, "split_batches": True}),
    "stream": (_stream, {}),
    "stream, split": (_six_stream, {"split_batches": True}),
    "stream, each for itself": (_stream, {"dispatch_batches": False}),
    "stream with state": (_stateful_stream, {}),
}


def _resumed(rank: int, world_size: int, directory: Path, names: list[str]) -> None:
    _in_torchrun(rank, world_size)
    for name in names:
        loader, data = LOADERS[name]
        resumed_from_each_step(
            directory / name.replace(" ", "-"), loader=loader, data=DataLoaderConfiguration(**data)
        )
    # At each epoch's beginning rank 0's global stream goes to all, and not in its middle.
    resumed_from_each_step(directory / "one-stream", rng_types=["torch"])


def _elastic(rank: int, world_size: int, directory: Path) -> None:
    """Begun by two, left in the middle of an epoch, continued by all three, ended by one."""
    # Where the first two stop, no batch of the three that follow is left with one sample.
    for loader, first in ((by_index, 2), (_stream, 3)):
        place = directory / loader.__name__
        for size, stop_at in ((2, first), (3, 5), (1, 0)):
            with smaller_group(rank, size, directory / f"{loader.__name__}-{size}") as among:
                if among:
                    _in_torchrun(rank, size)
                    seen = _until(stop_at, place, loader)
        if rank == 0:
            # Accelerate completes the last batch of an epoch, and leaves that out of metrics again.
            epochs = [sorted(seen[i : i + SAMPLES]) for i in (0, SAMPLES)]
            assert epochs == [[*range(SAMPLES)]] * 2, loader.__name__
            write(place / "seen", "all")


def _until(stop_at: int, directory: Path, loader: Callable[[], DataLoader[Any]]) -> list[int]:
    """Go on from the newest checkpoint; save at step `stop_at`, and be killed there."""
    project = ProjectConfiguration(directory, automatic_checkpoint_naming=True)

    def step(ckpt: Checkpointer) -> None:
        ckpt.step()
        if ckpt.global_step == stop_at:
            ckpt.save_state()
            raise KilledError

    try:
        ended = train(
            lambda accelerator: Checkpointer.from_accelerator(accelerator, project_config=project),
            loader=loader,
            on_step=step,
        )
    except KilledError:
        return []
    seen: list[int] = ended["seen"]
    return seen


def _folders(rank: int, world_size: int, directory: Path) -> None:
    """Accelerate's folder of two workers -> ours -> Accelerate's, loaded by stock Accelerate."""
    _in_torchrun(rank, world_size)
    run = Run(seed=3)
    # Each rank has its own streams, and so its own data.
    seed_everything(3 + rank)
    run.train(8)
    run.accelerator.save_state(str(directory / "theirs"))
    seen = list(run.meter.seen)
    expected = run.goes_on()
    dist.barrier()
    if rank == 0:
        from_accelerate(
            directory / "theirs",
            directory / "ours",
            models=[run.accelerator.unwrap_model(run.model)],
            optimizers=[run.optimizer],
            objects=("Meter",),
        )
        to_accelerate(directory / "ours", directory / "back")
    dist.barrier()
    theirs = Run(seed=7)
    theirs.accelerator.load_state(str(directory / "back"))
    _goes_on(theirs, rank, seen, expected)
    ours = Run(seed=9)
    ckpt = Checkpointer.from_accelerator(ours.accelerator)
    parts = ("model", "optimizer", "scheduler", "scaler", "Meter", "rng")
    assert ckpt.load_state(directory / "ours", parts=parts)
    _goes_on(ours, rank, seen, expected)


def _goes_on(run: Run, rank: int, seen: list[int], expected: tuple[str, str]) -> None:
    # Of objects and buffers Accelerate saves rank 0's; DDP hands the latter out at the next step.
    if rank:
        run.meter.seen = list(seen)
    now, ended = run.goes_on()
    assert ended == expected[1]
    assert rank or now == expected[0]


def _alone(rank: int, world_size: int) -> None:
    """Without `cpu=True`, and without GPUs, an accelerator takes itself to be alone."""
    _in_torchrun(rank, world_size)
    reset()
    accelerator = Accelerator()
    accelerator.prepare(by_index())
    with pytest.raises(errors.ConfigurationError, match="has 1 processes"):
        Checkpointer.from_accelerator(accelerator)


@pytest.mark.long
def test_two_workers_resumed_at_any_step_end_with_the_same_bits(tmp_path: Path) -> None:
    spawn(_resumed, 2, tmp_path, list(LOADERS))


def test_three_workers_add_gradients_up_in_the_same_order(tmp_path: Path) -> None:
    spawn(_resumed, 3, tmp_path, ["shuffled"])


def test_other_numbers_of_workers_see_each_sample_once_an_epoch(tmp_path: Path) -> None:
    spawn(_elastic, 3, tmp_path)
    assert [p.parent.name for p in sorted(tmp_path.glob("*/seen"))] == ["_stream", "by_index"]


def test_a_folder_of_two_workers_goes_there_and_back(tmp_path: Path) -> None:
    spawn(_folders, 2, tmp_path)


def test_an_accelerator_that_sees_no_peers_is_refused() -> None:
    spawn(_alone, 2)
