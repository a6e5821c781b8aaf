"""What the checkpoints of a run are like, good or not, as far as listings and manifests tell."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ray_accel_ckpt.errors import (
    CheckpointError,
    CorruptCheckpointError,
    FormatVersionError,
    NotACheckpointError,
)
from ray_accel_ckpt.image import manifest as manifests
from ray_accel_ckpt.image.threads import for_each
from ray_accel_ckpt.storage.access import is_file, listed
from ray_accel_ckpt.storage.catalog import Candidate, candidates, open_snapshot
from ray_accel_ckpt.storage.filesystem import Entry, Readable
from ray_accel_ckpt.storage.reference import REFERENCE


class Condition(StrEnum):
    GOOD = "good"
    NOT_WHOLE = "not whole"
    """Never written to its end, or something of it was removed; or nothing of this library."""
    DAMAGED = "damaged"
    NEWER = "newer format"
    GONE = "gone"
    """Somebody has a record of it, and it is not there."""


@dataclass(frozen=True, kw_only=True)
class Surveyed:
    """One directory that is named like a checkpoint.

    What only a manifest tells is None if the checkpoint is not good.

    Attributes:
        saved_at: seconds since the epoch.
        nbytes: of all its files. What several checkpoints share counts in each.
        world_size: how many workers saved it.
        why: what is wrong with it, "" if it is good.
        stands_for: the path of the checkpoint that lies elsewhere, if only a reference lies here.
    """

    name: str
    path: str
    step: int | None = None
    epoch: int | None = None
    saved_at: float | None = None
    nbytes: int = 0
    world_size: int | None = None
    condition: Condition
    why: str = ""
    stands_for: str | None = None


def survey(filesystem: Readable, run: str) -> tuple[Surveyed, ...]:
    """Look at every checkpoint of a run, the newest first. Tensors are not read.

    Raises:
        StorageError: the storage cannot be read.
    """
    found = candidates(filesystem, run)
    seen: dict[str, Surveyed] = {}

    def look(candidate: Candidate) -> None:
        seen[candidate.path] = _surveyed(filesystem, candidate)

    for_each(look, found)
    return tuple(seen[candidate.path] for candidate in found)


def checkpoints_at(filesystem: Readable, path: str) -> tuple[str, ...]:
    """The path itself if a checkpoint is there, or those of the checkpoints of the run there.

    Good or not; of a run the newest first.

    Raises:
        NotACheckpointError: neither is there.
        StorageError: the storage cannot be read.
    """
    if any(map(_ours, listed(filesystem, path))):
        return (path,)
    return tuple(each.path for each in candidates(filesystem, require_run(filesystem, path)))


def require_run(filesystem: Readable, path: str) -> str:
    """`path`, if directories in it are named like checkpoints.

    Raises:
        NotACheckpointError: none is.
        StorageError: the storage cannot be read.
    """
    if candidates(filesystem, path):
        return path
    entries = listed(filesystem, path)
    remedy = "give the directory that holds checkpoint_*: Ray's <storage_path>/<name>"
    if any(map(_ours, entries)):
        remedy = "this is a checkpoint itself: give the directory that it is in"
    elif candidates(filesystem, f"{path}/checkpoints"):
        remedy = f"there are some in {path}/checkpoints"
    why = "it is a file" if is_file(filesystem, path) else "it is empty, or absent"
    raise NotACheckpointError(
        "no checkpoints there",
        where=path,
        why=f"it holds {len(entries)} other things" if entries else why,
        remedy=remedy,
    )


def condition_of(error: CheckpointError) -> Condition:
    """What a checkpoint that cannot be opened or proved is like."""
    if isinstance(error, FormatVersionError):
        return Condition.NEWER
    if isinstance(error, CorruptCheckpointError):
        return Condition.DAMAGED
    return Condition.NOT_WHOLE


def _surveyed(filesystem: Readable, candidate: Candidate) -> Surveyed:
    name, path = candidate.name, candidate.path
    try:
        snapshot = open_snapshot(filesystem, path)
    except CheckpointError as e:
        why = ": ".join(each for each in (e.what, e.why) if each)
        return Surveyed(
            name=name,
            path=path,
            nbytes=_nbytes(listed(filesystem, path)),
            condition=condition_of(e),
            why=why,
        )
    first = snapshot.manifests[0]
    return Surveyed(
        name=name,
        path=path,
        step=snapshot.step,
        epoch=first.epoch,
        saved_at=max(each.saved_at for each in snapshot.manifests),
        nbytes=_nbytes(listed(filesystem, snapshot.where)),
        world_size=snapshot.world_size,
        condition=Condition.GOOD,
        stands_for=snapshot.where if snapshot.where != path else None,
    )


def _nbytes(entries: list[Entry]) -> int:
    return sum(entry.nbytes or 0 for entry in entries)


def _ours(entry: Entry) -> bool:
    return entry.name == REFERENCE or manifests.parse_name(entry.name) is not None
