"""What happened to a run: small files of JSON lines beside its checkpoints.

``events/<milliseconds>-<writer>-<part>.jsonl``, a line an event:

    {"at": 1790000000.125, "event": "durable", "name": "checkpoint_00000420_a1b2c3", ...}

Object stores know no appending, so a file is written anew with each event; it is
small, because a writer goes on in another part when it has grown. A writer is an
attempt (its six hex digits) or Ray's controller. It is no part of the state: what is
lost of it is missing from reports, and from nothing else.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401 - so that it asks to be called before us
import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_accel_ckpt.storage.access import listed, read_file
from ray_accel_ckpt.storage.filesystem import Filesystem, Readable

logger = logging.getLogger(__name__)

_EVENTS = "events"
REACHED = frozenset(("heartbeat", "save", "notice", "end"))
"""Kinds of events whose step is where training was; others speak of an earlier one."""

_PART_NBYTES = 32 * 1024
_APART = 1.0
"""Seconds between two writes of one file: some object stores take no more."""
_PATIENCE = 5.0
"""Seconds that the end of the process waits for the last events."""
_TIMEOUT = 30.0
"""Seconds that passing errors of reading are retried for: training can do without it."""
_NAME = re.compile(r"([0-9]{1,15})-([0-9a-z]{1,32})-([0-9]{1,6})\.jsonl")
_MAX_NBYTES = 2**20
_LATEST = 1e11
"""Seconds since the epoch that a clock may tell."""

Pulse = Callable[[], Mapping[str, Any] | None]
Place = Callable[[], tuple[Filesystem, str]]


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line.

    Attributes:
        at: seconds since the epoch, by the writer's clock.
        kind: "start", "save", "durable", ... (see docs/report.md).
        writer: the attempt's six hex digits, or "controller".
        fields: the rest of it: plain JSON, whatever is in it.
    """

    at: float
    kind: str
    writer: str
    fields: Mapping[str, Any] = field(default_factory=dict)


class Journal:
    """Writes the events of one writer, in a thread of its own.

    `add` and `close` never block, and nothing here raises or draws a random number: what
    storage refuses is logged once and tried again with the next event.

    Args:
        place: the storage and the run's directory on it. Called in the thread, before the
            first write and until it answers.
        writer: letters and digits.
        pulse: asked each `every` seconds what to say beside what is told: fields of a
            "heartbeat", or None.
    """

    def __init__(
        self,
        place: Place,
        *,
        writer: str,
        pulse: Pulse = lambda: None,
        every: float = 10.0,
    ) -> None:
        self._place, self._pulse, self._every = place, pulse, every
        self._found: tuple[Filesystem, str] | None = None
        self._name = f"{int(time.time() * 1000)}-{writer}"
        self._lines: list[bytes] = []
        self._part = 0
        self._unwritten = self._closed = self._failed = False
        self._waiting = 0
        self._written_at = -math.inf
        # Callers take the lock itself: an interrupt may leave a condition locked that they enter.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._thread = threading.Thread(
            target=self._run, name="ray_accel_ckpt-journal", daemon=True
        )
        self._thread.start()
        _RUNNING.add(self)

    def add(self, kind: str, **fields: Any) -> None:
        """Write down an event of now, soon. What is not JSON in it is written as its text."""
        line = json.dumps({"at": round(time.time(), 3), "event": kind, **fields}, default=str)
        with self._lock:
            self._lines.append(line.encode() + b"\n")
            self._unwritten = True
            self._changed.notify_all()

    def flush(self, timeout: float) -> None:
        """Wait until all that was added is written or given up, so many seconds at most."""
        with self._lock:
            self._waiting += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._unwritten, timeout)
            self._waiting -= 1

    def close(self) -> None:
        """Have the thread write the rest and end. Returns at once."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()

    def leave(self) -> None:
        """Write what there is, with patience: the process is going to end.

        Not in a forked child, where the thread is none and the lock may be held for ever.
        """
        if self._thread.is_alive():
            self.flush(_PATIENCE)

    def join(self) -> None:
        """Write what there is, with patience, and end."""
        if self._thread.is_alive():
            self.close()
            self._thread.join(_PATIENCE)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._unwritten or self._closed, self._every)
                if self._unwritten:
                    soon = self._written_at + _APART - time.monotonic()
                    self._changed.wait_for(lambda: self._waiting or self._closed, max(0.0, soon))
                elif self._closed:
                    break
                quiet = not self._unwritten
            try:
                self._beat() if quiet else self._write()
            except Exception:
                # Whatever it is, it is no reason for training to hear of it, and others follow.
                if not self._failed:
                    logger.warning("what happens to this run is not written down", exc_info=True)
                self._failed = True
                if not quiet:
                    self._given_up()
        _RUNNING.discard(self)

    def _given_up(self) -> None:
        """What is not written stays, and is tried again with the next event."""
        with self._changed:
            self._unwritten = False
            self._changed.notify_all()

    def _beat(self) -> None:
        fields = self._pulse()
        if fields is not None:
            self.add("heartbeat", **fields)

    def _write(self) -> None:
        if self._found is None:
            self._found = self._place()
        filesystem, directory = self._found
        with self._changed:
            count, nbytes = 1, len(self._lines[0])
            while count < len(self._lines) and nbytes < _PART_NBYTES:
                nbytes += len(self._lines[count])
                count += 1
            data = b"".join(self._lines[:count])
        filesystem.write(f"{beside(directory)}/{self._name}-{self._part}.jsonl", [data])
        self._written_at, self._failed = time.monotonic(), False
        with self._changed:
            # Added meanwhile: to be written with the rest of this part, or in the next one.
            self._unwritten = len(self._lines) > count
            if nbytes >= _PART_NBYTES:
                del self._lines[:count]
                self._part += 1
            self._changed.notify_all()


_RUNNING: set[Journal] = set()


def _flush_all() -> None:
    for journal in list(_RUNNING):
        journal.leave()


@atexit.register
def _await_all() -> None:
    for journal in list(_RUNNING):
        journal.join()


# Before `atexit`, when thread pools, which storage needs, still take work; after `background`,
# whose last saves are to be told of.
threading._register_atexit(_flush_all)  # type: ignore[attr-defined]


def beside(directory: str) -> str:
    """Where the events of a run lie whose checkpoints lie in `directory`.

    In the directory of a Ray run. A project's ``checkpoints`` hold nothing else, so that
    whoever goes through them meets no stranger: its events lie beside that.
    """
    parent, _, name = directory.rpartition("/")
    return f"{parent if name == 'checkpoints' else directory}/{_EVENTS}"


def begun(filesystem: Readable, directory: str) -> list[float]:
    """When each attempt of a run began, in seconds since the epoch; from names alone.

    Raises:
        StorageError, FileNotFoundError: the directory could not be listed.
    """
    first = {(part.at, part.writer) for part in _parts(filesystem, directory)}
    return sorted(at / 1000 for at, writer in first if writer != "controller")


def read_events(filesystem: Readable, directory: str, *, latest: bool = False) -> list[Event]:
    """All events of a run, by time. A line that is none is passed over with a warning.

    Args:
        latest: only the last ones of the attempt that began last.

    Raises:
        StorageError, FileNotFoundError: they could not be read.
    """
    parts = _parts(filesystem, directory)
    if latest:
        attempts = [part for part in parts if part.writer != "controller"]
        # The last part may have been begun just now.
        parts = [part for part in attempts if part.writer == attempts[-1].writer][-2:]
    found: list[Event] = []
    for part in parts:
        path = f"{beside(directory)}/{part.name}"
        if part.nbytes > _MAX_NBYTES:
            logger.warning("%s is too long for a journal, and passed over", path)
            continue
        try:
            data = read_file(filesystem, path, part.nbytes, what="read events", timeout=_TIMEOUT)
        except (FileNotFoundError, EOFError):
            # Written anew, or removed, since it was listed.
            logger.warning("%s is not as it was listed, and passed over", path)
            continue
        found += _events(data, part.writer, path)
    return sorted(found, key=lambda event: event.at)


@dataclass(frozen=True, kw_only=True, order=True)
class _Part:
    """A file of a journal; `at` in milliseconds since the epoch."""

    at: int
    writer: str
    number: int
    name: str
    nbytes: int


def _parts(filesystem: Readable, directory: str) -> list[_Part]:
    """The files there, in their order."""
    entries = listed(filesystem, beside(directory), timeout=_TIMEOUT)
    return sorted(
        _Part(
            at=int(named[1]),
            writer=named[2],
            number=int(named[3]),
            name=entry.name,
            nbytes=entry.nbytes,
        )
        for entry in entries
        if entry.nbytes is not None and (named := _NAME.fullmatch(entry.name))
    )


def _events(data: bytes, writer: str, path: str) -> Iterator[Event]:
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            fields = json.loads(line)
            at, kind = float(fields.pop("at")), str(fields.pop("event"))
            sound = 0 <= at < _LATEST
        except (
            ArithmeticError,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            RecursionError,
        ):
            sound = False
        if not sound:
            logger.warning("%s, line %d is no event, and passed over", path, number)
            continue
        yield Event(at=at, kind=kind, writer=writer, fields=fields)
