"""What happened to a run: small files of JSON lines beside its checkpoints.

``<run>/events/<milliseconds>-<writer>-<part>.jsonl``, a line an event:

    {"at": 1790000000.125, "event": "durable", "name": "checkpoint_00000420_a1b2c3", ...}

Object stores know no appending, so a file is written anew with each event; it is
small, because a writer goes on in another part when it has grown. A writer is an
attempt (its six hex digits) or Ray's controller. It is no part of the state: what is
lost of it is missing from reports, and from nothing else.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_accel_ckpt.errors import StorageError
from ray_accel_ckpt.storage.access import READ_TIMEOUT, listed, read_file
from ray_accel_ckpt.storage.filesystem import Filesystem, Readable
from ray_accel_ckpt.storage.writer import write_file

logger = logging.getLogger(__name__)

DIRECTORY = "events"

_PART_NBYTES = 32 * 1024
_TIMEOUT = 30.0
"""Seconds that passing errors are retried for; nobody waits for it."""
_NAME = re.compile(r"([0-9]{1,15})-([0-9a-z]{1,32})-([0-9]{1,6})\.jsonl")
_MAX_NBYTES = 2**20

Pulse = Callable[[], Mapping[str, Any] | None]


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line.

    Attributes:
        at: seconds since the epoch, by the writer's clock.
        kind: "start", "save", "durable", ... (see docs/report.md).
        writer: the attempt's six hex digits, or "controller".
        fields: the rest of it, plain JSON.
    """

    at: float
    kind: str
    writer: str
    fields: Mapping[str, Any] = field(default_factory=dict)


class Journal:
    """Writes the events of one writer, in a thread of its own.

    Nothing here blocks, raises or draws a random number: what storage refuses is
    logged once and tried again with the next event.

    Args:
        directory: the run's.
        writer: letters and digits.
        pulse: asked each `every` seconds what to say beside what is told: fields of a
            "heartbeat", or None.
    """

    def __init__(
        self,
        filesystem: Filesystem,
        directory: str,
        *,
        writer: str,
        pulse: Pulse = lambda: None,
        every: float = 10.0,
    ) -> None:
        self._filesystem = filesystem
        self._prefix = f"{directory}/{DIRECTORY}/{int(time.time() * 1000)}-{writer}"
        self._pulse, self._every = pulse, every
        self._lines: list[bytes] = []
        self._part = 0
        self._unwritten = False
        self._closed = False
        self._failed = False
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="ray_accel_ckpt-journal", daemon=True).start()

    def add(self, kind: str, **fields: Any) -> None:
        """Write down an event of now, soon. What is not JSON in it is written as its text."""
        line = json.dumps({"at": round(time.time(), 3), "event": kind, **fields}, default=str)
        with self._changed:
            self._lines.append(line.encode() + b"\n")
            self._unwritten = True
            self._changed.notify_all()

    def flush(self, timeout: float) -> None:
        """Wait until all that was added is written or given up, so many seconds at most."""
        with self._changed:
            self._changed.wait_for(lambda: not self._unwritten, timeout)

    def close(self) -> None:
        """Have the thread write the rest and end. Returns at once."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._unwritten or self._closed, self._every)
                if not self._unwritten and self._closed:
                    return
                quiet = not self._unwritten
            if quiet:
                fields = self._pulse()
                if fields is not None:
                    self.add("heartbeat", **fields)
            else:
                self._write()

    def _write(self) -> None:
        with self._changed:
            count, data = len(self._lines), b"".join(self._lines)
        path = f"{self._prefix}-{self._part}.jsonl"
        try:
            write_file(
                self._filesystem, path, lambda: [data], what="write events", timeout=_TIMEOUT
            )
        except (StorageError, OSError) as e:
            if not self._failed:
                logger.warning("what happens to this run is not written down: %s", e)
            self._failed = True
        else:
            self._failed = False
        with self._changed:
            # Added meanwhile: to be written with the rest of this part, or in the next one.
            self._unwritten = len(self._lines) > count
            if len(data) >= _PART_NBYTES and not self._failed:
                del self._lines[:count]
                self._part += 1
            self._changed.notify_all()


def begun(filesystem: Readable, directory: str) -> list[float]:
    """When each attempt of a run began, in seconds since the epoch; from names alone.

    Raises:
        StorageError: the directory could not be listed.
    """
    parts = _parts(filesystem, directory)
    first = {(at, writer) for at, writer, _, _, _ in parts if writer != "controller"}
    return sorted(at / 1000 for at, _ in first)


def read_events(filesystem: Readable, directory: str, *, latest: bool = False) -> list[Event]:
    """All events of a run, by time. A line that is none is passed over with a warning.

    Args:
        latest: only those of the last part of the attempt that began last.

    Raises:
        StorageError: they could not be read.
    """
    parts = _parts(filesystem, directory)
    if latest:
        parts = [part for part in parts if part[1] != "controller"][-1:]
    found: list[Event] = []
    for _, writer, _, name, nbytes in parts:
        path = f"{directory}/{DIRECTORY}/{name}"
        try:
            data = read_file(filesystem, path, nbytes, what="read events", timeout=READ_TIMEOUT)
        except (FileNotFoundError, EOFError):
            # Written anew, or removed, since it was listed.
            logger.warning("%s is not as it was listed, and passed over", path)
            continue
        found += _events(data, writer, path)
    return sorted(found, key=lambda event: event.at)


def _parts(filesystem: Readable, directory: str) -> list[tuple[int, str, int, str, int]]:
    """(milliseconds, writer, part, name, bytes) of the files there, in their order."""
    entries = listed(filesystem, f"{directory}/{DIRECTORY}")
    return sorted(
        (int(named[1]), named[2], int(named[3]), entry.name, entry.nbytes)
        for entry in entries
        if entry.nbytes is not None
        and entry.nbytes <= _MAX_NBYTES
        and (named := _NAME.fullmatch(entry.name))
    )


def _events(data: bytes, writer: str, path: str) -> Iterator[Event]:
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            fields = json.loads(line)
            at, kind = float(fields.pop("at")), fields.pop("event")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            logger.warning("%s, line %d is no event, and passed over", path, number)
            continue
        yield Event(at=at, kind=str(kind), writer=writer, fields=fields)
