"""Saving without Ray: one thread that writes images to a directory, in order."""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401 - so that it asks to be called before us
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

import ray_accel_ckpt.storage.journal  # noqa: F401 - so that it is called after us at the end
from ray_accel_ckpt.image.image import Image
from ray_accel_ckpt.storage.filesystem import Filesystem
from ray_accel_ckpt.storage.writer import refuse_overwriting, write_image

logger = logging.getLogger(__name__)

_Jobs = SimpleQueue[Callable[[], None] | None]
"""None is the end. A queue that an interrupt cannot leave locked, as it can pools and futures."""


class BackgroundWriter:
    """Writes one image after the other. An error is logged at once, and kept until it is asked for.

    At its end the process waits until all of them are written.
    """

    def __init__(self, *, timeout: float) -> None:
        self._timeout = timeout
        self._jobs: _Jobs = SimpleQueue()
        self._failures: deque[BaseException] = deque()
        weakref.finalize(self, self._jobs.put, None)

    def submit(
        self,
        filesystem: Filesystem,
        directory: str,
        image: Image,
        *,
        release: Callable[[], None],
        after: Callable[[], None],
    ) -> None:
        """Write in the background. What another process has saved there meanwhile is an error.

        Args:
            release: called when the image's memory is free again, on success or not.
            after: called when the image is durable.
        """
        timeout, failures = self._timeout, self._failures

        def write() -> None:
            try:
                try:
                    write_image(
                        filesystem,
                        directory,
                        image,
                        timeout=timeout,
                        before_manifest=lambda: refuse_overwriting(
                            filesystem, directory, image.info, timeout=timeout
                        ),
                    )
                finally:
                    release()
                after()
            except BaseException as e:  # noqa: BLE001 - raised when it is asked for
                # A script may end before it asks. One line: who asks gets the traceback.
                logger.error("while saving to %s: %s", directory, _line(e))  # noqa: TRY400
                failures.append(e)

        if self._jobs not in _RUNNING:
            _start(self._jobs)
        self._jobs.put(write)

    def flush(self) -> None:
        """Wait until nothing is being written. Raises as `raise_earlier`."""
        if self._jobs in _RUNNING:
            done: SimpleQueue[None] = SimpleQueue()
            self._jobs.put(lambda: done.put(None))
            done.get()
        self.raise_earlier()

    def raise_earlier(self) -> None:
        """Raise what writes have failed with since this was last asked: the first such error.

        The others are notes of it.
        """
        failures = [self._failures.popleft() for _ in range(len(self._failures))]
        if failures:
            first, *others = failures
            for other in others:
                first.add_note(f"and a later save failed: {_line(other)}")
            raise first


_RUNNING: dict[_Jobs, threading.Thread] = {}


def _start(jobs: _Jobs) -> None:
    name = "ray_accel_ckpt-writer"
    thread = threading.Thread(target=_work, args=(jobs,), daemon=True, name=name)
    thread.start()
    _RUNNING[jobs] = thread


def _work(jobs: _Jobs) -> None:
    while (job := jobs.get()) is not None:
        job()
        # Its memory is not kept until there is another one.
        del job
    _RUNNING.pop(jobs, None)


@atexit.register
def _await_all() -> None:
    for jobs, thread in list(_RUNNING.items()):
        jobs.put(None)
        thread.join()


# And before: those who ask last come first. By the time of `atexit`, thread pools, which storage
# needs for new connections, take no work any more, and forked children of multiprocessing have
# ended without it.
threading._register_atexit(_await_all)  # type: ignore[attr-defined]


def _line(error: BaseException) -> str:
    said = "; ".join(line.strip() for line in str(error).splitlines())
    return f"{type(error).__name__}: {said}"
