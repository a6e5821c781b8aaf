"""When to save: what policies accept and answer."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ray_accel_ckpt import Checkpointer, EverySeconds, EverySteps, MaxOverhead
from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.policy import Measured, daly


@pytest.mark.parametrize("seconds", [0, -1, math.inf, math.nan, "5", None, True])
def test_every_seconds_takes_positive_seconds(seconds: Any) -> None:
    with pytest.raises(ConfigurationError, match="positive seconds"):
        EverySeconds(seconds)
    with pytest.raises(ConfigurationError, match="EverySeconds"):
        EverySeconds(seconds)


@pytest.mark.parametrize("limit", [0, 1, -0.1, 2, math.nan, "1%", None])
def test_max_overhead_takes_a_fraction(limit: Any) -> None:
    with pytest.raises(ConfigurationError, match="fraction"):
        MaxOverhead(limit)


@pytest.mark.parametrize("mtbf", [0, -1, math.inf, "an hour"])
def test_max_overhead_takes_seconds_between_failures(mtbf: Any) -> None:
    with pytest.raises(ConfigurationError, match="mtbf"):
        MaxOverhead(0.01, mtbf=mtbf)


class Both:
    def due(self, *, global_step: int) -> bool:
        return global_step > 0

    def interval(self, measured: Measured) -> float:
        return 1.0


@pytest.mark.parametrize("policy", [50, "often", object(), Both(), EverySteps])
def test_what_is_no_policy_is_refused(policy: Any) -> None:
    with pytest.raises(ConfigurationError, match="policy"):
        Checkpointer(save=policy)


def test_max_overhead_takes_the_longest_of_three() -> None:
    policy = MaxOverhead(0.01)
    assert policy.interval(Measured()) == MaxOverhead.FIRST
    assert policy.interval(Measured(blocked=0.5, durable=3.0)) == 50.0
    assert policy.interval(Measured(blocked=0.5, durable=70.0)) == 70.0
    often, rare = Measured(blocked=0.5, mtbf=100.0), Measured(blocked=0.5, mtbf=1e6)
    assert policy.interval(often) == 50.0
    assert policy.interval(rare) == daly(0.5, 1e6) + 0.5 > 50.0
    # What is given goes before what is seen.
    assert MaxOverhead(0.01, mtbf=1e6).interval(often) == daly(0.5, 1e6) + 0.5


def test_daly_loses_least() -> None:
    """The estimate, against the expected run time it is an estimate for."""

    def wall(interval: float, cost: float, mtbf: float) -> float:
        # Daly's model of the time a unit of work takes, restarts themselves left out.
        return mtbf * (math.exp((interval + cost) / mtbf) - 1) / interval

    for cost, mtbf in [(0.1, 60.0), (1.0, 60.0), (5.0, 3600.0), (60.0, 3600.0), (20.0, 60.0)]:
        best = daly(cost, mtbf)
        found = min((wall(x / 100 * best, cost, mtbf), x) for x in range(20, 300))[0]
        assert wall(best, cost, mtbf) <= 1.01 * found
    assert daly(130.0, 60.0) == 60.0
