"""The snapshots in the memory of one node: directories of checkpoint files in tmpfs.

    <root>/slots/...                      the workers' buffers, see `image.shared`
    <root>/own/<rank>/<checkpoint>/       published by the worker of that rank on this node
    <root>/replicas/<rank>/<checkpoint>/  copies of what another node has

The files are those of a checkpoint in storage, and the manifest of a rank is there
only if its other files are. Nothing else says what is kept, so nothing can be wrong
about it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_accel_ckpt.errors import CorruptCheckpointError, NotACheckpointError
from ray_accel_ckpt.image.manifest import parse_name
from ray_accel_ckpt.image.shared import remove_checkpoint

PREFIX = "ray_accel_ckpt-"
"""What the names of all roots begin with."""

LOCK = "lock"
"""A file that a root's keeper has locked."""

KEPT = 2
"""Snapshots of a rank that are kept: whole ones, while the next is becoming so."""

Files = Mapping[str, tuple[int, int]]
"""By name of a file: its length in bytes, and when it was written, in ns, by its own node."""


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """The directory of one node and one run."""

    root: Path
    _receiving: defaultdict[int, threading.Lock] = field(
        default_factory=lambda: defaultdict(threading.Lock), repr=False
    )

    def make(self) -> int:
        """Make the directory, for nobody else to read. What was there is removed, and so is
        what others like it have left whose keepers are gone.

        Returns:
            A descriptor. As long as it is open, the directory has a keeper.
        """
        self.clear()
        for other in self.root.parent.glob(f"{PREFIX}*"):
            if _forsaken(other):
                shutil.rmtree(other, ignore_errors=True)
        self.root.mkdir(mode=0o700, parents=True)
        # Under its name only when it is locked: what is there and not locked is forsaken.
        lock = self.root / ".lock"
        descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for name in ("slots", "own", "replicas"):
            (self.root / name).mkdir()
        lock.rename(self.root / LOCK)
        return descriptor

    def slot(self, attempt: str, rank: int, number: int) -> Path:
        """Where a worker has a buffer."""
        return self.root / "slots" / f"{attempt}-{rank:05d}-{number}"

    def own(self, rank: int, name: str) -> Path:
        """Where a worker publishes a snapshot."""
        return self.root / "own" / f"{rank:05d}" / name

    def snapshots(self) -> dict[str, dict[str, tuple[int, int]]]:
        """By name of a snapshot, the files of those ranks that are here whole."""
        found: dict[str, dict[str, tuple[int, int]]] = {}
        for kind in ("own", "replicas"):
            for directory in (self.root / kind).glob("*/[!.]*"):
                found.setdefault(directory.name, {}).update(_whole(directory))
        return {name: files for name, files in found.items() if files}

    def path(self, name: str, file: str) -> Path | None:
        """Where a file of a snapshot is, if it is here."""
        parsed = parse_name(file)
        if parsed is None:
            return None
        rank = parsed[1]
        paths = (self.own(rank, name) / file, self._replica(rank, name) / file)
        return next((path for path in paths if path.exists()), None)

    def files_of(self, rank: int, name: str) -> dict[str, tuple[int, int]]:
        """What this node's own worker published of a snapshot; nothing if it is gone by now."""
        return _whole(self.own(rank, name))

    def receive(
        self,
        rank: int,
        name: str,
        files: Files,
        fetch: Callable[[str, int], Iterable[Any]],
        *,
        stays: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Make a replica of a rank's part of a snapshot. `KEPT` older ones stay.

        Args:
            files: those of the snapshot; none if it is gone by now.
            fetch: the bytes of a file of a length, in order.
            stays: whether one of a name has to stay all the same.

        Raises:
            NotACheckpointError: there is nothing to make it of.
            CorruptCheckpointError: other bytes came than were to come.
        """
        if not files:
            raise NotACheckpointError("a snapshot is gone before it was replicated", where=name)
        directory = self._replica(rank, name)
        with self._receiving[rank]:
            if _whole(directory):
                return
            older = [each for each in _oldest_first(directory.parent) if not stays(each.name)]
            made = directory.with_name(f".{name}")
            shutil.rmtree(made, ignore_errors=True)
            if len(older) > KEPT:
                # Memory that was touched before: fresh memory is slow.
                _turn(older.pop(0), made, files)
            try:
                made.mkdir(parents=True, exist_ok=True)
                for file in sorted(files, key=lambda file: file.startswith("manifest-")):
                    before = older[-1] / file if older else None
                    if not _linked(made / file, before, files[file]):
                        _fill(made / file, files[file], fetch(file, files[file][0]))
                made.rename(directory)
            except BaseException:
                shutil.rmtree(made, ignore_errors=True)
                raise

    def keep(self, wanted: Callable[[str], bool], lives: Callable[[str], bool]) -> None:
        """Remove snapshots whose names are not wanted, and buffers of attempts that do not live.

        Both are asked at the moment.
        """
        for kind in ("own", "replicas"):
            for directory in (self.root / kind).glob("*/*"):
                if not wanted(directory.name.lstrip(".")):
                    remove_checkpoint(directory)
        for path in (self.root / "slots").glob("*"):
            if not lives(path.name.partition("-")[0]):
                path.unlink(missing_ok=True)

    def is_there(self) -> bool:
        """Whether its keeper has not removed it."""
        return (self.root / LOCK).exists()

    def taken(self, attempt: str) -> int:
        """Bytes of memory that the buffers of an attempt have by now."""
        sizes = []
        for path in (self.root / "slots").glob(f"{attempt}-*"):
            with contextlib.suppress(FileNotFoundError):
                sizes.append(path.stat().st_blocks * 512)
        return sum(sizes)

    def clear(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.root, ignore_errors=True)

    def _replica(self, rank: int, name: str) -> Path:
        return self.root / "replicas" / f"{rank:05d}" / name


def _forsaken(root: Path) -> bool:
    """Whether a directory of ours has no keeper any more: its Ray ended, and nobody cleared it."""
    try:
        descriptor = os.open(root / LOCK, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        # Another user's, or one that is being made.
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _whole(directory: Path) -> dict[str, tuple[int, int]]:
    """The files of a directory; none if there is no manifest."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for path in directory.iterdir():
            if parse_name(path.name) is not None:
                status = path.stat()
                found[path.name] = (status.st_size, status.st_mtime_ns)
        if any(name.startswith("manifest-") for name in found):
            return found
    return {}


def _oldest_first(parent: Path) -> list[Path]:
    """Replicas that are whole, in the order they came."""
    found = [(path.stat().st_ctime_ns, path) for path in parent.glob("[!.]*/manifest-*")]
    return [path.parent for _, path in sorted(found)]


def _turn(old: Path, made: Path, files: Files) -> None:
    """Turn an old replica into the beginnings of one that is being made."""
    for path in sorted(old.iterdir(), key=lambda path: not path.name.startswith("manifest-")):
        # What is frozen may be a link, which others have too: never written again.
        if not path.name.startswith("shard-") or path.name not in files:
            path.unlink()
    old.rename(made)


def _linked(path: Path, before: Path | None, file: tuple[int, int]) -> bool:
    """Whether `path` is the file of the replica before, which does not change."""
    if before is None or not path.name.startswith("frozen-") or not before.exists():
        return False
    status = before.stat()
    if (status.st_size, status.st_mtime_ns) != file:
        return False
    path.hardlink_to(before)
    return True


def _fill(path: Path, file: tuple[int, int], chunks: Iterable[Any]) -> None:
    nbytes, written = file
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, nbytes)
        at = 0
        for chunk in chunks:
            rest = memoryview(chunk)
            while rest:
                done = os.pwrite(descriptor, rest, at)
                rest, at = rest[done:], at + done
    finally:
        os.close(descriptor)
    if at != nbytes:
        raise CorruptCheckpointError(
            "a replica is not what it is a copy of", where=str(path), why=f"{at} of {nbytes} bytes"
        )
    os.utime(path, ns=(written, written))
