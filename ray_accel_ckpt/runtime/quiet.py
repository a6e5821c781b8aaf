"""Sweeping a run from outside, which may be going without our knowing it.

Whoever trains writes: shards and manifests, its journal while it makes steps, and, before
it deletes anything, Ray its record. So a run to which nothing has been written for some
time is not going, or will do nothing to a checkpoint at this moment.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from ray_accel_ckpt.errors import ConfigurationError, CorruptCheckpointError
from ray_accel_ckpt.runtime.listing import require_run_of_ray
from ray_accel_ckpt.runtime.record import SNAPSHOT, read_record
from ray_accel_ckpt.runtime.sweep import Orphan, orphans_of, remove
from ray_accel_ckpt.storage.access import listed
from ray_accel_ckpt.storage.catalog import candidates
from ray_accel_ckpt.storage.filesystem import Filesystem
from ray_accel_ckpt.storage.journal import beside


@dataclass(frozen=True, kw_only=True)
class SweptDirectory:
    """A directory that nobody will use.

    Attributes:
        why: it may go.
        nbytes: of its files. What other checkpoints share is not freed with it.
    """

    name: str
    path: str
    why: str
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What was removed, or would be."""

    run: str
    dry_run: bool
    directories: tuple[SweptDirectory, ...]


def sweep_quiet_run(
    filesystem: Filesystem, run: str, *, quiet_for: float, dry_run: bool = False
) -> Swept:
    """What `sweep_run` does, for a run to which nothing was written lately.

    Args:
        run: its directory.
        quiet_for: seconds since the last write; 0 to sweep whatever was written when.
        dry_run: only say what would be removed.

    Raises:
        ConfigurationError: something was written since, or the storage does not tell when.
        CorruptCheckpointError: Ray's record of the run is torn.
        NotACheckpointError: it is no run's directory.
        StorageError: the storage cannot be read, or refused to remove. What was removed
            before stays removed.
    """
    require_run_of_ray(filesystem, run)
    if quiet_for:
        _require_quiet(filesystem, run, quiet_for)
    record = read_record(filesystem, run)
    if record is None:
        raise CorruptCheckpointError(
            "Ray's record of the run is torn",
            where=f"{run}/{SNAPSHOT}",
            why="which checkpoints Ray uses is not known",
            remedy="mend it first: ray-accel-ckpt heal, or heal_run",
        )
    orphans = orphans_of(filesystem, run, record)
    directories = tuple(_described(filesystem, orphan) for orphan in orphans)
    if not dry_run:
        for orphan in orphans:
            remove(filesystem, orphan)
    return Swept(run=run, dry_run=dry_run, directories=directories)


def _require_quiet(filesystem: Filesystem, run: str, quiet_for: float) -> None:
    since = time.time() - quiet_for
    for directory in (run, beside(run), *(each.path for each in candidates(filesystem, run))):
        for entry in listed(filesystem, directory):
            if entry.nbytes is None or (entry.modified is not None and entry.modified <= since):
                continue
            told = entry.modified is not None
            raise ConfigurationError(
                "the run may be going: nothing is swept",
                where=f"{directory}/{entry.name}",
                why=f"it was written less than {quiet_for:g} s ago"
                if told
                else "when it was written is not known to the storage",
                remedy="sweep when the run has ended; quiet_for (--older-than) says how long "
                "nothing must have been written: 0s if you know that it has",
            )


def _described(filesystem: Filesystem, orphan: Orphan) -> SweptDirectory:
    nbytes = sum(entry.nbytes or 0 for entry in listed(filesystem, orphan.path))
    return SweptDirectory(name=orphan.name, path=orphan.path, why=orphan.why, nbytes=nbytes)
