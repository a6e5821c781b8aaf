"""From memory to storage: what a group of workers kept and had not saved when it was gone."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from ray_accel_ckpt.errors import CheckpointError, NotACheckpointError
from ray_accel_ckpt.image.manifest import parse_name
from ray_accel_ckpt.runtime.keepers import CHUNK, Held, Keepers, of_attempt, whole
from ray_accel_ckpt.runtime.ray_run import RayRun
from ray_accel_ckpt.runtime.shelf import Shelf
from ray_accel_ckpt.storage.catalog import (
    candidates,
    open_snapshot,
    prove_file,
    read_manifest,
    step_of,
)
from ray_accel_ckpt.storage.filesystem import LocalFilesystem
from ray_accel_ckpt.storage.writer import write_file

logger = logging.getLogger(__name__)

WRITE_TIMEOUT = 600.0
"""Seconds that passing errors of storage are retried for."""


class Rescue:
    """Decides what is written, for the keepers of all nodes, which write their parts."""

    def __init__(self, run: RayRun, keepers: Keepers) -> None:
        self._run, self._keepers = run, keepers
        self._lock, self._one = threading.Lock(), threading.Lock()
        self._asked: dict[str, threading.Thread] = {}

    def settle(self, attempt: str) -> bool:
        """See `Keeper.settle`."""
        with self._lock:
            if attempt not in self._asked:
                name = f"ray_accel_ckpt-settle-{attempt}"
                self._asked[attempt] = threading.Thread(
                    target=self._settle, args=(attempt,), daemon=True, name=name
                )
                self._asked[attempt].start()
            return not self._asked[attempt].is_alive()

    def _settle(self, attempt: str) -> None:
        try:
            with self._one:
                for name in filter(of_attempt(attempt), whole(self._keepers.held())):
                    if self._is_saved(name):
                        return
                    logger.warning("%s cannot be saved, though it was kept in memory", name)
        except Exception:
            # Of storage or of Ray; there is nobody to tell.
            logger.exception("what attempt %s kept in memory was not saved", attempt)

    def _is_saved(self, name: str) -> bool:
        """Whether a snapshot, or what is newer, is in storage; it is written if not."""
        for _ in range(2):
            if self._in_storage(step_of(name)):
                return True
            logger.warning("%s was not saved, and its workers are gone: saving it", name)
            self._write_all(name)
        return self._in_storage(step_of(name))

    def _write_all(self, name: str) -> None:
        """Have all write their part of a snapshot. What came of it is seen in storage."""
        import ray

        handles = self._keepers.handles()
        writes = [
            handles[node].write.remote(name, ranks)
            for node, ranks in _dealt(self._keepers.held(), name).items()
            if node in handles
        ]
        for write in writes:
            try:
                ray.get(write)
            except ray.exceptions.RayError as e:
                logger.warning("a part of %s could not be saved: %s", name, e)

    def _in_storage(self, step: int) -> bool:
        """Whether there is a whole checkpoint of this step or a later one."""
        filesystem = self._run.filesystem
        for candidate in candidates(filesystem, self._run.path):
            if candidate.number < step:
                return False
            try:
                open_snapshot(filesystem, candidate.path)
            except CheckpointError:
                continue
            return True
        return False


def write_parts(shelf: Shelf, run: RayRun, name: str, ranks: list[int]) -> None:
    """Write some ranks' parts of a snapshot to the run's storage, proved.

    Raises: see `Keeper.write`.
    """
    with ExitStack() as stack:
        mine: dict[str, IO[bytes]] = {}
        for file in shelf.snapshots().get(name, {}):
            parsed, path = parse_name(file), shelf.path(name, file)
            if parsed is not None and parsed[1] in ranks and path is not None:
                mine[file] = stack.enter_context(path.open("rb"))
        have = {p[1] for file in mine if (p := parse_name(file)) and p[0] == "manifest"}
        if have != set(ranks):
            raise NotACheckpointError("a snapshot is gone before it was written", where=name)
        for file, opened in mine.items():
            if file.startswith("manifest-"):
                _prove(Path(opened.name))
        # Manifests last, as ever.
        for file in sorted(mine, key=lambda file: (file.startswith("manifest-"), file)):
            write_file(
                run.filesystem,
                f"{run.path}/{name}/{file}",
                lambda opened=mine[file]: _chunks(opened),  # type: ignore[misc]
                what="write a snapshot that was kept in memory",
                timeout=WRITE_TIMEOUT,
            )


def _prove(manifest: Path) -> None:
    """Prove a rank's files, of which this is the manifest."""
    local = LocalFilesystem()
    found = read_manifest(local, str(manifest), manifest.stat().st_size)
    for shard, slices in found.files:
        prove_file(local, str(manifest.with_name(shard.file)), shard, slices)


def _dealt(held: Held, name: str) -> dict[str, list[int]]:
    """Which keeper writes which ranks' parts of a snapshot."""
    writers: dict[int, str] = {}
    for node in sorted(held):
        for file in held[node].get(name, ()):
            parsed = parse_name(file)
            if parsed is not None:
                writers.setdefault(parsed[1], node)
    return {
        node: sorted(r for r, n in writers.items() if n == node) for node in set(writers.values())
    }


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    file.seek(0)
    while chunk := file.read(CHUNK):
        yield chunk
