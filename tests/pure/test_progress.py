"""How far a restore is: a bar on a terminal, lines of the log elsewhere, nothing for others."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import pty
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_accel_ckpt.image import threads
from ray_accel_ckpt.runtime import progress
from ray_accel_ckpt.runtime.group import Group
from ray_accel_ckpt.runtime.kept import Kept
from ray_accel_ckpt.runtime.shelf import Shelf
from ray_accel_ckpt.storage.fakes import MemoryFilesystem
from ray_accel_ckpt.storage.filesystem import Entry, LocalFilesystem, Readable
from tests.helpers_image import RUN, Small, newest, save

ROOT = Path(__file__).parents[2]


class Clock:
    """An `Event` for what shows progress; time passes for it by `passes` alone."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: float | None = None
        self._over = False
        self._changed = threading.Condition()

    def set(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        with self._changed:
            due = self._due = self.now + seconds
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._over or self.now >= due)
            return self._over

    def passes(self, seconds: float) -> None:
        """Returns when all that is due by then is done."""
        end = self.now + seconds
        with self._changed:
            while (due := self._next()) <= end:
                self.now, self._due = due, None
                self._changed.notify_all()
            self.now = end

    def _next(self) -> float:
        while self._due is None:
            if not self.watched:
                return math.inf
            self._changed.wait(0.05)
        return self._due

    @property
    def watched(self) -> bool:
        return any(each.name == "ray_accel_ckpt-progress" for each in threading.enumerate())


class Slow:
    """Storage of which each read of a shard takes so many seconds."""

    def __init__(self, filesystem: Readable, clock: Clock, seconds: float) -> None:
        self._filesystem, self._clock, self._seconds = filesystem, clock, seconds
        self.reads: list[int] = []
        self.watched = False

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        if "shard" in path:
            self.watched = self.watched or self._clock.watched
            self._clock.passes(self._seconds)
            self.reads.append(len(buffer))
        self._filesystem.read_into(path, offset, buffer)

    def list(self, path: str) -> list[Entry]:
        return self._filesystem.list(path)


def _lines(reads: list[int], seconds: float) -> list[str]:
    """What is told every 10 s of reads that take so many seconds each."""
    ends = range(10, int(seconds * len(reads)) + 1, 10)
    done = [sum(reads[: math.ceil(end / seconds) - 1]) for end in ends]
    total = sum(reads)
    unit, name = (1e3, "kB") if total >= 1e3 else (1, "bytes")
    return [f"restoring checkpoint_5: {n / unit:.1f} of {total / unit:.1f} {name}" for n in done]


class Second(Group):
    """Rank 1, that reads for itself."""

    rank = property(lambda self: 1)  # type: ignore[assignment]
    world_size = property(lambda self: 1)  # type: ignore[assignment]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "Event", lambda: clock)
    monkeypatch.setattr(progress, "_on_terminal", lambda: False)
    # One read after the other.
    monkeypatch.setattr(threads, "THREADS", 1)
    return clock


def _slow(clock: Clock, seconds: float) -> Slow:
    memory = MemoryFilesystem()
    save(memory, 5, world_size=3)
    return Slow(memory, clock, seconds)


def _load(storage: Any) -> None:
    into = Small(0)
    newest(storage, into)
    assert into.bits() == Small(5).bits()


def _told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in caplog.messages if line.startswith("restoring ")]


@pytest.mark.parametrize("seconds", [4.0, 35.0])
def test_where_no_terminal_is_a_slow_restore_is_a_line_every_ten_seconds(
    clock: Clock, seconds: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Of all bytes that will be read; also while one read takes that long."""
    caplog.set_level(logging.INFO)
    slow = _slow(clock, seconds)
    _load(slow)
    assert _told(caplog) == _lines(slow.reads, seconds) != []
    assert {record.levelno for record in caplog.records} == {logging.INFO}
    assert not clock.watched


def test_a_short_restore_is_not_told(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    slow = _slow(clock, 1.25)
    _load(slow)
    assert slow.watched
    assert 5.0 < clock.now < 10.0
    assert _told(caplog) == []


def test_other_ranks_tell_nothing(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    slow = _slow(clock, 35.0)
    into = Small(0, rank=1)
    replace(into.restorer(slow), group=Second()).exactly(f"{RUN}/checkpoint_5")
    assert into.own.state["noise"].tolist() == [51.0] * 3
    assert slow.reads
    assert not slow.watched
    assert _told(caplog) == []


def test_where_the_log_has_no_such_lines_nobody_looks(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    slow = _slow(clock, 35.0)
    _load(slow)
    assert not slow.watched


def test_a_restore_out_of_the_nodes_memory_is_told_too(
    clock: Clock, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO)
    shelf = Shelf(root=tmp_path / "shelf")
    save(LocalFilesystem(), 5, directory=str(shelf.own(0, "x").parent))
    keepers: Any = None

    reads = []

    class SlowKept(Kept):
        def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
            if "shard" in path:
                clock.passes(10.0)
                reads.append(len(buffer))
            super().read_into(path, offset, buffer)

    kept = SlowKept("run", str(shelf.root), keepers, {"node": shelf.snapshots()})
    restored = Small(0).restorer(LocalFilesystem()).newest(str(tmp_path / "run"), kept=kept)
    assert restored is not None
    assert restored.kept
    assert len(reads) > 1
    assert _told(caplog) == _lines(reads, 10.0)


def test_a_log_that_fails_stops_no_restore(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.msg.startswith("restoring "):
                raise OSError("the disk of the log is full")

    caplog.set_level(logging.INFO)
    broken = Broken()
    progress.logger.addHandler(broken)
    try:
        _load(_slow(clock, 35.0))
    finally:
        progress.logger.removeHandler(broken)
    assert "reading goes on" in caplog.text
    assert "the disk of the log is full" in caplog.text


def test_a_terminal_that_goes_away_stops_no_restore(
    clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(progress, "_on_terminal", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Gone())
        _load(_slow(clock, 1.0))
    assert "reading goes on" in caplog.text
    assert "Input/output error" in caplog.text


@pytest.mark.parametrize("stderr", [None, object()])
def test_without_a_stderr_there_is_no_terminal(
    stderr: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    assert not progress._on_terminal()


# --- the bar --------------------------------------------------------------------------------

_RESTORES = """
import json, random, select, sys
import numpy as np, torch
from ray_accel_ckpt.storage.fakes import MemoryFilesystem
from tests.helpers_image import Small, newest, save

class Held(MemoryFilesystem):
    reads = []

    def read_into(self, path, offset, buffer):
        if "shard" in path:
            if len(self.reads) == 3:
                print(sum(self.reads), flush=True)
                select.select([sys.stdin], [], [], 60)
            self.reads.append(len(buffer))
        super().read_into(path, offset, buffer)

def streams():
    python, numpy = random.getstate(), np.random.get_state()
    return repr((python, numpy[1].tolist(), numpy[2:], torch.get_rng_state().tolist()))

held = Held()
save(held, 5, world_size=3)
into, before = Small(0), streams()
newest(held, into)
after = streams()
print(json.dumps({
    "reads": held.reads,
    "same bits": into.bits() == Small(5).bits(),
    "same streams": after == before,
}))
"""


def test_a_terminal_shows_a_bar_that_vanishes() -> None:
    """By this rank's bytes; no random number is drawn."""
    master, terminal = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", _RESTORES],
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "200"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
    ) as child:
        os.close(terminal)
        assert child.stdout is not None
        held, screen = int(child.stdout.readline()), ""
        bar = f"restoring checkpoint_5 .* {held / 1e3:.1f}/([0-9.]+) kB"
        while not (seen := re.findall(bar, _plain(screen))):
            more = _more(master)
            assert more, screen
            screen += more
        told, _ = child.communicate("go on\n", timeout=60)
        while more := _more(master):
            screen += more
    os.close(master)
    found = json.loads(told)
    assert seen[0] == f"{sum(found['reads']) / 1e3:.1f}"
    assert 0 < held < sum(found["reads"])
    assert (found["same bits"], found["same streams"]) == (True, True)
    after = screen[screen.rindex("kB") :]
    assert "\x1b[1A\x1b[2K" in after, "the line of the bar is erased"
    assert "\x1b[?25h" in after, "the cursor is there again"


def test_a_name_cannot_command_a_terminal() -> None:
    count = progress._Count()
    count.begins("run/\x1b[2Jcheckpoint_5\r", 1)
    assert count.far.name == "?[2Jcheckpoint_5?"


def _more(master: int) -> str:
    try:
        return os.read(master, 65536).decode(errors="replace")
    except OSError:
        # Nobody has the terminal open any more.
        return ""


def _plain(screen: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen)
