"""The memory tier's actor: one a node, which outlives workers and attempts.

What is kept lies in files (`shelf`); a keeper is there to do what needs somebody who
lives on: to hand bytes to other nodes, to take in replicas, to see that a group of
workers is gone and write its newest snapshot to storage, to remove what is no longer
needed, and to see that the run is over and leave nothing behind.
"""

from __future__ import annotations

import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ray_accel_ckpt.errors import NotACheckpointError
from ray_accel_ckpt.runtime.keepers import (
    ANSWER,
    CHUNK,
    Keepers,
    attempt_of,
    newest_whole,
    of_attempt,
)
from ray_accel_ckpt.runtime.ray_run import Controller, RayRun
from ray_accel_ckpt.runtime.rescue import Rescue, write_parts
from ray_accel_ckpt.runtime.shelf import Files, Shelf

logger = logging.getLogger(__name__)

PERIOD = 1.0
"""Seconds between two looks at what is gone."""

GONE = 60.0
"""Seconds that a worker has to end once its group is gone."""

FETCH = 60.0
"""Seconds that one such object may take."""

# Waits for the end of its input, and so for that of the process that has the other end,
# and removes the directory then, also where nothing else could: after a SIGKILL, at the end
# of the machine's Ray. Its parent goes at once, so that it is not ended as Ray's child.
_GUARDIAN = """
import os, shutil, signal, sys
if os.fork():
    os._exit(0)
os.setsid()
for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(each, signal.SIG_IGN)
sys.stdin.read()
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


class Keeper:
    """Of one node and one run. Its methods are called from other processes.

    Args:
        root: the directory in tmpfs to keep things in; made here, and removed when this
            process ends, however it ends.
        node: where it is, by Ray's id.
        run: the run, to write to its storage.
        keepers: all of the run's.
        controller: the run's.
    """

    def __init__(
        self, root: str, node: str, run: RayRun, keepers: Keepers, controller: Controller
    ) -> None:
        self._node, self._run, self._keepers = node, run, keepers
        self._controller = controller
        self._rescue = Rescue(run, keepers)
        self._shelf = Shelf(root=Path(root))
        self._held = self._shelf.make()
        self._guardian = _guard(self._shelf.root)
        self._lock = threading.Lock()
        self._tidying = threading.Lock()
        self._workers: dict[str, list[int]] = {}
        self._settled: set[str] = set()
        self._resumed: str | None = None
        self._opened = self._attempt = ""
        self._writing: Counter[str] = Counter()
        threading.Thread(target=self._watch, daemon=True, name="ray_accel_ckpt-keeper").start()

    # --- what workers ask for ------------------------------------------------------------

    def open(self, attempt: str) -> str:
        """A worker of a new attempt is there. Returns where this node's snapshots lie."""
        with self._lock:
            self._opened = attempt
        return str(self._shelf.root)

    def begin(self, attempt: str, resumed: str | None, pid: int) -> None:
        """A worker of a new attempt goes on: what other attempts left goes, as far as it may.

        Args:
            resumed: the snapshot it began from; stays until there is a newer one.
            pid: of the worker, on this node.
        """
        with self._lock:
            # Not if it is late, and another one has come since.
            if attempt not in self._workers and attempt == self._opened:
                self._attempt, self._resumed = attempt, resumed
            opened = _opened(pid)
            self._workers.setdefault(attempt, []).extend([] if opened is None else [opened])
        self._tidy()

    # --- what other keepers and workers read ---------------------------------------------

    def snapshots(self) -> dict[str, dict[str, tuple[int, int]]]:
        """See `Shelf.snapshots`."""
        return self._shelf.snapshots()

    def files_of(self, rank: int, name: str) -> dict[str, tuple[int, int]]:
        """See `Shelf.files_of`."""
        return self._shelf.files_of(rank, name)

    def read(self, name: str, file: str, offset: int, nbytes: int) -> np.ndarray[Any, Any]:
        """Bytes of a file, as a uint8 array; fewer if it ends before.

        Raises:
            FileNotFoundError: it is not here.
        """
        path = self._shelf.path(name, file)
        if path is None:
            raise FileNotFoundError(f"{file} of {name} is not kept here")
        with path.open("rb") as opened:
            opened.seek(offset)
            return np.fromfile(opened, dtype=np.uint8, count=nbytes)

    def pull(self, node: str, rank: int, name: str) -> None:
        """Make a replica of what the worker `rank` of another node has published."""
        import ray

        source = self._keepers.handle(node)
        files: Files = ray.get(source.files_of.remote(rank, name), timeout=FETCH)

        def fetch(file: str, nbytes: int) -> Iterator[Any]:
            ranges = [(at, min(CHUNK, nbytes - at)) for at in range(0, nbytes, CHUNK)]
            # One is on its way while the one before is written.
            asked = [source.read.remote(name, file, *each) for each in ranges[:1]]
            for following in [*ranges[1:], None]:
                arrived = asked.pop() if asked else None
                if following is not None:
                    asked.append(source.read.remote(name, file, *following))
                if arrived is not None:
                    yield ray.get(arrived, timeout=FETCH)

        self._shelf.receive(rank, name, files, fetch, stays=self._stays)

    # --- when a group of workers is gone -------------------------------------------------

    def settle(self, attempt: str) -> bool:
        """Begin to write the newest whole snapshot of an attempt to storage, unless storage has
        it or a newer one. Returns at once: whether all that is over. To be asked again.

        One keeper does it for all, so that all write the same one.
        """
        return self._rescue.settle(attempt)

    def write(self, name: str, ranks: list[int]) -> None:
        """Write some ranks' parts of a snapshot to storage, once its workers here are gone.

        Raises:
            NotACheckpointError: not all of them are here, or a worker here does not end.
            CorruptCheckpointError: they are not what was frozen.
            StorageError: they cannot be written.
        """
        with self._in_use(name):
            self._wait_for(name)
            write_parts(self._shelf, self._run, name, ranks)

    # --- looking after things ------------------------------------------------------------

    def _watch(self) -> None:
        pause = threading.Event()
        while not pause.wait(PERIOD):
            try:
                self._look()
            except Exception:
                # Of Ray: the next look may do better, and nobody else looks.
                logger.exception("snapshots in memory could not be looked after")

    def _look(self) -> None:
        ended = self._controller.has_ended()
        with self._lock:
            gone = [a for a, opened in self._workers.items() if not any(map(_runs, opened))]
            running = len(self._workers) - len(gone)
        if ended and not running:
            # Of others' too: a keeper that only has replicas is asked for them.
            gone += [attempt_of(name) for name in self._shelf.snapshots()]
        unsettled = [attempt for attempt in dict.fromkeys(gone) if attempt not in self._settled]
        for attempt in unsettled:
            if self._is_settled(attempt):
                self._forget(attempt)
        if not ended:
            self._tidy()
        elif not running and not unsettled and not self._writing:
            self._leave()

    def _is_settled(self, attempt: str) -> bool:
        """Ask the first keeper that lives to settle an attempt: which one that is, all agree."""
        import ray

        for node, handle in sorted(self._keepers.handles().items()):
            if node == self._node:
                return self.settle(attempt)
            try:
                return bool(ray.get(handle.settle.remote(attempt), timeout=ANSWER))
            except ray.exceptions.ActorDiedError:
                continue
            except ray.exceptions.RayError as e:
                logger.warning("the keeper of node %s does not answer: %s", node[:8], e)
                return False
        return True

    def _forget(self, attempt: str) -> None:
        with self._lock:
            self._settled.add(attempt)
            for opened in self._workers.get(attempt, ()):
                os.close(opened)
            if attempt in self._workers:
                self._workers[attempt] = []

    def _wait_for(self, name: str) -> None:
        """Until the workers that took a snapshot are gone from here."""
        pause, end = threading.Event(), time.monotonic() + GONE
        while True:
            with self._lock:
                if not any(map(_runs, self._workers.get(attempt_of(name), ()))):
                    return
            if time.monotonic() >= end:
                # Whoever asked has others to see to, and this worker may write what it holds.
                raise NotACheckpointError(
                    "a snapshot in memory is not written to storage: its worker does not end",
                    where=f"{name}, node {self._node[:8]}",
                    why=f"the other workers are gone, and this one still runs {GONE:g} s later",
                    remedy="see what its process hangs in: a driver or a mount, say",
                )
            pause.wait(PERIOD / 10)

    def _tidy(self) -> None:
        """Remove what attempts before the present one left, if it is not needed any more."""
        with self._tidying:
            with self._lock:
                attempt = self._attempt
                unsettled = self._workers.keys() - self._settled - {attempt}
            if not attempt:
                return
            needed: set[str | None] = set()
            if any(attempt_of(name) != attempt for name in self._shelf.snapshots()):
                held = self._keepers.held()
                needed = {newest_whole(held, of_attempt(each)) for each in unsettled}
                newer = newest_whole(held, of_attempt(attempt))
                with self._lock:
                    if newer is not None and self._attempt == attempt:
                        self._resumed = None
            self._shelf.keep(
                lambda name: self._is_new(attempt_of(name)) or name in needed or self._stays(name),
                lives=self._is_new,
            )

    def _is_new(self, attempt: str) -> bool:
        """Whether it is the present attempt, or one that is about to be."""
        with self._lock:
            return attempt in (self._attempt, self._opened)

    def _stays(self, name: str) -> bool:
        """Whether a snapshot of an attempt before is needed yet."""
        return name == self._resumed or name in self._writing

    @contextmanager
    def _in_use(self, name: str) -> Iterator[None]:
        with self._lock:
            self._writing[name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._writing[name] -= 1
                # Without those that are 0.
                self._writing = +self._writing

    def _leave(self) -> None:
        import ray

        self._shelf.clear()
        ray.kill(self._keepers.handle(self._node))


def _opened(pid: int) -> int | None:
    """A descriptor of a process, which stays its own when the number is another's."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _runs(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return not poll.poll(0)


def _guard(root: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-S", "-E", "-c", _GUARDIAN, str(root)]
    guardian = subprocess.Popen(  # noqa: S603
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
    )
    guardian.wait()
    return guardian
