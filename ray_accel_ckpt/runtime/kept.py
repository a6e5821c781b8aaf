"""What the keepers hold, read like a directory of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_accel_ckpt.runtime.keepers import CHUNK, Held, Keepers, attempt_of, whole
from ray_accel_ckpt.runtime.shelf import Shelf
from ray_accel_ckpt.storage.filesystem import Entry, LocalFilesystem


def memory_path(run: str, name: str) -> str:
    """What a snapshot of a run is called in messages and to hooks."""
    return f"memory://{run}/{name}"


class Kept:
    """The `Readable` of the memory tier, as it was when it was asked.

    A file that is on this node is read from its memory, others come through Ray.

    Args:
        run: the run's name, for the paths.
        root: of this node's shelf.
        held: the same on every rank.
    """

    def __init__(self, run: str, root: str, keepers: Keepers, held: Held) -> None:
        self._run, self._held, self._keepers = run, held, keepers
        self._shelf = Shelf(root=Path(root))
        self._handles: dict[str, Any] = {}

    def paths(self) -> list[str]:
        """Of the snapshots of which all is there, the newest step first."""
        return [memory_path(self._run, name) for name in whole(self._held)]

    def attempts(self) -> set[str]:
        """That left something, whole or not."""
        return {attempt_of(name) for snapshots in self._held.values() for name in snapshots}

    def near(self, path: str) -> bool:
        """Whether a file is on this node."""
        return self._shelf.path(*_split(path)) is not None

    def list(self, path: str) -> list[Entry]:
        name = path.rpartition("/")[2]
        files: dict[str, tuple[int, int]] = {}
        for snapshots in self._held.values():
            files.update(snapshots.get(name, {}))
        return [Entry(name=file, nbytes=nbytes) for file, (nbytes, _) in sorted(files.items())]

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        name, file = _split(path)
        here = self._shelf.path(name, file)
        problems = []
        if here is not None:
            try:
                LocalFilesystem().read_into(str(here), offset, buffer)
                return
            except (OSError, EOFError) as e:
                problems.append(f"{here}: {type(e).__name__}: {e}")
        for node in [node for node, held in self._held.items() if file in held.get(name, {})]:
            problem = self._read_from(node, name, file, offset, buffer)
            if problem is None:
                return
            problems.append(f"node {node[:8]}: {problem}")
        raise FileNotFoundError(f"no node has {path} any more; {'; '.join(problems)}")

    def _read_from(
        self, node: str, name: str, file: str, offset: int, buffer: memoryview
    ) -> str | None:
        """Why a node could not give the bytes; None if it did."""
        import ray

        try:
            if node not in self._handles:
                self._handles[node] = self._keepers.handle(node)
            for at in range(0, len(buffer), CHUNK):
                part = buffer[at : at + CHUNK]
                read = self._handles[node].read.remote(name, file, offset + at, len(part))
                part[:] = memoryview(ray.get(read))
        except (ray.exceptions.RayError, OSError, ValueError) as e:
            # No such actor, or not such a file, or not so much of it.
            return f"{type(e).__name__}: {e}"
        return None


def held_of(told: Mapping[str, Any]) -> Held:
    """What was held, after it has travelled as JSON."""
    return {
        node: {
            name: {file: (nbytes, written) for file, (nbytes, written) in files.items()}
            for name, files in snapshots.items()
        }
        for node, snapshots in told.items()
    }


def _split(path: str) -> tuple[str, str]:
    directory, _, file = path.rpartition("/")
    return directory.rpartition("/")[2], file
