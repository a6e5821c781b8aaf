"""The same work for many items, by a few threads: for what releases the GIL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

THREADS = 8
"""More than most disks need, and as many requests as an object store answers side by side."""

T = TypeVar("T")


def for_each(function: Callable[[T], None], items: Sequence[T]) -> None:
    """Call `function` with each item, in no order. Returns when all are done.

    Raises:
        Exception: of the first item, in their order, of those that failed. Items
            whose turn has not come by then are left out.
    """
    if len(items) < 2:
        for item in items:
            function(item)
        return
    pool = ThreadPoolExecutor(min(THREADS, len(items)), thread_name_prefix="ray_accel_ckpt")
    try:
        for _ in pool.map(function, items):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
