"""When to save: small objects, of two kinds.

A `StepPolicy` depends on the step alone, so every rank asks its own copy and gets
the same answer. A `TimePolicy` depends on clocks, which differ: rank 0's is asked,
and what follows reaches all ranks with the heartbeat.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ray_accel_ckpt.errors import ConfigurationError


@runtime_checkable
class StepPolicy(Protocol):
    """Decides by the number of steps. It may depend on nothing but its arguments."""

    def due(self, *, global_step: int) -> bool:
        """Whether to save after `global_step` completed steps (1 after the first)."""
        ...


@runtime_checkable
class TimePolicy(Protocol):
    """Decides by time. Rank 0's is asked, at each heartbeat."""

    def interval(self, measured: Measured) -> float:
        """Seconds from the beginning of one save to that of the next."""
        ...


SavePolicy = StepPolicy | TimePolicy


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What rank 0 has measured, in seconds; None where it has seen none yet.

    Attributes:
        blocked: what a save keeps the training thread waiting. The median of the last few.
        durable: from a save's beginning until rank 0's share is durable. The
            longest of the last few.
        mtbf: mean time between restarts of this run, over all its lives.
    """

    blocked: float | None = None
    durable: float | None = None
    mtbf: float | None = None


@dataclass(frozen=True)
class EverySteps:
    """Save after every `steps` calls of `Checkpointer.step`.

    Raises:
        ConfigurationError: if `steps` is not a positive integer.
    """

    steps: int

    def __post_init__(self) -> None:
        if type(self.steps) is not int or self.steps < 1:
            raise ConfigurationError(
                f"EverySteps takes a whole number of steps, at least 1; got {self.steps!r}",
                remedy="pass EverySteps(50), say; omit save= to save by hand only",
            )

    def due(self, *, global_step: int) -> bool:
        return global_step % self.steps == 0


@dataclass(frozen=True)
class EverySeconds:
    """Save when `seconds` have passed since the last save began, by rank 0's clock.

    Raises:
        ConfigurationError: if `seconds` is not a positive number.
    """

    seconds: float

    def __post_init__(self) -> None:
        _require_seconds("EverySeconds", self.seconds)

    def interval(self, measured: Measured) -> float:
        del measured  # a clock needs none
        return self.seconds


@dataclass(frozen=True)
class MaxOverhead:
    """Save as often as pays, and never so often that it costs more than `limit` of the time.

    The interval is the longest of three: what a save was measured to keep
    training waiting, divided by `limit`; the time a save needs to become
    durable; and, once the mean time between failures is known, the interval that
    loses least to saving and to work done again, in Daly's estimate

        sqrt(2 C M) (1 + sqrt(C / 2M) / 3 + C / 18M) - C    (M itself if C >= 2M)

    with C the cost of a save and M the mean time between failures. (J. T. Daly,
    "A higher order estimate of the optimum checkpoint interval for restart
    dumps", Future Generation Computer Systems 22, 2006; its first term is
    J. W. Young's, "A first order approximation to the optimum checkpoint
    interval", Communications of the ACM 17, 1974.)

    The first save comes after 30 s: there is nothing measured before it.

    Args:
        limit: fraction of the time, above 0 and below 1.
        mtbf: mean seconds between failures of the whole group of workers. None: as
            this run has seen it, from its second life on.

    Raises:
        ConfigurationError: a number outside of these.
    """

    limit: float = 0.01
    mtbf: float | None = None

    FIRST = 30.0

    def __post_init__(self) -> None:
        if type(self.limit) not in (int, float) or not 0 < self.limit < 1:
            raise ConfigurationError(
                f"MaxOverhead takes a fraction of the time, between 0 and 1; got {self.limit!r}",
                remedy="pass MaxOverhead(0.01) for one percent",
            )
        if self.mtbf is not None:
            _require_seconds("MaxOverhead(mtbf=)", self.mtbf)

    def interval(self, measured: Measured) -> float:
        cost = measured.blocked
        if cost is None:
            return self.FIRST
        mtbf = self.mtbf if self.mtbf is not None else measured.mtbf
        # From beginning to beginning: the work between two saves, and one save.
        optimum = daly(cost, mtbf) + cost if mtbf is not None else 0.0
        return max(cost / self.limit, measured.durable or 0.0, optimum)


def daly(cost: float, mtbf: float) -> float:
    """Seconds of work between two saves that lose least, see `MaxOverhead`."""
    if cost >= 2 * mtbf:
        return mtbf
    ratio = cost / (2 * mtbf)
    return math.sqrt(2 * cost * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def require_policy(policy: object) -> None:
    """Raise `ConfigurationError` unless `policy` is of one of the two kinds."""
    kinds = [isinstance(policy, kind) for kind in (StepPolicy, TimePolicy)]
    if sum(kinds) != 1 or isinstance(policy, type):
        both = all(kinds)
        raise ConfigurationError(
            f"save= takes a policy, not {policy!r}",
            why="it has both due() and interval()" if both else "",
            remedy="pass EverySteps(50), EverySeconds(600) or MaxOverhead(0.01), say",
        )


def _require_seconds(what: str, value: object) -> None:
    if type(value) not in (int, float) or not 0 < float(value) < math.inf:  # type: ignore[arg-type]
        raise ConfigurationError(f"{what} takes positive seconds; got {value!r}")
