"""Saving without Ray: one thread that writes images to a directory, in order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from ray_accel_ckpt.image.image import Image
from ray_accel_ckpt.storage.filesystem import Filesystem
from ray_accel_ckpt.storage.writer import refuse_overwriting, write_image


class BackgroundWriter:
    """Writes one image after the other. An error is kept until it is asked for."""

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

        with self._lock:
            self._pending.append(self._pool.submit(write))

    def flush(self) -> None:
        """Wait until everything submitted is durable. Raises what a write failed with."""
        with self._lock:
            pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def raise_earlier(self) -> None:
        """Raise what an earlier write failed with, once."""
        with self._lock:
            done = [f for f in self._pending if f.done()]
            self._pending = [f for f in self._pending if not f.done()]
        for future in done:
            future.result()
