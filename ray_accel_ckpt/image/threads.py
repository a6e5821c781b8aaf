"""The same work for many items, by a few threads: for what releases the GIL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TypeVar

THREADS = 8
"""More than most disks need, and as many requests as an object store answers side by side."""

T = TypeVar("T")


def for_each(function: Callable[[T], None], items: Sequence[T]) -> None:
    """Call `function` with each item, in no order. Returns when all are done.

    Raises:
        Exception: of the first item, in their order, of those that failed. After a
            failure no item is begun.
    """
    if len(items) < 2:
        for item in items:
            function(item)
        return
    failed = Event()

    def call(item: T) -> None:
        if failed.is_set():
            return
        try:
            function(item)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(min(THREADS, len(items)), thread_name_prefix="ray_accel_ckpt") as pool:
        for _ in pool.map(call, items):
            pass
