"""A seed -> what is run and what strikes it when. Pure: the same seed, the same scenario."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.chaos.faults import KINDS, Fault, Storage
from tests.chaos.job import EPOCH_STEPS, EPOCHS, FIXED_STEPS, PACE, Shape

STEPS = {"fixed": FIXED_STEPS, "elastic": EPOCHS * EPOCH_STEPS}


@dataclass(frozen=True, kw_only=True)
class Strike:
    """A fault and its moment: once rank 0 has done a step, in any life, and a bit later.

    Counted in steps, so that a seed means about the same on any machine. If an
    earlier fault struck later than that, it is while the run still recovers.

    Attributes:
        delay: seconds.
    """

    fault: Fault
    step: int
    delay: float

    def __str__(self) -> str:
        return f"{self.fault} at step {self.step} + {self.delay:.3f} s"


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A job of 2 workers, or elastic of 1 to 2, and what strikes it, in order.

    Attributes:
        every: steps from save to save.
        memory: whether each step is kept in memory too.
    """

    seed: int
    shape: Shape
    every: int
    storage: Storage
    strikes: tuple[Strike, ...]
    memory: bool

    @property
    def steps(self) -> int:
        return STEPS[self.shape]

    @property
    def kind(self) -> str:
        """What the tables count it under."""
        return self.strikes[0].fault.kind

    def __str__(self) -> str:
        struck = "; ".join(map(str, self.strikes))
        memory = ", memory tier" if self.memory else ""
        return f"{self.shape}, saves every {self.every}{memory}, storage {self.storage}: {struck}"


def draw(seed: int) -> Scenario:
    """The scenario of a seed. As many seeds in a row as there are kinds have each kind once."""
    rng = random.Random(f"chaos-{seed}")
    first = KINDS[seed % len(KINDS)]
    shape: Shape = rng.choice([s for s in first.shapes for _ in range(2 if s == "fixed" else 1)])
    storage = rng.choices(first.needs, [3] + [1] * (len(first.needs) - 1))[0]
    others = [k for k in KINDS if storage in k.needs and shape in k.shapes]
    count = rng.choices([0, 1, 2], [6, 3, 1])[0]
    faults = [kind.drawn(rng, shape) for kind in [first, *rng.choices(others, k=count)]]
    # Not too late, so that there is something left to go wrong.
    steps = sorted(rng.randrange(1, STEPS[shape] * 2 // 3) for _ in faults)
    return Scenario(
        seed=seed,
        shape=shape,
        every=rng.choice([2, 3, 4, 5]),
        storage=storage,
        strikes=tuple(
            Strike(fault=fault, step=step, delay=round(rng.uniform(0, PACE), 3))
            for fault, step in zip(faults, steps, strict=True)
        ),
        # The last that is drawn: without it, a seed means what it has meant before there was one.
        memory=rng.random() < 1 / 3,
    )
