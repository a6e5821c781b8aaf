"""Saving without Ray: one thread that writes images to a directory, in order."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from ray_accel_ckpt.image.image import Image
from ray_accel_ckpt.storage.filesystem import Filesystem
from ray_accel_ckpt.storage.writer import refuse_overwriting, write_image

logger = logging.getLogger(__name__)


class BackgroundWriter:
    """Writes one image after the other. An error is logged at once, and kept until it is asked for.

    At its end the process waits until all of them are written.
    """

    def __init__(self, *, timeout: float) -> None:
        self._timeout = timeout
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ray_accel_ckpt-writer")
        self._pending: list[Future[None]] = []
        self._lock = threading.Lock()

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

        def write() -> None:
            try:
                try:
                    write_image(
                        filesystem,
                        directory,
                        image,
                        timeout=self._timeout,
                        before_manifest=lambda: refuse_overwriting(
                            filesystem, directory, image.info, timeout=self._timeout
                        ),
                    )
                finally:
                    release()
                after()
            except BaseException as e:
                # A script may end before it asks. One line: who asks gets the traceback.
                logger.error("while saving to %s: %s", directory, _line(e))  # noqa: TRY400
                raise

        with self._lock:
            self._pending.append(self._pool.submit(write))

    def flush(self) -> None:
        """Wait until nothing is being written. Raises as `raise_earlier`."""
        with self._lock:
            pending = list(self._pending)
        wait(pending)
        self.raise_earlier()

    def raise_earlier(self) -> None:
        """Raise what writes have failed with since this was last asked: the first such error.

        The others are notes of it.
        """
        with self._lock:
            done = [future for future in self._pending if future.done()]
            self._pending = [future for future in self._pending if future not in done]
        failures = [e for future in done if (e := future.exception()) is not None]
        if failures:
            first, *others = failures
            for other in others:
                first.add_note(f"and a later save failed: {_line(other)}")
            raise first


def _line(error: BaseException) -> str:
    said = "; ".join(line.strip() for line in str(error).splitlines())
    return f"{type(error).__name__}: {said}"
