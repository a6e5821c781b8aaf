"""Every few steps one small exchange: is a node going away, is a save due by the clock?

A beat is a collective, so all ranks must come to it at the same call. They do by
construction: rank 0 says with each beat after how many calls the next one comes,
and nothing else decides that. Every rank works out a decision, rank 0's is taken.

On a notice there are two saves. One at once, since machines are often gone before
their deadline; and one as late as it can be registered before the deadline, since
that is when Ray ends this life of the group. After that one nothing is begun that
the policy asks for: it could not be finished.
"""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator

from ray_accel_ckpt.policy import Measured, SavePolicy, StepPolicy, TimePolicy
from ray_accel_ckpt.runtime.exchange import Decision, Exchange, Notice

logger = logging.getLogger(__name__)

SHARE = 0.005
"""Of the time of training, what beats may cost."""

MAX_GAP = 5.0
"""Seconds between two beats, at most, as long as calls come at a steady pace."""

REGISTRATION = 4.0
"""Seconds that Ray takes to register what is durable on all ranks: two polls of its controller."""


class Heartbeat:
    """Says whether to save now: the same on every rank.

    Args:
        exchange: None if there is nothing to ask peers or Ray for.
        policy: None: only notices are acted upon.
        mtbf: what this run has seen of failures, see `Measured`.
        clock, wall: seconds; monotonic, and since the epoch. Replaced in simulations.
    """

    def __init__(
        self,
        exchange: Exchange | None,
        policy: SavePolicy | None,
        *,
        mtbf: Callable[[], float | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._exchange, self._mtbf = exchange, mtbf
        self._steps = policy if isinstance(policy, StepPolicy) else None
        self._seconds = policy if isinstance(policy, TimePolicy) else None
        self._clock, self._wall = clock, wall
        self._until_beat = self._ticks = 1
        self._beaten_at: float | None = None
        self._saving = 0.0
        self._saved_at = clock()
        self._costs: deque[float] = deque(maxlen=5)
        self._blocked: deque[float] = deque(maxlen=5)
        self._durable: deque[float] = deque(maxlen=3)
        self._notice: Notice | None = None
        self._closed = self._hold = False

    def after_step(self, global_step: int) -> bool:
        """Whether to save after this step. Collective when a beat is due."""
        asked = self.tick()
        by_step = self._steps is not None and self._steps.due(global_step=global_step)
        return asked or (by_step and not self._hold)

    def tick(self) -> bool:
        """Whether a beat asks for a save; False between beats. Collective when one is due."""
        if self._exchange is None:
            return False
        self._until_beat -= 1
        return self._until_beat == 0 and self._beat(self._exchange)

    @contextlib.contextmanager
    def saving(self) -> Iterator[Callable[[], None]]:
        """Measure a save: what it blocks, and until the callable given is called, durable.

        The callable may be called on any thread.
        """
        begun = self._clock()
        yield lambda: self._durable.append(self._clock() - begun)
        blocked = self._clock() - begun
        self._saved_at = begun
        self._saving += blocked
        self._blocked.append(blocked)

    # --- one beat ----------------------------------------------------------------------

    def _beat(self, exchange: Exchange) -> bool:
        begun = self._clock()
        pace = self._pace(begun)
        notice = exchange.notice()
        if notice is not None and notice != self._notice and exchange.rank == 0:
            self._tell(notice)
        decision = exchange.from_rank_zero(self._decide(notice, pace))
        self._until_beat = self._ticks = decision.ticks
        self._hold = decision.hold
        self._beaten_at, self._saving = self._clock(), 0.0
        self._costs.append(self._beaten_at - begun)
        return decision.save

    def _pace(self, now: float) -> float:
        """Seconds a call, since the last beat, without what saves took."""
        if self._beaten_at is None:
            return math.inf
        return max(1e-9, (now - self._beaten_at - self._saving) / self._ticks)

    def _decide(self, notice: Notice | None, pace: float) -> Decision:
        wait = self._until_due()
        by_clock = wait <= (pace / 2 if pace < math.inf else 0)
        new = notice is not None and notice != self._notice
        if new:
            self._notice, self._closed = notice, False
        left = self._left(notice)
        if left <= 0:
            # It was to be gone by now, and nobody knows any longer what will be.
            self._closed = False
        late = False
        spare = math.inf
        if self._durable and 0 < left < math.inf and not self._closed:
            needed = self._needed()
            spare = left - needed
            if new:
                # Too near for another save after this one.
                self._closed = spare < needed
            else:
                self._closed = late = spare <= min(pace, MAX_GAP)
        save = new or late or (by_clock and not self._closed)
        if save:
            wait = self._interval()
        return Decision(save=save, hold=self._closed, ticks=self._next(pace, min(wait, spare)))

    def _next(self, pace: float, soon: float) -> int:
        """Calls until the next beat: few enough for `MAX_GAP` and `soon`, else cheap enough.

        At most twice as many as the last time: a pace measured over few calls is a guess.
        """
        if pace == math.inf:
            return 1
        cost = min(self._costs, default=0.0)
        cheap = math.ceil(cost / (SHARE * pace))
        gap = min(MAX_GAP, max(soon, 0.0))
        return max(1, min(cheap, int(gap / pace), 2 * self._ticks))

    # --- what is known -----------------------------------------------------------------

    def _interval(self) -> float:
        """Seconds between saves by the policy; infinite if it does not go by the clock."""
        if self._seconds is None:
            return math.inf
        return self._seconds.interval(
            Measured(
                blocked=statistics.median(self._blocked) if self._blocked else None,
                durable=max(self._durable, default=None),
                mtbf=self._mtbf(),
            )
        )

    def _until_due(self) -> float:
        return self._interval() - (self._clock() - self._saved_at)

    def _needed(self) -> float:
        """Seconds from the beginning of a save until it is registered, with some to spare."""
        return 1.5 * max(self._durable) + REGISTRATION

    def _left(self, notice: Notice | None) -> float:
        if notice is None or notice.deadline is None:
            return math.inf
        return notice.deadline - self._wall()

    def _tell(self, notice: Notice) -> None:
        left = self._left(notice)
        logger.warning(
            "node %s, with rank %s, is going to be taken away%s: saving now",
            ", ".join(node[:8] for node in notice.nodes),
            ", ".join(map(str, notice.ranks)),
            f" in {max(left, 0):.0f} s" if left < math.inf else "",
        )
