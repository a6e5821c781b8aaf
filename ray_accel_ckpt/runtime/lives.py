"""When the attempts of a run began: what the mean time between failures is taken from.

By the names of their journals. Those are no part of the state: two equal runs save
equal states, however long they took.
"""

from __future__ import annotations

import logging
import time

from ray_accel_ckpt.errors import StorageError
from ray_accel_ckpt.storage.filesystem import Filesystem
from ray_accel_ckpt.storage.journal import begun

logger = logging.getLogger(__name__)


class Lives:
    """Those of one run, this one among them once it has begun."""

    def __init__(self) -> None:
        self._begun: list[float] = []

    def begin(self, filesystem: Filesystem, run: str) -> None:
        """See when those before this one began, once. Rank 0's business alone.

        Raises nothing: what fails is logged, and no mean time is known.
        """
        if self._begun:
            return
        now = time.time()
        try:
            before = [at for at in begun(filesystem, run) if at < now]
        except (StorageError, OSError) as e:
            logger.warning("how often this run is restarted will not be known: %s", e)
            return
        self._begun = [*before, now]

    def mtbf(self) -> float | None:
        """Mean seconds between restarts, from the first life's beginning; None before the first.

        A resize and a run submitted again count as restarts.
        """
        restarts = len(self._begun) - 1
        return (time.time() - self._begun[0]) / restarts if restarts > 0 else None
