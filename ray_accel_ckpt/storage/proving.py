"""Reading and proving every byte of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from ray_accel_ckpt.errors import CheckpointError
from ray_accel_ckpt.image.reader import Snapshot
from ray_accel_ckpt.storage.catalog import ShardFetch, open_snapshot
from ray_accel_ckpt.storage.filesystem import Entry, Readable
from ray_accel_ckpt.storage.survey import Condition, condition_of


class Watcher(Protocol):
    """Hears how proving goes on; of reads by several threads."""

    def begins(self, path: str, nbytes: int) -> None:
        """A checkpoint of which so many bytes will be read."""
        ...

    def has_read(self, nbytes: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is wrong, and with which file or bytes of it."""

    where: str
    what: str
    why: str

    @classmethod
    def of(cls, error: CheckpointError, path: str) -> Fault:
        return cls(where=error.where or path, what=error.what, why=error.why)


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What came out for one checkpoint.

    Attributes:
        files: how many files of tensors were read.
        nbytes: their length together.
        faults: the first of each file that is bad.
    """

    name: str
    path: str
    condition: Condition
    files: int = 0
    nbytes: int = 0
    faults: tuple[Fault, ...] = ()


def prove(filesystem: Readable, path: str, watcher: Watcher) -> Proof:
    """Read and prove all of the checkpoint at `path`, by several threads. Little is in memory.

    Raises:
        StorageError: it could not be read.
    """
    name = path.rpartition("/")[2]
    try:
        snapshot = open_snapshot(filesystem, path)
    except CheckpointError as e:
        faults = (Fault.of(e, path),)
        return Proof(name=name, path=path, condition=condition_of(e), faults=faults)
    nbytes = sum(shard.nbytes for shard in snapshot.shards.values())
    watcher.begins(path, nbytes)
    fetch = ShardFetch(Watched(filesystem, watcher), snapshot)
    bad = list(faults_of(snapshot, fetch))
    return Proof(
        name=name,
        path=path,
        condition=condition_of(bad[0]) if bad else Condition.GOOD,
        files=len(snapshot.shards),
        nbytes=nbytes,
        faults=tuple(Fault.of(each, path) for each in bad),
    )


def faults_of(snapshot: Snapshot, fetch: ShardFetch) -> Iterator[CheckpointError]:
    """What is wrong with an opened checkpoint: one for each file and each rank that is bad.

    Raises:
        StorageError: it could not be read.
    """
    for shard in snapshot.shards:
        try:
            fetch.prove(shard)
        except CheckpointError as e:
            yield e
    for rank in range(snapshot.world_size):
        try:
            snapshot.parts(rank)
        except CheckpointError as e:
            yield e


class Watched:
    """Passes everything on, and says how much was read."""

    def __init__(self, filesystem: Readable, watcher: Watcher) -> None:
        self._filesystem = filesystem
        self._watcher = watcher

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        self._filesystem.read_into(path, offset, buffer)
        self._watcher.has_read(len(buffer))

    def list(self, path: str) -> list[Entry]:
        return self._filesystem.list(path)
