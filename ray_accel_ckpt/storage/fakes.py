"""Filesystems for tests, this library's and yours: in memory, recording, failing.

    memory = MemoryFilesystem()
    recording = RecordingFilesystem(memory)
    faulty = FaultyFilesystem(memory, Fault(OSError(errno.ENOSPC, "full"), operation="write"))

They are `Filesystem`s, so they nest.
"""

from __future__ import annotations

import fnmatch
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from ray_accel_ckpt.storage.filesystem import Claim, Entry, Filesystem


class MemoryFilesystem:
    """Files in a dict. A directory is there while a file is under it. Thread-safe.

    Args:
        files: what lies there at first, by path; copied.

    Attributes:
        files: what lies there now. Tests may change it, bytes and all.
    """

    def __init__(self, files: Mapping[str, bytes] | None = None) -> None:
        self.files: dict[str, bytes] = dict(files or {})
        self._lock = threading.Lock()

    def claim(self, path: str) -> Claim:
        return Claim.TAKEN if self.list(path) else Claim.FREE

    def write(self, path: str, chunks: Iterable[memoryview | bytes]) -> None:
        data = b"".join(bytes(chunk) for chunk in chunks)
        with self._lock:
            self.files[path] = data

    def copy(self, source: str, path: str) -> None:
        with self._lock:
            if source not in self.files:
                raise FileNotFoundError(source)
            self.files[path] = self.files[source]

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        with self._lock:
            data = self.files.get(path)
        if data is None:
            raise FileNotFoundError(path)
        end = offset + len(buffer)
        if end > len(data):
            raise EOFError(f"{path} ends {end - len(data)} bytes before byte {end}")
        buffer[:] = data[offset:end]

    def list(self, path: str) -> list[Entry]:
        prefix = f"{path}/"
        found: dict[str, int | None] = {}
        with self._lock:
            for name, data in self.files.items():
                if name.startswith(prefix):
                    first, below, _ = name[len(prefix) :].partition("/")
                    found[first] = None if below else len(data)
        return [Entry(name=name, nbytes=nbytes) for name, nbytes in sorted(found.items())]

    def delete(self, path: str) -> None:
        with self._lock:
            for name in [n for n in self.files if n == path or n.startswith(f"{path}/")]:
                del self.files[name]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One thing that was done to storage.

    Attributes:
        kind: a file is created, gets a chunk, is complete; is copied; or is deleted.
        data: the chunk.
        source: the file that was copied.
    """

    kind: Literal["create", "append", "complete", "copy", "delete"]
    path: str
    data: bytes = b""
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Read:
    """A range of a file that was read."""

    path: str
    offset: int
    nbytes: int


class RecordingFilesystem:
    """Passes everything on and keeps a record of it.

    Attributes:
        operations: what changed the storage, in order. Deleting a directory is
            recorded file by file: that is how a crash may leave it.
        reads: what was read, in order.
    """

    def __init__(self, filesystem: Filesystem) -> None:
        self._filesystem = filesystem
        self._lock = threading.Lock()
        self.operations: list[Operation] = []
        self.reads: list[Read] = []

    def claim(self, path: str) -> Claim:
        return self._filesystem.claim(path)

    def write(self, path: str, chunks: Iterable[memoryview | bytes]) -> None:
        self._record(Operation(kind="create", path=path))
        self._filesystem.write(path, self._recorded(path, chunks))
        self._record(Operation(kind="complete", path=path))

    def copy(self, source: str, path: str) -> None:
        self._filesystem.copy(source, path)
        self._record(Operation(kind="copy", path=path, source=source))

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        with self._lock:
            self.reads.append(Read(path=path, offset=offset, nbytes=len(buffer)))
        self._filesystem.read_into(path, offset, buffer)

    def list(self, path: str) -> list[Entry]:
        return self._filesystem.list(path)

    def delete(self, path: str) -> None:
        for file in list(self._files_under(path)):
            self._record(Operation(kind="delete", path=file))
        self._filesystem.delete(path)

    def _recorded(
        self, path: str, chunks: Iterable[memoryview | bytes]
    ) -> Iterator[memoryview | bytes]:
        for chunk in chunks:
            self._record(Operation(kind="append", path=path, data=bytes(chunk)))
            yield chunk

    def _files_under(self, path: str) -> Iterator[str]:
        entries = self._filesystem.list(path)
        if not entries:
            yield path
        for entry in entries:
            below = f"{path}/{entry.name}"
            if entry.nbytes is None:
                yield from self._files_under(below)
            else:
                yield below

    def _record(self, operation: Operation) -> None:
        with self._lock:
            self.operations.append(operation)


def replay(
    operations: Sequence[Operation],
    *,
    onto: Mapping[str, bytes] | None = None,
    atomic: bool = False,
    torn: bool = False,
) -> MemoryFilesystem:
    """What storage holds after `operations`: cut them anywhere to see it after a crash there.

    Args:
        onto: the files that were there before.
        atomic: files appear when they are complete, as on object stores and with
            `LocalFilesystem`. Otherwise they grow before everyone's eyes.
        torn: of the last operation, if it is a chunk, only the first half got there.
    """
    files = dict(onto or {})
    growing: dict[str, bytes] = {} if atomic else files
    for number, operation in enumerate(operations, 1):
        path, data = operation.path, operation.data
        if operation.kind == "create":
            growing[path] = b""
        elif operation.kind == "append":
            last = number == len(operations)
            growing[path] += data[: len(data) // 2] if torn and last else data
        elif operation.kind == "complete":
            files[path] = growing[path]
        elif operation.kind == "copy":
            files[path] = files[operation.source]
        else:
            files.pop(path, None)
    return MemoryFilesystem(files)


@dataclass(frozen=True)
class Fault:
    """An error, and the operations it strikes.

    Attributes:
        error: raised as it is, each time.
        operation: the kind; None for every kind.
        path: a pattern in the manner of the shell; ``*`` matches ``/`` too.
        nth: the first matching operation that is struck, counted from 1.
        times: how many in a row are struck; None for all from then on.
        after_chunks: for writes: so many chunks arrive, and a cut-off file is
            left. None: nothing arrives.
    """

    error: Exception
    operation: Literal["claim", "write", "copy", "read_into", "list", "delete"] | None = None
    path: str = "*"
    nth: int = 1
    times: int | None = 1
    after_chunks: int | None = None


class FaultyFilesystem:
    """Passes everything on but what its faults strike."""

    def __init__(self, filesystem: Filesystem, *faults: Fault) -> None:
        self._filesystem = filesystem
        self._faults = faults
        self._met = [0] * len(faults)
        self._lock = threading.Lock()

    def claim(self, path: str) -> Claim:
        self._raise("claim", path)
        return self._filesystem.claim(path)

    def write(self, path: str, chunks: Iterable[memoryview | bytes]) -> None:
        fault = self._struck("write", path)
        if fault is None:
            self._filesystem.write(path, chunks)
            return
        if fault.after_chunks is not None:
            self._filesystem.write(path, islice(chunks, fault.after_chunks))
        raise fault.error

    def copy(self, source: str, path: str) -> None:
        self._raise("copy", path)
        self._filesystem.copy(source, path)

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        self._raise("read_into", path)
        self._filesystem.read_into(path, offset, buffer)

    def list(self, path: str) -> list[Entry]:
        self._raise("list", path)
        return self._filesystem.list(path)

    def delete(self, path: str) -> None:
        self._raise("delete", path)
        self._filesystem.delete(path)

    def _raise(self, operation: str, path: str) -> None:
        fault = self._struck(operation, path)
        if fault is not None:
            raise fault.error

    def _struck(self, operation: str, path: str) -> Fault | None:
        """The first fault that strikes this operation. All that match it count it."""
        found = None
        with self._lock:
            for index, fault in enumerate(self._faults):
                kind = fault.operation in (None, operation)
                if not kind or not fnmatch.fnmatchcase(path, fault.path):
                    continue
                self._met[index] += 1
                past = self._met[index] - fault.nth
                if past >= 0 and (fault.times is None or past < fault.times):
                    found = found or fault
        return found
