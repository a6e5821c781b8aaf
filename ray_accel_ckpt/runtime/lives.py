"""How long a run has trained, over all its lives, and how often it was restarted."""

from __future__ import annotations

import time


class Lives:
    """Counted from one saved state to the next: a life without a save is not seen."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._before = 0.0
        self.restarts = 0
        self._resumed = False

    @property
    def seconds(self) -> float:
        """Of this life, and of those before it up to the state that was loaded."""
        return self._before + time.monotonic() - self._begun

    def mtbf(self) -> float | None:
        """Mean seconds between restarts; None before the first."""
        return self.seconds / self.restarts if self.restarts else None

    def resume(self, *, restarts: int, seconds: float) -> None:
        """Go on from a saved state: this life is one more. Only the first time: one life is one."""
        if self._resumed:
            return
        self._resumed = True
        self.restarts = restarts + 1
        self._before = seconds
