"""Prepared loaders without a `Checkpointer`: one for each rank, in one process."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

from ray_accel_ckpt.state.loader import PreparedLoader
from ray_accel_ckpt.state.part import Captured
from ray_accel_ckpt.state.passes import EpochWatch
from ray_accel_ckpt.state.tree import unflatten
from tests.pure.helpers import KilledError, digest, seed_everything

Make = Callable[[], DataLoader[Any]]


def prepared(
    loader: DataLoader[Any],
    *,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 3,
    global_batch_size: int | None = None,
) -> PreparedLoader:
    return PreparedLoader(
        loader,
        name="loader",
        seed=seed,
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
        global_batch_size=global_batch_size,
    )


def restored(captured: Captured) -> Any:
    """A state as it comes out of a checkpoint."""
    tensors = {name: tensor.clone() for name, tensor in captured.tensors.items()}
    return unflatten(json.loads(json.dumps(captured.value, allow_nan=False)), tensors)


def moved_on(loader: PreparedLoader, make: Make, **options: Any) -> PreparedLoader:
    """What a new process makes of the position that `loader` is at."""
    again = prepared(make(), **{"seed": 99, **options})
    state = restored(loader.capture())
    again.check(state)
    again.apply(state)
    return again


def passes(loader: PreparedLoader, count: int) -> list[list[str]]:
    """Digests of all batches of so many passes."""
    return [[digest(batch) for batch in loader] for _ in range(count)]


def interrupted(make: Make, *, epoch: int, batches: int, then: int) -> list[list[str]]:
    """As `passes`, by a process that dies in pass `epoch` after `batches`, and one after it."""
    loader = prepared(make())
    done = passes(loader, epoch)
    seed_everything(1)
    running = iter(loader)
    part = [digest(batch) for batch in itertools.islice(running, batches)]
    again = moved_on(loader, make)
    seed_everything(2)
    rest, *later = passes(again, then)
    return [*done, part + rest, *later]


def broken_off(make: Make, *, epoch: int, batches: int, then: int) -> list[list[str]]:
    """As `interrupted`, by an error in the loop's body, in whose handler the state is saved."""
    loader = prepared(make())
    watch = EpochWatch(lambda: [loader])
    done = passes(loader, epoch)
    seed_everything(1)
    part: list[str] = []

    def body(batch: Any) -> None:
        part.append(digest(batch))
        if len(part) == batches:
            raise KilledError

    try:
        for batch in loader:
            body(batch)
    except KilledError:
        with watch.as_left():
            again = moved_on(loader, make)
    seed_everything(2)
    rest, *later = passes(again, then)
    return [*done, part + rest, *later]


def flat(loader: PreparedLoader) -> list[int]:
    return [int(i) for batch in loader for i in batch]
