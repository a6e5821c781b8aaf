"""Remove what earlier attempts left in a run's directory and nobody will use.

Ray never looks at what it has not registered: a save cut off by a kill, or one
that became whole and was never registered, lies there for ever.

What is removed must be what Ray will never touch. Ray deletes a checkpoint in two
steps, out of its record first, then from storage; if somebody else removes the
directory in between, the run ends with an error that nothing retries. So a whole
checkpoint is removed only if Ray did not name it when the attempt began, before
anything was registered in it, and only at a later look. One that is not whole was
never registered, and can go at once.

Workers of an earlier attempt on a node that is cut off may live and write for some
time. A directory removed under their hands they only make anew; it is not whole,
unless all of them wrote all of it, and it goes at a later look or in the next attempt.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ray_accel_ckpt.errors import (
    AccelCkptError,
    CheckpointError,
    CorruptCheckpointError,
    FormatVersionError,
    NotACheckpointError,
    StorageError,
)
from ray_accel_ckpt.runtime.ray_run import RayRun
from ray_accel_ckpt.runtime.record import Record, read_record
from ray_accel_ckpt.storage.access import READ_TIMEOUT, listed
from ray_accel_ckpt.storage.catalog import Candidate, candidates, open_snapshot, saved_by
from ray_accel_ckpt.storage.filesystem import Filesystem, resolve
from ray_accel_ckpt.storage.leftovers import is_ours
from ray_accel_ckpt.storage.retry import retried

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Orphan:
    """A directory that Ray does not name and nobody will resume from."""

    path: str
    whole: bool

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def why(self) -> str:
        if self.whole:
            return "it was never registered, and a newer checkpoint is"
        return "it never became whole"


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a look into a run's directory found of what Ray does not name.

    Attributes:
        orphans: may be removed.
        adopted: whole, and newer than Ray's latest or resumed from: orphans later.
    """

    orphans: tuple[Orphan, ...] = ()
    adopted: tuple[str, ...] = ()


def look(
    filesystem: Filesystem,
    run: str,
    record: Record,
    *,
    living: Collection[str] = (),
    resumed_from: str | None = None,
) -> Found:
    """Which directories of the run are orphans by Ray's `record`. Nothing is changed.

    Never one that is not named as in a run of this library or holds a file that
    is not its own, never one that the record names, and never one of an attempt
    that lives: its saves may be under way, or not registered yet.

    Args:
        living: attempts that may still save.
        resumed_from: the path of what this attempt began with.

    Raises:
        StorageError: the storage cannot be read.
    """
    orphans, adopted = [], []
    for candidate in candidates(filesystem, run):
        attempt = saved_by(candidate.name)
        if attempt is None or attempt in living or candidate.name in record.names:
            continue
        if candidate.path == resumed_from and not _by(record.latest, living):
            adopted.append(candidate.name)
            continue
        if not all(is_ours(entry) for entry in listed(filesystem, candidate.path)):
            continue
        whole = _whole(filesystem, candidate)
        if whole and candidate.number > record.step:
            adopted.append(candidate.name)
        elif whole is not None:
            orphans.append(Orphan(path=candidate.path, whole=whole))
    return Found(orphans=tuple(orphans), adopted=tuple(adopted))


def remove(filesystem: Filesystem, orphan: Orphan) -> None:
    """Remove a directory. Cut off anywhere, what is left is no checkpoint: manifests go first.

    Raises:
        StorageError: what storage refused.
    """
    files = [e.name for e in listed(filesystem, orphan.path) if e.nbytes is not None]
    # One by one: where directories are only made of names, none may be there to be deleted.
    for name in sorted(files, key=lambda name: (not name.startswith("manifest-"), name)):
        _delete(filesystem, f"{orphan.path}/{name}")
    _delete(filesystem, orphan.path)


def sweep_run(
    storage_path: str | os.PathLike[str],
    name: str,
    *,
    storage_filesystem: Any = None,
    dry_run: bool = False,
) -> tuple[Orphan, ...]:
    """Remove the orphans of the run (storage_path, name). Do not call it while the run is going.

    Nothing is removed while Ray's record is torn; see `heal_run`. What is whole
    and newer than Ray's latest stays: a new driver adopts it. If Ray's latest is not
    good itself, all that is whole stays.

    Args:
        dry_run: only say what would be removed.

    Returns:
        What was removed.

    Raises:
        StorageError: the storage cannot be read, or refused to remove.
    """
    filesystem, root = resolve(storage_path, storage_filesystem)
    run = f"{root}/{name}"
    record = read_record(filesystem, run)
    if record is None:
        logger.warning("%s: nothing is swept, Ray's record of the run is torn", run)
        return ()
    orphans = orphans_of(filesystem, run, record)
    if not dry_run:
        for orphan in orphans:
            remove(filesystem, orphan)
    return orphans


def orphans_of(filesystem: Filesystem, run: str, record: Record) -> tuple[Orphan, ...]:
    """What `sweep_run` removes of a run that is not going.

    Raises:
        StorageError: the storage cannot be read.
    """
    orphans = look(filesystem, run, record).orphans
    if _stands(filesystem, run, record):
        return orphans
    return tuple(orphan for orphan in orphans if not orphan.whole)


class Sweeper:
    """Sweeps a run beside its training. Rank 0's; one for each attempt.

    Args:
        living: the attempts that may still save, this one among them.
        resumed_from: the path of what this attempt began with.
        registered: the name of Ray's latest checkpoint when the attempt began.
    """

    def __init__(
        self,
        run: RayRun,
        *,
        living: Collection[str],
        resumed_from: str | None,
        registered: str | None,
    ) -> None:
        self._run = run
        self._living = living
        self._resumed_from = resumed_from
        self._registered = registered
        self._looking = threading.Lock()
        self._unnamed: set[str] | None = None
        self._clean = False

    def start(self) -> None:
        """Look in the background, unless nothing is left or a look is under way.

        Returns at once and raises nothing. What fails is logged and tried again next time.
        """
        if self._clean or not self._looking.acquire(blocking=False):
            return
        try:
            threading.Thread(target=self._look, name="ray_accel_ckpt-sweeper", daemon=True).start()
        except RuntimeError as e:  # no more threads: no reason for a save to fail
            self._looking.release()
            logger.warning("%s could not be swept, it will be tried again: %s", self._run.path, e)

    def _look(self) -> None:
        try:
            self._sweep()
        except (AccelCkptError, OSError, EOFError) as e:
            logger.warning("%s could not be swept, it will be tried again: %s", self._run.path, e)
        finally:
            self._looking.release()

    def _sweep(self) -> None:
        filesystem, run = self._run.filesystem, self._run.path
        record = read_record(filesystem, run)
        if record is None or (self._registered is not None and record.latest is None):
            return
        found = look(filesystem, run, record, living=self._living, resumed_from=self._resumed_from)
        whole = {orphan.name for orphan in found.orphans if orphan.whole}
        first = self._unnamed is None
        if self._unnamed is None:
            # If Ray has registered something since, it may be about to delete what it took out.
            before = record.latest == self._registered and not _by(record.latest, self._living)
            self._unnamed = whole.union(found.adopted) if before else set()
        removed = [
            orphan
            for orphan in found.orphans
            if not orphan.whole or (not first and orphan.name in self._unnamed)
        ]
        for orphan in removed:
            self._remove(filesystem, orphan)
        waiting = self._unnamed & whole.union(found.adopted)
        # A directory may come back, by a worker that was thought dead: so not after the first look.
        self._clean = not first and not removed and not waiting

    def _remove(self, filesystem: Filesystem, orphan: Orphan) -> None:
        logger.info("removing %s: %s", orphan.path, orphan.why)
        try:
            remove(filesystem, orphan)
        except (StorageError, OSError) as e:
            # The others go all the same.
            logger.warning("%s was not removed, it will be tried again: %s", orphan.path, e)


def _stands(filesystem: Filesystem, run: str, record: Record) -> bool:
    """Whether Ray's latest can be resumed from, as far as can be told without reading it all."""
    if record.latest is None:
        return False
    try:
        open_snapshot(filesystem, f"{run}/{record.latest}")
    except CheckpointError as e:
        logger.warning("what is whole is not swept: %s", e)
        return False
    return True


def _whole(filesystem: Filesystem, candidate: Candidate) -> bool | None:
    """Whether it was a checkpoint ever; None if that cannot be told."""
    try:
        open_snapshot(filesystem, candidate.path)
    except NotACheckpointError:
        return False
    except CorruptCheckpointError:
        # Damaged, but Ray may have registered it before: as careful as with a good one.
        return True
    except FormatVersionError as e:
        logger.info("left where it is: %s", e)
        return None
    return True


def _by(name: str | None, attempts: Collection[str]) -> bool:
    """Whether one of these attempts saved the checkpoint."""
    return name is not None and saved_by(name) in attempts


def _delete(filesystem: Filesystem, path: str) -> None:
    retried(lambda: filesystem.delete(path), what="sweep a run", where=path, timeout=READ_TIMEOUT)
