"""Automatic names, `<project_dir>/checkpoints/checkpoint_<n>`, and how many of them stay."""

from __future__ import annotations

import logging

from ray_accel_ckpt.errors import CheckpointError, ConfigurationError, StorageError
from ray_accel_ckpt.image import manifest as manifests
from ray_accel_ckpt.storage.access import READ_TIMEOUT, listed
from ray_accel_ckpt.storage.catalog import Candidate, candidates, open_snapshot
from ray_accel_ckpt.storage.filesystem import Claim, Filesystem
from ray_accel_ckpt.storage.retry import retried

logger = logging.getLogger(__name__)


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
            self._delete(path)
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

    def _delete(self, path: str) -> None:
        what, timeout = "remove a directory", READ_TIMEOUT
        retried(lambda: self._filesystem.delete(path), what=what, where=path, timeout=timeout)

    def _claim(self, path: str) -> Claim:
        what = "make a directory"
        try:
            return retried(
                lambda: self._filesystem.claim(path), what=what, where=path, timeout=READ_TIMEOUT
            )
        except FileNotFoundError as e:
            raise StorageError(
                f"could not {what}",
                where=path,
                why=f"{type(e).__name__}: {e}",
                remedy="make the bucket or the mount that the path begins with; neither is created",
            ) from e


def prune(filesystem: Filesystem, directory: str, *, keep: int, newest: str) -> None:
    """Once `newest` is whole, remove the oldest checkpoints beyond `keep`.

    Directories of saves that never became whole go too if they are older than
    `newest`. A directory that holds no file of ours is the user's and stays.
    """
    if not _whole(filesystem, newest):
        return
    found = candidates(filesystem, directory)
    known = next((c for c in found if c.path == newest), None)
    if known is None:
        return
    kept = 0
    for candidate in found:
        if candidate.number > known.number:
            continue
        whole = _whole(filesystem, candidate.path)
        if whole and kept < keep:
            kept += 1
        elif whole or _ours(filesystem, candidate):
            logger.info("removing %s: the limit is %d checkpoints", candidate.path, keep)
            filesystem.delete(candidate.path)


def _whole(filesystem: Filesystem, path: str) -> bool:
    try:
        open_snapshot(filesystem, path)
    except CheckpointError:
        return False
    return True


def _ours(filesystem: Filesystem, candidate: Candidate) -> bool:
    return any(manifests.parse_name(e.name) for e in filesystem.list(candidate.path))
