"""Listing directories and reading small files, tried again while errors may pass."""

from __future__ import annotations

from ray_accel_ckpt.storage.filesystem import Entry, Readable
from ray_accel_ckpt.storage.retry import retried

READ_TIMEOUT = 120.0
"""Seconds that passing errors are retried for while reading."""


def listed(filesystem: Readable, directory: str, *, timeout: float = READ_TIMEOUT) -> list[Entry]:
    """What lies in a directory; nothing if it is not there.

    Raises:
        StorageError: it could not be listed.
    """
    return list(
        retried(lambda: filesystem.list(directory), what="list", where=directory, timeout=timeout)
    )


def read_file(
    filesystem: Readable, path: str, nbytes: int, *, what: str, timeout: float = READ_TIMEOUT
) -> bytes:
    """A file of `nbytes`, as listed, into memory.

    Raises:
        FileNotFoundError, EOFError: it is gone, or shorter by now.
        StorageError: it could not be read.
    """
    data = bytearray(nbytes)
    retried(
        lambda: filesystem.read_into(path, 0, memoryview(data)),
        what=what,
        where=path,
        timeout=timeout,
    )
    return bytes(data)


def is_file(filesystem: Readable, path: str) -> bool:
    """Whether a file can be read there: told by one request, for the sake of a message."""
    try:
        filesystem.read_into(path, 0, memoryview(bytearray(1)))
    except EOFError:
        return True
    except Exception:  # noqa: BLE001 - whatever a client raises, no file is known to be there
        return False
    return True
