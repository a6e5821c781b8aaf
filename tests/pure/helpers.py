"""What the pure tests share: digests of bits, data that draws, checkpointers for one process."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from ray_accel_ckpt import Checkpointer, EverySteps, ProjectConfiguration, open_checkpoint
from ray_accel_ckpt.state.part import Captured, SavedPart, SavedTensor


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def streams() -> str:
    """A digest of the global random streams."""
    return digest(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state())


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def digest(*values: Any) -> str:
    """SHA-256 over the bits of tensors and arrays, and the `repr` of all else."""
    found = hashlib.sha256()
    for value in values:
        _add(found, value)
    return found.hexdigest()


def _add(found: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        found.update(f"{value.dtype}{list(value.shape)}".encode() + tensor_bytes(value))
    elif isinstance(value, np.ndarray):
        found.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        for key, each in value.items():
            found.update(repr(key).encode())
            _add(found, each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            _add(found, each)
    elif hasattr(value, "state_dict"):
        _add(found, value.state_dict())
    else:
        found.update(repr(value).encode())


class Noisy(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples augmented from python's, numpy's and torch's global streams."""

    def __init__(self, size: int = 22) -> None:
        self.size = size
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked.append(index)
        noise = random.random() + float(np.random.rand()) + torch.rand(4)
        return index / 10 + 0.1 * noise, torch.tensor(index)


class Plain(Dataset[int]):
    """The indices themselves. Remembers which ones were asked for."""

    def __init__(self, size: int = 22) -> None:
        self.size = size
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        self.asked.append(index)
        return index


class Stream(IterableDataset[int]):
    """Counts what is read of it."""

    def __init__(self, size: int = 22) -> None:
        self.size = size
        self.read = 0

    def __iter__(self) -> Iterator[int]:
        for i in range(self.size):
            self.read += 1
            yield i


class ShuffledStream(IterableDataset[float]):
    """Draws its order at the beginning, and noise at each sample."""

    def __len__(self) -> int:
        return 22

    def __iter__(self) -> Iterator[float]:
        order = torch.randperm(22).tolist()
        return (i + random.random() + float(np.random.rand()) for i in order)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 1)
    )


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def project(directory: Path, **options: Any) -> ProjectConfiguration:
    return ProjectConfiguration(directory, automatic_checkpoint_naming=True, **options)


OPTIONS: dict[str, Any] = {}
"""Of every Checkpointer that `checkpointer` makes: how it saves, which must not matter."""


def checkpointer(directory: Path, every: int = 2, **options: Any) -> Checkpointer:
    options = {**OPTIONS, **options}
    return Checkpointer(save=EverySteps(every), project_config=project(directory), **options)


def checkpoints(directory: Path) -> list[str]:
    """Names under `<directory>/checkpoints`, by number."""
    found = (directory / "checkpoints").glob("checkpoint_*")
    return sorted((p.name for p in found), key=lambda name: int(name.rpartition("_")[2]))


class KilledError(Exception):
    """The process is gone: nothing of it is used again."""


OnStep = Callable[[], None]
Script = Callable[[Checkpointer, OnStep], Any]


def live(
    script: Script, directory: Path, *, die_at: int = 0, every: int = 3, seed: int = 7, **opts: Any
) -> str | None:
    """One life of a training script, up to the end or to step `die_at`.

    `script` builds everything anew, loads, trains, calls what it is given after
    each `step`, and returns what it ended with; that and the random streams are
    what the digest is of.
    """
    seed_everything(seed)
    ckpt = checkpointer(directory, every, **opts)

    def on_step() -> None:
        if ckpt.global_step == die_at:
            raise KilledError

    try:
        ended = script(ckpt, on_step)
    except KilledError:
        ckpt.flush()
        return None
    ended = digest(ended, streams())
    ckpt.flush()
    return ended


def assert_survives(
    script: Script, directory: Path, *, kills: tuple[int, ...], **options: Any
) -> None:
    """A run killed at each step of `kills` in turn ends with the bits of one that never was."""
    whole = live(script, directory / "whole", **options)
    for n, step in enumerate(kills):
        assert live(script, directory / "killed", die_at=step, seed=7 + n, **options) is None
    assert live(script, directory / "killed", seed=99, **options) == whole
    assert newest_state(directory / "killed") == newest_state(directory / "whole")


def newest_state(directory: Path) -> str:
    """A digest of every part of the newest checkpoint: equal runs save equal states."""
    saved = open_checkpoint(directory / "checkpoints" / checkpoints(directory)[-1])
    return digest([saved.state_dict(part) for part in sorted(saved.parts)])


def as_saved(captured: Captured) -> SavedPart:
    """A captured part as a checkpoint would hold it."""
    tensors = {
        name: SavedTensor(dtype=t.dtype, shape=tuple(t.shape))
        for name, t in captured.tensors.items()
    }
    return SavedPart(
        kind=captured.kind, value=captured.value, tensors=tensors, omitted=captured.omitted
    )
