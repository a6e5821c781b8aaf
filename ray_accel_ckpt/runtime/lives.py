"""When the lives of a run began: what the mean time between failures is taken from.

A file a life, `<run>/lives/<milliseconds since the epoch>-<attempt>`. Its name says all,
so nothing is read but a listing. It is no part of the state: two equal runs save equal
states, however long they took.
"""

from __future__ import annotations

import logging
import re
import time

from ray_accel_ckpt.errors import StorageError
from ray_accel_ckpt.storage.access import listed
from ray_accel_ckpt.storage.filesystem import Filesystem
from ray_accel_ckpt.storage.retry import retried

logger = logging.getLogger(__name__)

_TIMEOUT = 30.0
"""Seconds that passing errors are retried for: training waits for it, and can do without."""

_NAME = re.compile(r"([0-9]{1,15})-[0-9a-f]+")


class Lives:
    """Those of one run, this one among them once it was written down."""

    def __init__(self) -> None:
        self._begun: list[float] = []

    def begin(self, filesystem: Filesystem, run: str, attempt: str) -> None:
        """Write this life down beside those before it, once. Rank 0's business alone.

        Raises nothing: what fails is logged, and no mean time is known.
        """
        if self._begun:
            return
        directory, now = f"{run}/lives", time.time()
        try:
            before = self._before(filesystem, directory)
            path = f"{directory}/{int(now * 1000)}-{attempt}"
            retried(
                lambda: filesystem.write(path, [b"\n"]),
                what="write down the beginning of a life",
                where=path,
                timeout=_TIMEOUT,
            )
        except StorageError as e:
            logger.warning("how often this run is restarted will not be known: %s", e)
            return
        self._begun = [*before, now]

    @staticmethod
    def _before(filesystem: Filesystem, directory: str) -> list[float]:
        entries = listed(filesystem, directory, timeout=_TIMEOUT)
        return sorted(int(m[1]) / 1000 for e in entries if (m := _NAME.fullmatch(e.name)))

    def mtbf(self) -> float | None:
        """Mean seconds between restarts, from the first life's beginning; None before the first.

        A resize and a run submitted again count as restarts.
        """
        restarts = len(self._begun) - 1
        return (time.time() - self._begun[0]) / restarts if restarts > 0 else None
