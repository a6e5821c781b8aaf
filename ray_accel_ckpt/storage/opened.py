"""A checkpoint opened for reading, after training, anywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.image.pieces import Piece, dtype_of
from ray_accel_ckpt.image.reader import Located, Snapshot
from ray_accel_ckpt.state.box import Box, copy_overlap
from ray_accel_ckpt.state.part import SavedPart
from ray_accel_ckpt.state.tree import TAG, Json, unflatten
from ray_accel_ckpt.storage.catalog import ShardFetch, open_snapshot
from ray_accel_ckpt.storage.filesystem import Filesystem, resolve
from ray_accel_ckpt.storage.proving import Watched, Watcher, faults_of


class SavedCheckpoint:
    """What lies in one checkpoint. Manifests are read and checked; tensors when asked for.

    Attributes:
        path: where it lies, on its filesystem.
        step: `global_step` when it was saved.
        epoch: the epoch a resumed run begins in.
        world_size: how many workers saved it.
        parts: names of what is in it.
    """

    def __init__(self, snapshot: Snapshot, fetch: ShardFetch) -> None:
        self._snapshot = snapshot
        self._fetch = fetch
        self.path = snapshot.where
        self.step = snapshot.step
        self.epoch = snapshot.manifests[0].epoch
        self.world_size = snapshot.world_size
        self.parts = tuple(snapshot.manifests[0].parts)

    def __repr__(self) -> str:
        return f"SavedCheckpoint({self.path!r}, step={self.step}, parts={self.parts})"

    def state_dict(self, part: str, *, rank: int = 0) -> Any:
        """The state of one part. Tensors are on the host, and are copies.

        A dict comes as a read-only mapping that reads and proves a tensor when
        it is looked up: only the bytes asked for are fetched.
        `torch.nn.Module.load_state_dict` takes it as it is.

        Args:
            rank: whose, for parts of which each worker has its own.

        Raises:
            ConfigurationError: no such part or rank.
            CorruptCheckpointError: on looking up a damaged tensor.
        """
        saved = part_of(self._snapshot, part, rank)
        return _lazy(saved.value, StoredTensors(self._snapshot, self._fetch, rank))

    def verify(self) -> None:
        """Read and prove every byte, by several threads. Little of it is in memory at a time.

        Raises:
            CorruptCheckpointError: naming the first file, tensor and byte range
                that are not what was written.
        """
        for fault in faults_of(self._snapshot, self._fetch):
            raise fault


def open_checkpoint(checkpoint: Any) -> SavedCheckpoint:
    """Open a checkpoint to look into it.

    Args:
        checkpoint: a path, a URI, or a `ray.train.Checkpoint` such as `result.checkpoint`.

    Raises:
        NotACheckpointError: there is none, or not all of one.
        CorruptCheckpointError: a manifest is damaged or a shard cut off.
        FormatVersionError: it is of a newer format.
        ConfigurationError: not something that can be opened.
    """
    return SavedCheckpoint(*open_stored(checkpoint))


@dataclass(frozen=True, kw_only=True)
class Watching:
    """A checkpoint for `open_stored`, and who hears how much of its tensors is read."""

    checkpoint: Any
    watcher: Watcher


def open_stored(checkpoint: Any) -> tuple[Snapshot, ShardFetch]:
    """What `open_checkpoint` looks into: the manifests, and the way to the shards' bytes."""
    if isinstance(checkpoint, Watching):
        filesystem, path = _place(checkpoint.checkpoint)
        snapshot = open_snapshot(filesystem, path)
        checkpoint.watcher.begins(path, sum(s.nbytes for s in snapshot.shards.values()))
        return snapshot, ShardFetch(Watched(filesystem, checkpoint.watcher), snapshot)
    filesystem, path = _place(checkpoint)
    snapshot = open_snapshot(filesystem, path)
    return snapshot, ShardFetch(filesystem, snapshot)


def _place(checkpoint: Any) -> tuple[Filesystem, str]:
    # Ray's first: it has __fspath__ too, which only raises.
    if hasattr(checkpoint, "path") and hasattr(checkpoint, "filesystem"):
        return resolve(checkpoint.path, checkpoint.filesystem)
    if isinstance(checkpoint, (str, os.PathLike)):
        return resolve(checkpoint)
    raise ConfigurationError(
        f"cannot open a {type(checkpoint).__qualname__}",
        remedy="pass a path, a URI or a ray.train.Checkpoint",
    )


def part_of(snapshot: Snapshot, name: str, rank: int) -> SavedPart:
    """One part as `rank` would load it.

    Raises:
        ConfigurationError: the checkpoint has no such part or rank.
    """
    require_rank(snapshot, rank)
    parts = snapshot.parts(rank)
    if name not in parts:
        raise ConfigurationError(
            f"the checkpoint has no part {name!r}",
            where=snapshot.where,
            remedy=f"it has: {', '.join(parts)}",
        )
    return parts[name]


def shared_parts(snapshot: Snapshot) -> tuple[str, ...]:
    """Names of the parts of which all workers have one and the same."""
    own = snapshot.per_rank_parts()
    return tuple(name for name in snapshot.manifests[0].parts if name not in own)


def require_rank(snapshot: Snapshot, rank: int) -> None:
    """Raise `ConfigurationError` unless `rank` was there when the checkpoint was saved."""
    if not 0 <= rank < snapshot.world_size:
        raise ConfigurationError(
            f"no rank {rank}: {snapshot.world_size} workers saved this checkpoint",
            where=snapshot.where,
            remedy=f"ranks are 0 to {snapshot.world_size - 1}",
        )


class LazyDict(Mapping[str, Any]):
    """A saved dict whose values are read when they are looked up."""

    def __init__(self, value: dict[str, Json], tensors: StoredTensors) -> None:
        self._value = value
        self._tensors = tensors

    def __getitem__(self, key: str) -> Any:
        return _lazy(self._value[key], self._tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._value)

    def __len__(self) -> int:
        return len(self._value)

    def __repr__(self) -> str:
        return f"LazyDict({', '.join(map(repr, self._value))})"


class StoredTensors(Mapping[str, torch.Tensor]):
    """Tensors by stored name as `rank` has them, each read and proved when looked up."""

    def __init__(self, snapshot: Snapshot, fetch: ShardFetch, rank: int) -> None:
        self._snapshot = snapshot
        self._fetch = fetch
        self._rank = rank

    def __getitem__(self, name: str) -> torch.Tensor:
        pieces = self._snapshot.located(name, self._rank)
        if not pieces:
            raise KeyError(name)
        first = pieces[0].info
        if len(pieces) == 1:
            return _read(self._fetch, pieces[0])
        whole = torch.empty(first.shape, dtype=dtype_of(first), device="cpu")
        for piece in pieces:
            rows = _read(self._fetch, piece)
            copy_overlap(whole, Box.whole(first.shape), rows, piece.info.box)
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter({*self._snapshot.shared, *self._snapshot.own[self._rank]})

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _lazy(value: Json, tensors: StoredTensors) -> Any:
    if isinstance(value, dict) and TAG not in value:
        return LazyDict(value, tensors)
    return unflatten(value, tensors)


def _read(fetch: ShardFetch, located: Located) -> torch.Tensor:
    return fetch.piece(located.shard, Piece.whole(located.info))
