"""A group of workers in simulated time: the real `Heartbeat` on each rank, all else made up.

Ranks step together, as data parallelism makes them. Their clocks disagree. Uploads
go one after the other, a save waits while two are under way, and what is durable is
registered at one of the next two polls.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from ray_accel_ckpt.policy import SavePolicy
from ray_accel_ckpt.runtime.exchange import Decision, Preemption
from ray_accel_ckpt.runtime.heartbeat import Heartbeat

SLOTS = 2
POLL = 2.0
"""Seconds between two polls of Ray's controller."""


@dataclass(kw_only=True)
class Save:
    step: int
    begun: float
    durable: float
    registered: float
    callbacks: list[Callable[[], None]] = field(default_factory=list)


@dataclass(kw_only=True)
class World:
    """Everything that a simulated run is made of, drawn from a seed."""

    seed: int
    policy: SavePolicy | None
    ranks: int = 3
    pace: float = 0.0
    upload: float = 0.0
    blocked: float = 0.0
    cost: float = 0.0

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.pace = self.pace or 10 ** self.draw.uniform(-2, 0.7)
        self.upload = self.upload or 10 ** self.draw.uniform(-1, 1.3)
        self.blocked = self.blocked or self.upload / 20
        self.cost = self.cost or self.draw.uniform(0.002, 0.015)
        self.now = 0.0
        self.step = 0
        self.beats: list[float] = []
        self.saves: list[Save] = []
        self.notices: list[tuple[float, Preemption]] = []
        self._word: Decision | None = None
        self.workers = [
            Heartbeat(
                _Exchange(self, rank),
                self.policy,
                clock=lambda skew=rank * 1e4: self.now + skew,
                wall=lambda skew=rank * 1e5: self.now + skew,
            )
            for rank in range(self.ranks)
        ]

    def drain(self, *, at: float, lead: float, node: str = "a" * 56) -> Preemption:
        """Ray's watcher looks every 5 s, then tells the workers."""
        seen = at + self.draw.uniform(0, 5)
        notice = Preemption(deadline=at + lead, nodes=(node,), ranks=(1,))
        self.notices.append((seen, notice))
        return notice

    def run(self, until: float, *, evaluating: bool = False) -> None:
        while self.now < until:
            self._pass(self.pace * self.draw.uniform(0.8, 1.25))
            if evaluating:
                answers = [worker.tick() for worker in self.workers]
            else:
                self.step += 1
                answers = [worker.after_step(self.step) for worker in self.workers]
            assert len(set(answers)) == 1, "the ranks do not agree"
            if answers[0]:
                self._save()

    def registered(self, by: float) -> list[Save]:
        return [save for save in self.saves if save.registered <= by]

    def _save(self) -> None:
        begun = self.now
        under_way = [s.durable for s in self.saves if s.durable > begun]
        frozen = self.blocked + (begun if len(under_way) < SLOTS else under_way[-SLOTS])
        taken = self.upload * self.draw.uniform(0.8, 1.25)
        durable = max([frozen, *under_way]) + taken
        poll = durable + self.draw.uniform(0, 2 * POLL)
        save = Save(step=self.step, begun=begun, durable=durable, registered=poll)
        for worker in self.workers:
            self.now = begun
            with worker.saving() as done:
                self._pass(frozen - begun)
            save.callbacks.append(done)
        self.saves.append(save)

    def _pass(self, seconds: float) -> None:
        end = self.now + seconds
        for save in self.saves:
            if save.callbacks and save.durable <= end:
                self.now = save.durable
                for done in save.callbacks:
                    done()
                save.callbacks.clear()
        self.now = end


class _Exchange:
    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank = world, rank

    def notice(self) -> Preemption | None:
        if self.rank == 0:
            self.world.beats.append(self.world.now)
            self.world.now += self.world.cost
        seen = [notice for at, notice in self.world.notices if at <= self.world.now]
        return seen[-1] if seen else None

    def from_rank_zero(self, decision: Decision | None) -> Decision:
        if self.rank == 0:
            self.world._word = decision
        assert self.world._word is not None
        return self.world._word


def longest_gap(times: list[float], since: float) -> float:
    later = [t for t in times if t >= since]
    return max((b - a for a, b in itertools.pairwise(later)), default=math.inf)
