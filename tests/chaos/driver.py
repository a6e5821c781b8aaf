"""The driver of a job, and whoever submits it again when it did not end well."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.chaos.job import Job, drive

PAUSE = 1.0
"""Seconds before a driver that ended with an error is started again."""

# Forked from a process that has imported torch and Ray: that takes seconds each time.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.chaos.job"])


class Driver:
    """One job, submitted until it ends well.

    Attributes:
        starts: how often it was started.
        exits: how each ended that did not end well: exit codes, negative for signals.
    """

    def __init__(self, job: Job, address: str, log: Path) -> None:
        # The process that it is forked from has the environment of when that was started.
        self._arguments = (job, address, str(log), dict(os.environ))
        self._process: BaseProcess | None = None
        self._not_before = 0.0
        self.log = log
        self.starts = 0
        self.exits: list[int] = []

    def supervise(self) -> bool:
        """Start it, or again if it has ended with an error. True once it has ended well."""
        if self._process is not None:
            code = self._process.exitcode
            if code is None:
                return False
            if code == 0:
                return True
            self.exits.append(code)
            self._process = None
            self._not_before = time.monotonic() + (PAUSE if code > 0 else 0)
        if time.monotonic() >= self._not_before:
            self._process = _context.Process(target=drive, args=self._arguments, daemon=True)
            self._process.start()
            self.starts += 1
        return False

    def kill(self) -> None:
        """SIGKILL, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.join()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.exitcode is None

    def tail(self, lines: int = 40) -> str:
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
