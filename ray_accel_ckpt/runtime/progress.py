"""How far reading is, told while somebody waits: by a bar on a terminal, else by the log.

The threads that read add to a number and do nothing else. One more thread looks at it now
and then, and whatever becomes of the terminal or of the log stays in that thread.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray_accel_ckpt.storage.proving import Watcher

logger = logging.getLogger(__name__)

_REDRAWN = 0.1
"""Seconds between two looks at a bar; what is done by then shows none."""
_TOLD = 10.0
"""Seconds between two lines of the log."""
_UNITS = ["bytes", "kB", "MB", "GB", "TB", "PB"]


@contextmanager
def reading() -> Iterator[Watcher]:
    """A watcher for a command: on a terminal a bar, for one checkpoint after the other."""
    with _shown(_bar if _on_terminal() else None) as watcher:
        yield watcher


@contextmanager
def restoring(path: str, nbytes: int, *, rank: int) -> Iterator[Watcher]:
    """A watcher for a worker that reads `nbytes` of a checkpoint: rank 0's is shown, no other.

    On a terminal it is a bar on stderr, which is gone when this ends; else a line of the log
    every 10 s, at INFO. It counts the bytes that this rank reads, out of storage or of the
    nodes' memory, and not those that other ranks read and broadcast: they come after
    all ranks have read.

    Nothing here raises, and no random number is drawn.
    """
    show: _Show | None = None
    if rank == 0 and _on_terminal():
        show = partial(_bar, title="restoring ")
    elif rank == 0 and logger.isEnabledFor(logging.INFO):
        show = _lines
    with _shown(show) as watcher:
        watcher.begins(path, nbytes)
        yield watcher


@dataclass(frozen=True, kw_only=True)
class _Far:
    """How far one checkpoint is; `number` tells it from the one before."""

    name: str = ""
    nbytes: int = 0
    read: int = 0
    number: int = 0


class _Count:
    def __init__(self) -> None:
        self.far = _Far()
        self._lock = Lock()

    def begins(self, path: str, nbytes: int) -> None:
        # Names may be anyone's, and a terminal obeys what is in them.
        name = "".join(c if c.isprintable() else "?" for c in path.rpartition("/")[2])
        with self._lock:
            self.far = _Far(name=name, nbytes=nbytes, number=self.far.number + 1)

    def has_read(self, nbytes: int) -> None:
        with self._lock:
            self.far = replace(self.far, read=self.far.read + nbytes)


_Show = Callable[[_Count, Event], None]
"""Shows a count until the event is set."""


@contextmanager
def _shown(show: _Show | None) -> Iterator[Watcher]:
    count, over = _Count(), Event()
    if show is None:
        yield count
        return
    thread = Thread(
        target=_guarded, args=(show, count, over), name="ray_accel_ckpt-progress", daemon=True
    )
    thread.start()
    try:
        yield count
    finally:
        over.set()
        thread.join()


def _guarded(show: _Show, count: _Count, over: Event) -> None:
    try:
        show(count, over)
    except Exception:
        logger.warning("how far reading is cannot be shown; reading goes on", exc_info=True)


def _bar(count: _Count, over: Event, title: str = "") -> None:
    if over.wait(_REDRAWN):
        return
    # Making its styles, which it does once, rich draws from the stream that training draws from.
    stream = random.getstate()
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    random.setstate(stream)
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        auto_refresh=False,
        # What others print is theirs: stdout may lead elsewhere.
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not console.is_interactive,
    ) as progress:
        shown, task = 0, None
        while not over.wait(_REDRAWN):
            far = count.far
            if far.number != shown:
                if task is not None:
                    progress.remove_task(task)
                shown, task = far.number, progress.add_task(title + far.name, total=far.nbytes)
            if task is not None:
                progress.update(task, completed=far.read, refresh=True)


def _lines(count: _Count, over: Event) -> None:
    from rich.filesize import pick_unit_and_suffix

    while not over.wait(_TOLD):
        far = count.far
        unit, suffix = pick_unit_and_suffix(far.nbytes, _UNITS, 1000)
        logger.info(
            "restoring %s: %.1f of %.1f %s", far.name, far.read / unit, far.nbytes / unit, suffix
        )


def _on_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        # There is none, it is closed, or something else stands in for it.
        return False
