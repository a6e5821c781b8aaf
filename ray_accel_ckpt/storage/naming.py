"""Automatic names, `<project_dir>/checkpoints/checkpoint_<n>`, and how many of them stay."""

from __future__ import annotations

import logging

from ray_accel_ckpt.errors import CheckpointError, ConfigurationError
from ray_accel_ckpt.image.reader import Snapshot
from ray_accel_ckpt.storage.access import READ_TIMEOUT, listed
from ray_accel_ckpt.storage.catalog import candidates, open_snapshot
from ray_accel_ckpt.storage.filesystem import Claim, Filesystem
from ray_accel_ckpt.storage.leftovers import is_ours
from ray_accel_ckpt.storage.retry import making, retried
from ray_accel_ckpt.storage.survey import Condition, condition_of

logger = logging.getLogger(__name__)

_PRUNE_TIMEOUT = 30.0
"""Seconds that passing errors of removing are retried for: the next save waits meanwhile."""


class AutomaticNames:
    """Numbers that go on from what exists. Nothing is ever overwritten.

    The directory is listed at first, and again when somebody else is found to save
    there too; else the numbers are counted here.
    """

    def __init__(self, filesystem: Filesystem, directory: str, *, at_least: int) -> None:
        self._filesystem = filesystem
        self._directory = directory
        self._next = at_least
        self._listed = False

    def take(self) -> tuple[str, bool]:
        """The path of the next checkpoint, which nobody else is given: see `Filesystem.claim`.

        Returns:
            It, and whether a directory was made there.

        Raises:
            StorageError: the storage cannot be read, or refused to make a directory.
        """
        if not self._listed:
            self._go_on()
        while True:
            path = f"{self._directory}/checkpoint_{self._next}"
            self._next += 1
            claim = self._claim(path)
            if claim is not Claim.TAKEN:
                return path, claim is Claim.MADE
            self._go_on()

    def require_shared(self, path: str) -> None:
        """Raise `ConfigurationError` if a directory that rank 0 has made is not there for this one.

        It is made rather than looked for: network filesystems remember for seconds what was
        absent, and whoever can make it anew has another disk. So has whoever finds files in it:
        to be called before anybody writes there.

        Raises:
            StorageError: the storage refused.
        """
        if self._claim(path) is Claim.MADE:
            _delete(self._filesystem, path)
        elif not listed(self._filesystem, path):
            return
        raise ConfigurationError(
            "project_dir is not shared by all ranks",
            where=path,
            why="rank 0 has just made this directory, and here it is another one, or none: no "
            "checkpoint would ever be whole",
            remedy="put project_dir where every node sees the same: on a network filesystem, or "
            "in a bucket (s3://, gs://)",
        )

    def _go_on(self) -> None:
        found = candidates(self._filesystem, self._directory)
        self._next = max([self._next, *(c.number + 1 for c in found)])
        self._listed = True

    def _claim(self, path: str) -> Claim:
        what = "make a directory"
        return making(
            lambda: self._filesystem.claim(path), what=what, where=path, timeout=READ_TIMEOUT
        )


def newest_whole(filesystem: Filesystem, directory: str) -> Snapshot | None:
    """The checkpoint with the highest number of those that are whole; None if none is.

    Raises:
        StorageError: the storage cannot be read.
    """
    for candidate in candidates(filesystem, directory):
        try:
            return open_snapshot(filesystem, candidate.path)
        except CheckpointError:
            continue
    return None


def prune(filesystem: Filesystem, directory: str, *, keep: int, newest: str) -> None:
    """Once `newest` is whole, remove the oldest checkpoints beyond `keep`.

    Only whole ones count. Of what is older than `newest`, directories of saves that never
    became whole go too, empty ones among them; one that holds no file of ours is the user's
    and stays. Damaged ones go with those beyond `keep`. What a newer version of this library
    wrote stays.

    What storage refuses is logged and tried again by the next save: `newest` is durable.
    """
    try:
        if _condition(filesystem, newest) is not Condition.GOOD:
            return
        found = candidates(filesystem, directory, timeout=_PRUNE_TIMEOUT)
        last = next((c.number for c in found if c.path == newest), -1)
        kept = 0
        for candidate in found:
            if candidate.number > last:
                continue
            condition = _condition(filesystem, candidate.path)
            if condition is Condition.GOOD and kept < keep:
                kept += 1
            elif condition is Condition.NOT_WHOLE:
                _remove(filesystem, candidate.path, "it never became whole")
            elif condition in (Condition.GOOD, Condition.DAMAGED) and kept == keep:
                _remove(filesystem, candidate.path, f"the limit is {keep} checkpoints")
    except OSError as e:
        logger.warning("%s: old checkpoints are removed by a later save: %s", directory, e)


def _condition(filesystem: Filesystem, path: str) -> Condition:
    try:
        open_snapshot(filesystem, path, timeout=_PRUNE_TIMEOUT)
    except CheckpointError as e:
        return condition_of(e)
    return Condition.GOOD


def _remove(filesystem: Filesystem, path: str, why: str) -> None:
    """Remove a directory, unless nothing in it is ours. Without a manifest it is no checkpoint:
    one goes first."""
    try:
        entries = listed(filesystem, path, timeout=_PRUNE_TIMEOUT)
        if entries and not any(map(is_ours, entries)):
            return
        logger.info("removing %s: %s", path, why)
        manifest = [e.name for e in entries if e.name.startswith("manifest-")][:1]
        for each in (*(f"{path}/{name}" for name in manifest), path):
            _delete(filesystem, each, timeout=_PRUNE_TIMEOUT)
    except OSError as e:
        # The others go all the same.
        logger.warning("%s was not removed, a later save tries again: %s", path, e)


def _delete(filesystem: Filesystem, path: str, *, timeout: float = READ_TIMEOUT) -> None:
    retried(lambda: filesystem.delete(path), what="remove", where=path, timeout=timeout)
