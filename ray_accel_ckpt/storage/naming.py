"""Automatic names, `<project_dir>/checkpoints/checkpoint_<n>`, and how many of them stay."""

from __future__ import annotations

import logging

from ray_accel_ckpt.errors import CheckpointError
from ray_accel_ckpt.image import manifest as manifests
from ray_accel_ckpt.storage.catalog import Candidate, candidates, open_snapshot
from ray_accel_ckpt.storage.filesystem import Filesystem

logger = logging.getLogger(__name__)


class AutomaticNames:
    """Numbers that go on from what exists. Nothing is ever overwritten."""

    def __init__(self, filesystem: Filesystem, directory: str, *, at_least: int) -> None:
        self._filesystem = filesystem
        self._directory = directory
        self._next = at_least

    def take(self) -> str:
        """The path of the next checkpoint: one more than the highest there ever was."""
        found = candidates(self._filesystem, self._directory)
        number = max([self._next, *(c.number + 1 for c in found)])
        self._next = number + 1
        return f"{self._directory}/checkpoint_{number}"


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
