"""A thread that polls: neither a slow metadata service nor a slow Ray holds up the other."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ray_accel_ckpt.errors import MetadataError
from ray_accel_ckpt.runtime.notices.notice import Notice, NoticeSource

logger = logging.getLogger(__name__)

LONGEST_PAUSE = 10.0
"""Seconds between polls of a service that does not work; a notice may be no longer than 30 s."""


class Poller(threading.Thread):
    """Polls until `stop`, and tells each change of what is announced: once, and in order.

    A fault of the service changes nothing that was announced before. It is
    logged when it begins and when it ends, and polls come more and more seldom.
    """

    def __init__(
        self, source: NoticeSource, *, every: float, tell: Callable[[Notice | None], None]
    ) -> None:
        super().__init__(name="notices", daemon=True)
        self._source = source
        self._every = every
        self._tell = tell
        self._stopped = threading.Event()
        self._announced: Notice | None = None
        self._faults = 0

    def stop(self) -> None:
        """Ends soon; a request under way is not waited for."""
        self._stopped.set()

    def run(self) -> None:
        while not self._stopped.is_set():
            self._poll()
            self._stopped.wait(self._pause())

    def _poll(self) -> None:
        try:
            notice = self._source.poll()
        except MetadataError as error:
            if self._faults == 0:
                logger.warning(
                    "no notices at the moment, SIGTERM is still heard, polling goes on: %s", error
                )
            self._faults += 1
            return
        if self._faults:
            logger.info("the metadata service answers again")
        self._faults = 0
        if notice != self._announced:
            self._announced = notice
            self._tell(notice)

    def _pause(self) -> float:
        if self._faults == 0:
            return self._every
        # The exponent is bounded, or after a long night 2 to it would be no float.
        return max(self._every, min(self._every * 2.0 ** min(self._faults, 20), LONGEST_PAUSE))
