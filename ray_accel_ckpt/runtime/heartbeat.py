"""Every few steps one small exchange: is a node going away, is a save due by the clock?

A beat is a collective, so all ranks must come to it at the same call. They do by
construction: rank 0 says with each beat after how many calls the next one comes,
and nothing else decides that.

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
from dataclasses import dataclass

from ray_accel_ckpt.policy import Measured, SavePolicy, StepPolicy, TimePolicy
from ray_accel_ckpt.runtime.exchange import Decision, Exchange, Preemption

logger = logging.getLogger(__name__)

SHARE = 0.005
"""Of the time of training, what beats may cost."""

MAX_GAP = 5.0
"""Seconds between two beats, at most, as long as calls come at a steady pace."""

REGISTRATION = 4.0
"""Seconds that Ray takes to register what is durable on all ranks: two polls of its controller."""

UNTOLD = 110.0
"""Seconds until a deadline that nobody told. Ray ends the group 120 s after it has heard of the
notice (`DEFAULT_PREEMPTION_DEADLINE_S`), which may be some seconds before a beat does."""


class Heartbeat:
    """Says whether to save now: the same on every rank.

    Args:
        exchange: None if there is nothing to ask peers or Ray for.
        policy: None: only notices are acted upon.
        mtbf: what this run has seen of failures, see `Measured`.
        noticed: told, on rank 0, of each notice when it is first seen.
        clock, wall: seconds; monotonic, and since the epoch. Replaced in simulations.
    """

    def __init__(
        self,
        exchange: Exchange | None,
        policy: SavePolicy | None,
        *,
        mtbf: Callable[[], float | None] = lambda: None,
        noticed: Callable[[Preemption], None] = lambda notice: None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._exchange, self._mtbf, self._noticed = exchange, mtbf, noticed
        self._steps = policy if isinstance(policy, StepPolicy) else None
        self._seconds = policy if isinstance(policy, TimePolicy) else None
        self._clock, self._wall = clock, wall
        # Steps of training and of an evaluation differ in length: each kind is counted by itself.
        self._training, self._other = _Count(), _Count()
        self._called_at = self._saved_at = clock()
        self._saving = 0.0
        self._costs: deque[float] = deque(maxlen=5)
        self._blocked: deque[float] = deque(maxlen=5)
        self._durable: deque[float] = deque(maxlen=3)
        self._notice: Preemption | None = None
        self._deadline = math.inf
        self._closed = self._hold = False

    def after_step(self, global_step: int) -> bool:
        """Whether to save after this step. Collective when a beat is due."""
        asked = self._tick(self._training)
        by_step = self._steps is not None and self._steps.due(global_step=global_step)
        return asked or (by_step and not self._hold)

    def tick(self) -> bool:
        """Whether a beat asks for a save; False between beats. Collective when one is due."""
        return self._tick(self._other)

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

    def also_blocked(self, seconds: float) -> None:
        """Of the last save that was measured: what it blocked after it had returned."""
        if self._blocked:
            self._blocked[-1] += seconds

    # --- one beat ----------------------------------------------------------------------

    def _tick(self, count: _Count) -> bool:
        if self._exchange is None:
            return False
        # What passed since the last call, of whichever kind, is this call's.
        now = self._clock()
        count.passed += now - self._called_at
        count.saving += self._saving
        self._called_at, self._saving = now, 0.0
        count.until_beat -= 1
        # Below zero after an exchange that failed: then each call tries again.
        return count.until_beat <= 0 and self._beat(self._exchange, count)

    def _beat(self, exchange: Exchange, count: _Count) -> bool:
        begun = self._called_at
        pace = count.pace()
        notice = exchange.notice()
        # Only rank 0's clocks and policy are asked, so only they need to be right.
        own = self._decide(notice, pace, count) if exchange.rank == 0 else None
        decision = exchange.from_rank_zero(own)
        count.begin(decision.ticks)
        self._hold = decision.hold
        self._called_at = self._clock()
        self._costs.append(self._called_at - begun)
        return decision.save

    def _decide(self, notice: Preemption | None, pace: _Pace, count: _Count) -> Decision:
        wait = self._until_due()
        by_clock = wait <= (pace.work / 2 if pace.work < math.inf else 0)
        new = False
        if notice is not None and notice != self._notice:
            new = True
            self._see(notice)
            self._noticed(notice)
        left = self._deadline - self._wall()
        if left <= 0:
            # It was to be gone by now, and nobody knows any longer what will be.
            self._closed = False
        late = False
        spare = math.inf
        if self._durable and 0 < left < math.inf and not self._closed:
            spare = left - self._needed()
            if new:
                # Too near for another save after this one?
                self._closed = spare < self._needed()
            else:
                # The next call may come a quarter later than the pace says.
                self._closed = spare <= (1.25 * pace.all if pace.all < math.inf else MAX_GAP)
                late = self._closed and left > max(self._durable)
        save = new or late or (by_clock and not self._closed)
        if save:
            wait = self._interval()
        ticks = self._next(pace, min(wait, spare), count.ticks)
        return Decision(save=save, hold=self._closed, ticks=ticks)

    def _next(self, pace: _Pace, soon: float, before: int) -> int:
        """Calls until the next beat: few enough for `MAX_GAP` and `soon`, else cheap enough.

        At most twice as many as the last time: a pace measured over few calls is a guess.
        """
        if pace.all == math.inf:
            return 1
        cost = min(self._costs, default=0.0)
        cheap = math.ceil(cost / (SHARE * pace.work))
        gap = min(MAX_GAP, max(soon, 0.0))
        return max(1, min(cheap, int(gap / pace.all), 2 * before))

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

    def _see(self, notice: Preemption) -> None:
        """Take in a notice that was not there before, or not so."""
        self._notice, self._closed = notice, False
        told = notice.deadline is not None
        now = self._wall()
        if notice.deadline is not None:
            self._deadline = notice.deadline
        elif not now < self._deadline <= now + UNTOLD:
            # Not if one is under way: Ray counts from the first that it heard of.
            self._deadline = now + UNTOLD
        logger.warning(
            "node %s, with rank %s, is going to be taken away%s: saving now",
            ", ".join(node[:8] for node in notice.nodes),
            ", ".join(map(str, notice.ranks)),
            f" in {max(self._deadline - now, 0):.0f} s" if told else "",
        )


@dataclass(frozen=True, kw_only=True)
class _Pace:
    """Seconds a call: of work alone, and with what saves took."""

    work: float
    all: float


@dataclass(kw_only=True)
class _Count:
    """Of the calls of one kind.

    Attributes:
        until_beat: calls that are left.
        ticks: calls from the last beat to the next; 0 before the first beat.
        passed: seconds that calls took since the last beat, and
        saving: those of them that saves took.
    """

    until_beat: int = 1
    ticks: int = 0
    passed: float = 0.0
    saving: float = 0.0

    def begin(self, ticks: int) -> None:
        """A beat was; the next one comes after so many calls."""
        self.until_beat = self.ticks = ticks
        self.passed = self.saving = 0.0

    def pace(self) -> _Pace:
        if self.ticks == 0:
            return _Pace(work=math.inf, all=math.inf)
        work = max(1e-9, (self.passed - self.saving) / self.ticks)
        return _Pace(work=work, all=max(work, self.passed / self.ticks))
