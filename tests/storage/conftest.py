"""Storage for the tests of this directory: servers started once, and ways into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from ray_accel_ckpt.runtime import session, sinks
from ray_accel_ckpt.storage import retry
from ray_accel_ckpt.storage.fakes import MemoryFilesystem
from ray_accel_ckpt.storage.filesystem import Filesystem


@pytest.fixture
def memory() -> MemoryFilesystem:
    return MemoryFilesystem()


@pytest.fixture
def route(monkeypatch: pytest.MonkeyPatch) -> Callable[[Filesystem], None]:
    """`route(filesystem)`: from now on every path a `Checkpointer` is given lies there."""

    def to(filesystem: Filesystem) -> None:
        for module in (session, sinks):
            monkeypatch.setattr(module, "resolve", lambda path: (filesystem, str(path)))

    return to


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Retries follow each other at once."""
    monkeypatch.setattr(retry, "_FIRST_WAIT", 0.0)
    monkeypatch.setattr(retry, "_LONGEST_WAIT", 0.0)
    yield
