"""A node that remembers what was asked of it, and waiting for a condition."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Thread

from ray_accel_ckpt.errors import DrainError, NodeNotFoundError
from ray_accel_ckpt.runtime.node_watch import NodeWatch, WatchSettings
from ray_accel_ckpt.runtime.notices.notice import NoticeSource

PATIENCE = 60.0


def until(condition: Callable[[], object], what: str = "it never came to it") -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


@dataclass
class RecordingNode:
    drains: list[tuple[str, float | None]] = field(default_factory=list)
    tries: int = 0
    unreachable: bool = False
    gone: bool = False

    def find(self) -> str:
        if self.gone:
            raise NodeNotFoundError("gone")
        return "node"

    def drain(self, reason: str, deadline: float | None) -> str:
        self.tries += 1
        if self.unreachable:
            raise DrainError("Ray cannot be reached")
        if self.gone:
            raise NodeNotFoundError("gone")
        self.drains.append((reason, deadline))
        return "node"


@contextmanager
def watching(
    source: NoticeSource | None, node: RecordingNode, settings: WatchSettings
) -> Iterator[NodeWatch]:
    """A watch that runs beside the test, and is ended with it."""
    watch = NodeWatch(source=source, node=node, settings=settings)
    thread = Thread(target=watch.run)
    thread.start()
    try:
        yield watch
    finally:
        node.unreachable, node.gone = False, True
        watch.terminate()
        thread.join(PATIENCE)
        assert not thread.is_alive()
