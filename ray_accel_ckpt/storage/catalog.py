"""The checkpoints of a run: named, listed, opened, chosen.

A directory is a checkpoint when the manifests of all its ranks are there, agree,
and each shard has the stated length. Everything else in a run's directory, a
user's own folders included, is none of our business and is left alone. A directory
may also hold a reference and stand for a checkpoint that lies elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import xxhash

from ray_accel_ckpt.errors import CorruptCheckpointError, NotACheckpointError
from ray_accel_ckpt.image import manifest as manifests
from ray_accel_ckpt.image.manifest import Manifest, ShardInfo, SliceInfo, manifest_name
from ray_accel_ckpt.image.pieces import Piece
from ray_accel_ckpt.image.reader import Snapshot
from ray_accel_ckpt.image.staged import Staged
from ray_accel_ckpt.storage.access import READ_TIMEOUT, is_file, listed, read_file
from ray_accel_ckpt.storage.filesystem import Readable
from ray_accel_ckpt.storage.reference import ORIGIN, REFERENCE, read_reference
from ray_accel_ckpt.storage.retry import retried

_NAME = re.compile(r"checkpoint_([0-9]{1,20})(?:_([0-9a-f]+))?")
_IN_A_RUN = re.compile(r"checkpoint_[0-9]{8,20}_([0-9a-f]{6})(?:[0-9a-f]{2,})?")
"""As `checkpoint_name` has it: the step, then the attempt and the number at that step."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A directory that may be a checkpoint, by its name alone.

    Attributes:
        number: the step of a checkpoint in a run, the `n` of an automatic name.
    """

    path: str
    number: int

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


def checkpoint_name(step: int, attempt: str) -> str:
    """Unique to step *and* attempt: a directory reported twice would be merged, then deleted."""
    return f"checkpoint_{step:08d}_{attempt}"


def step_of(name: str) -> int:
    """The step that a checkpoint's directory is named after; -1 if it is not named like one."""
    match = _NAME.fullmatch(name)
    return -1 if match is None else int(match[1])


def saved_by(name: str) -> str | None:
    """The attempt that a checkpoint in a run of Ray's is named after; None: it is not named so.

    Automatic names, `checkpoint_<n>`, are those of runs without Ray.
    """
    match = _IN_A_RUN.fullmatch(name)
    return None if match is None else match[1]


def candidates(
    filesystem: Readable, directory: str, *, timeout: float = READ_TIMEOUT
) -> list[Candidate]:
    """Directories under `directory` named like checkpoints, the highest number first."""
    entries = listed(filesystem, directory, timeout=timeout)
    found = []
    for entry in entries:
        match = _NAME.fullmatch(entry.name)
        if match is not None and entry.nbytes is None:
            found.append(Candidate(path=f"{directory}/{entry.name}", number=int(match[1])))
    return sorted(found, key=lambda c: (c.number, c.name), reverse=True)


def inherited(filesystem: Readable, directory: str, *, timeout: float = READ_TIMEOUT) -> list[str]:
    """Paths that a run in `directory` begins from, the best first; empty for most runs.

    The checkpoint that the run's origin names, and then, should that one be gone,
    the others of its run, the highest number first.

    Raises:
        CorruptCheckpointError: the run has an origin and it is damaged.
    """
    origin = read_reference(filesystem, directory, ORIGIN, timeout=timeout)
    if origin is None:
        return []
    run = origin.rpartition("/")[0]
    others = [c.path for c in candidates(filesystem, run, timeout=timeout)]
    return [origin, *(path for path in others if path != origin)]


def open_snapshot(filesystem: Readable, path: str, *, timeout: float = READ_TIMEOUT) -> Snapshot:
    """Read all manifests of the checkpoint at `path` and check it for wholeness.

    If a reference lies there, the checkpoint that it names is opened.

    The shards' lengths are compared, their bytes are not yet proved.

    Raises:
        NotACheckpointError: nothing of ours is there, or not all of one save.
        CorruptCheckpointError: a manifest is damaged, a shard missing or cut off.
        FormatVersionError: it is of a newer format.
        StorageError: it could not be read.
    """
    sizes = _sizes(filesystem, path, timeout)
    if REFERENCE in sizes and not _manifests(sizes):
        reference, path = path, read_reference(filesystem, path, timeout=timeout) or path
        sizes = _sizes(filesystem, path, timeout)
        if not sizes:
            raise NotACheckpointError(
                "the checkpoint that a reference names is gone",
                where=path,
                why=f"{reference} stands for it; num_to_keep of its run may have removed it",
                remedy="use a newer checkpoint, or keep more of them",
            )
    if not _manifests(sizes):
        why = "the directory is absent, empty, holds something else, or the save was cut off"
        raise NotACheckpointError(
            "not a checkpoint of this library: no manifest there",
            where=path,
            why="it is a file" if not sizes and is_file(filesystem, path) else why,
            remedy=_elsewhere(filesystem, path, sizes, timeout)
            or "give the directory that holds manifest-*.json",
        )
    world_size = _world_size(sizes, path)
    missing = [r for r in range(world_size) if manifest_name(r, world_size) not in sizes]
    if missing:
        raise NotACheckpointError(
            f"the checkpoint is not whole: {len(missing)} of {world_size} manifests are missing",
            where=f"{path}/{manifest_name(missing[0], world_size)}",
            why="the save was cut off, or the file was removed",
            remedy="use another checkpoint",
        )
    found = []
    for rank in range(world_size):
        name = manifest_name(rank, world_size)
        manifest = read_manifest(filesystem, f"{path}/{name}", sizes[name], timeout=timeout)
        if (manifest.rank, manifest.world_size) != (rank, world_size):
            raise CorruptCheckpointError(
                "a manifest lies under another rank's name",
                where=f"{path}/{name}",
                why=f"it is rank {manifest.rank}'s of {manifest.world_size}",
                remedy="use another checkpoint",
            )
        for shard, _ in manifest.files:
            if sizes.get(shard.file) != shard.nbytes:
                has = f"has {sizes[shard.file]} bytes" if shard.file in sizes else "is missing"
                raise CorruptCheckpointError(
                    "a shard is not there in full",
                    where=f"{path}/{shard.file}",
                    why=f"it {has}; its manifest states {shard.nbytes}",
                    remedy="use another checkpoint",
                )
        found.append(manifest)
    return Snapshot(found, path)


def read_manifest(
    filesystem: Readable, path: str, nbytes: int | None, *, timeout: float = READ_TIMEOUT
) -> Manifest:
    """Read and validate one manifest of `nbytes`, as listed.

    See `image.manifest.decode` for what it raises.
    """
    if nbytes is None or not 0 < nbytes <= manifests.MAX_NBYTES:
        is_file = nbytes is not None
        raise CorruptCheckpointError(
            "a manifest is empty or too long" if is_file else "a manifest is a directory",
            where=path,
            why=f"it has {nbytes} bytes, the limit is {manifests.MAX_NBYTES}" if is_file else "",
            remedy="use another checkpoint",
        )
    try:
        data = read_file(filesystem, path, nbytes, what="read a manifest", timeout=timeout)
    except (FileNotFoundError, EOFError) as e:
        raise NotACheckpointError(
            "a manifest is gone", where=path, why=str(e), remedy="use another checkpoint"
        ) from e
    return manifests.decode(data, path)


class ShardFetch:
    """Reads ranges of a checkpoint's shards; the `Fetch` of `image.reader`."""

    def __init__(
        self, filesystem: Readable, snapshot: Snapshot, *, timeout: float = READ_TIMEOUT
    ) -> None:
        self._filesystem = filesystem
        self._snapshot = snapshot
        self._timeout = timeout

    def path(self, shard: int) -> str:
        return f"{self._snapshot.where}/{self._snapshot.shards[shard].file}"

    def __call__(self, shard: int, offset: int, into: memoryview) -> None:
        _read_range(self._filesystem, self.path(shard), offset, into, self._timeout)

    def staged(
        self,
        shard: int,
        pieces: Iterable[Piece],
        places: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> Staged:
        """A plan for reading pieces of one shard."""
        return Staged(shard, pieces, block=self._snapshot.shards[shard].block, places=places)

    def piece(self, shard: int, piece: Piece) -> torch.Tensor:
        """Read and prove some rows, with the blocks they lie in and nothing else."""
        staged = self.staged(shard, [piece])
        buffer = torch.empty(staged.nbytes, dtype=torch.uint8, device="cpu")
        staged.read(self, buffer, where=self.path(shard))
        return staged.rows(piece)

    def verify_header(self, shard: int) -> None:
        """Prove the shard's own header, which other tools read it by."""
        info = self._snapshot.shards[shard]
        _prove_header(self._filesystem, self.path(shard), info, self._timeout)

    def prove(self, shard: int) -> None:
        """Read and prove every byte of one shard."""
        info, slices = self._snapshot.shards[shard], self._snapshot.slices(shard)
        prove_file(self._filesystem, self.path(shard), info, slices, timeout=self._timeout)


def prove_file(
    filesystem: Readable,
    path: str,
    shard: ShardInfo,
    slices: Iterable[SliceInfo],
    *,
    timeout: float = READ_TIMEOUT,
) -> None:
    """Read and prove every byte of a file of tensors, keeping little of it in memory.

    Raises:
        CorruptCheckpointError: it is not what a manifest says of it.
        StorageError: it could not be read.
    """

    def fetch(shard: int, offset: int, into: memoryview) -> None:
        del shard  # there is but one
        _read_range(filesystem, path, offset, into, timeout)

    _prove_header(filesystem, path, shard, timeout)
    Staged(0, map(Piece.whole, slices), block=shard.block).prove(fetch, where=path)


def _prove_header(filesystem: Readable, path: str, shard: ShardInfo, timeout: float) -> None:
    data = bytearray(shard.header_nbytes)
    _read_range(filesystem, path, 0, memoryview(data), timeout)
    if xxhash.xxh3_128_hexdigest(data) != shard.header_checksum:
        raise CorruptCheckpointError(
            "the header of a shard is not the one that was written",
            where=f"{path}, bytes 0 to {shard.header_nbytes}",
            why="its checksum does not match",
            remedy="use an older checkpoint",
        )


def _read_range(
    filesystem: Readable, path: str, offset: int, into: memoryview, timeout: float
) -> None:
    try:
        retried(
            lambda: filesystem.read_into(path, offset, into),
            what="read a shard",
            where=path,
            timeout=timeout,
        )
    except (FileNotFoundError, EOFError) as e:
        raise CorruptCheckpointError(
            "a shard is not there in full",
            where=path,
            why=str(e),
            remedy="use another checkpoint",
        ) from e


def _sizes(filesystem: Readable, path: str, timeout: float) -> dict[str, int | None]:
    entries = listed(filesystem, path, timeout=timeout)
    return {entry.name: entry.nbytes for entry in entries}


def _manifests(sizes: Iterable[str]) -> list[tuple[str, int, int]]:
    return [p for p in map(manifests.parse_name, sizes) if p is not None and p[0] == "manifest"]


def _world_size(sizes: dict[str, int | None], path: str) -> int:
    worlds = {world_size for _, _, world_size in _manifests(sizes)}
    if len(worlds) == 1:
        return worlds.pop()
    raise NotACheckpointError(
        "manifests of several saves lie in one directory",
        where=path,
        why=f"of {', '.join(map(str, sorted(worlds)))} ranks",
        remedy="use another checkpoint",
    )


def _elsewhere(
    filesystem: Readable, path: str, sizes: Mapping[str, int | None], timeout: float
) -> str:
    """Where checkpoints are instead, if it is the directory of a run or of a project."""
    if any(nbytes is None and step_of(name) >= 0 for name, nbytes in sizes.items()):
        return f"there are some in {path}: give one of them"
    below = f"{path}/checkpoints"
    if sizes.get("checkpoints", 0) is None and candidates(filesystem, below, timeout=timeout):
        return f"there are some in {below}: give one of them"
    return ""
