"""Whether a run that was struck came out as one that was not. Each check in one place."""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ray_accel_ckpt import open_checkpoint
from ray_accel_ckpt.errors import AccelCkptError
from ray_accel_ckpt.runtime.sweep import sweep_run
from tests.chaos.cluster import Nodes
from tests.chaos.records import Life
from tests.chaos.reference import order
from tests.chaos.scenario import Scenario
from tests.chaos.stage import Stage
from tests.chaos.watch import Watch

GRACE = 30.0
"""Seconds that Ray has to end its own helpers of a run that is over."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a scenario came out.

    Attributes:
        lives: of the worker group.
        lost: steps that were done more than once.
        wrong: what is not as it should be; empty if all is well.
        notes: what is worth knowing and no failure.
    """

    scenario: Scenario
    seconds: float
    lives: int
    starts: int
    lost: int
    wrong: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def verdict(self) -> str:
        return "ok" if not self.wrong else "FAILED"


def judge(stage: Stage, untouched: list[str]) -> Outcome:
    """Of a run that has ended."""
    seconds = time.monotonic() - stage.began
    lives = stage.watch.lives()
    wrong = [
        *(_bits(lives, untouched) if stage.scenario.shape == "fixed" else samples(lives, epochs=3)),
        *resumed(lives, stage.watch),
        *_noticed(stage, lives),
        *_result(stage),
        *_processes(stage.nodes, lives),
    ]
    left = stage.watch.orphans()
    return Outcome(
        scenario=stage.scenario,
        seconds=seconds,
        lives=len(lives),
        starts=stage.driver.starts,
        lost=lost(lives),
        wrong=(*wrong, *_orphans(stage)),
        notes=(f"left to sweep_run: {', '.join(left)}",) if left else (),
    )


def unfinished(stage: Stage, why: str) -> Outcome:
    """Of a run that did not end: what there is to see of it."""
    seconds = time.monotonic() - stage.began
    lives = stage.watch.lives()
    state = [
        f"life {life.number}: {life.world_size} workers, from {life.resumed} to {life.step}"
        for life in lives
    ]
    wrong = (why, *state, f"drivers' ends: {stage.driver.exits}", stage.driver.tail())
    return Outcome(
        scenario=stage.scenario,
        seconds=seconds,
        lives=len(lives),
        starts=stage.driver.starts,
        lost=lost(lives),
        wrong=wrong,
    )


def lost(lives: list[Life]) -> int:
    """Steps that were done and had to be done again."""
    pairs = itertools.pairwise(life for life in lives if life.resumed is not None)
    return sum(max(0, before.step - (after.resumed or 0)) for before, after in pairs)


def _bits(lives: list[Life], untouched: list[str]) -> Iterator[str]:
    last = lives[-1]
    ended = last.digests
    if not last.ranks[0].steps:
        # Resumed at the end, with no forward after it: rank 0's buffers are on all ranks.
        ended, untouched = ended[:1], untouched[:1]
    if ended != untouched:
        yield f"other bits: ended with {ended}, untouched {untouched}"


def samples(lives: list[Life], *, epochs: int) -> Iterator[str]:
    """Each sample once an epoch, in the order of one undisturbed run."""
    counted: dict[int, tuple[int, list[int]]] = {}
    for life in lives:
        counted = {step: each for step, each in counted.items() if step <= (life.resumed or 0)}
        ranks = [life.ranks[rank].steps for rank in sorted(life.ranks)]
        if len(ranks) == life.world_size:
            for step in set.intersection(*(set(steps) for steps in ranks)):
                together = [i for steps in ranks for i in steps[step]["indices"]]
                counted[step] = ranks[0][step]["epoch"], together
    if sorted(counted) != list(range(1, len(counted) + 1)):
        yield f"steps are missing: there are {sorted(counted)}"
    for epoch in range(epochs):
        steps = [counted[step] for step in sorted(counted)]
        came = [index for of, indices in steps if of == epoch for index in indices]
        if came != order(epoch):
            yield f"another order in epoch {epoch}: {came}"


def resumed(lives: list[Life], watch: Watch) -> Iterator[str]:
    """No step is lost that was saved: each life goes on from what was registered before it.

    But for what the campaign has damaged: that must be passed over.
    """
    for life in lives:
        first = life.ranks[0]
        if watch.damaged.get(first.source or "", math.inf) < first.began:
            yield f"life {life.number} resumed from {first.source}, which is damaged"
        floor = watch.floor(life.ranks[0].began)
        if life.resumed is not None and life.resumed < floor:
            yield f"life {life.number} resumed at {life.resumed}, registered was {floor}"


def _noticed(stage: Stage, lives: list[Life]) -> Iterator[str]:
    """With enough notice nothing is lost that was done before it, unless more struck meanwhile."""
    for drained in stage.drained:
        if any(drained.announced < struck < drained.taken for struck in stage.struck):
            continue
        for life in lives:
            resumed = life.resumed
            if life.number == drained.life + 1 and resumed is not None and resumed < drained.step:
                yield f"life {life.number} resumed at {resumed}, the notice came at {drained.step}"


def _result(stage: Stage) -> Iterator[str]:
    """The run's latest checkpoint is its end, and good."""
    registered = stage.watch.registered()
    if not registered:
        yield "nothing is registered in the end"
        return
    latest = registered[-1]
    if latest.step != stage.scenario.steps:
        yield f"the last checkpoint is {latest.name}, the end is {stage.scenario.steps}"
    try:
        open_checkpoint(latest.path).verify()
    except AccelCkptError as e:
        yield f"the last checkpoint is not good: {e}"


def _orphans(stage: Stage) -> Iterator[str]:
    """What a run did not live to sweep itself, `sweep_run` does."""
    sweep_run(stage.storage, "run")
    yield from (f"orphan left: {name}" for name in stage.watch.orphans())


def _processes(nodes: Nodes, lives: list[Life]) -> Iterator[str]:
    """None of the run's is left, nor what one held; Ray is given a moment to end its own."""
    workers = {rank.pid for life in lives for rank in life.ranks.values()}
    until = time.monotonic() + GRACE
    while (left := nodes.processes()) and time.monotonic() < until:
        time.sleep(0.05)
    for pid, title in left.items():
        yield f"process left: {pid} {title}{' (a worker)' if pid in workers else ''}"
    for path in Path("/dev/shm").iterdir():
        # The machine may be shared: only what bears our name, or the number of a worker.
        numbers = set(map(int, re.findall("[0-9]+", path.name)))
        if "ray_accel_ckpt" in path.name or workers & numbers:
            yield f"left in /dev/shm: {path.name}"
