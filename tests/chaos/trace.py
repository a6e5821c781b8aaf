"""A real spot trace at a compressed clock: nodes come and go as it says, the job goes on.

A trace is JSON: ``data[i]`` is the number of instances held at tick i,
``metadata.gap_seconds`` the length of a tick.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.cluster import Nodes
from tests.chaos.driver import Driver
from tests.chaos.job import EPOCH_STEPS, Job
from tests.chaos.verdict import lost, resumed, samples
from tests.chaos.watch import Watch

MOST = 4
"""Nodes, however many the trace has."""

LONGEST = 8
"""Ticks of a stretch without a change; the rest of a longer one is left out."""

LIMIT = 600.0
"""Seconds from the end of the stretch to that of the job."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The beginning of a trace, with what goes on unchanged for long made shorter.

    Attributes:
        counts: nodes at each tick.
        gap: seconds of a tick in the world.
    """

    counts: tuple[int, ...]
    gap: float

    @classmethod
    def read(cls, file: Path, ticks: int) -> Trace:
        """At most so many ticks, from the first one with a node on."""
        content = json.loads(file.read_text())
        counts = (min(MOST, int(count)) for count in content["data"])
        begun = itertools.dropwhile(lambda count: count == 0, counts)
        stretches = itertools.groupby(begun)
        shorter = (count for _, same in stretches for count in itertools.islice(same, LONGEST))
        gap = float(content["metadata"]["gap_seconds"])
        return cls(counts=tuple(itertools.islice(shorter, ticks)), gap=gap)


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """How it came out. `sizes`: workers of each life; `wrong`: empty if all is well."""

    seconds: float
    sizes: tuple[int, ...]
    steps: int
    lost: int
    wrong: tuple[str, ...]


def replay(trace: Trace, nodes: Nodes, directory: Path, *, tick: float, epochs: int) -> Replayed:
    """Run an elastic job of 1 to 4 workers while nodes come and go.

    After the stretch all nodes stay, so that the job ends.

    Args:
        tick: seconds of a tick here. Starting nodes and workers takes as long as
            ever: below some seconds a change overtakes the one before it.
    """
    out, storage = directory / "out", directory / "storage"
    out.mkdir(parents=True)
    storage.mkdir()
    job = Job(
        shape="elastic",
        workers=(1, MOST),
        every=4,
        storage=str(storage),
        out=str(out),
        epochs=epochs,
    )
    driver = Driver(job, nodes.address, directory / "driver.log")
    watch = Watch(storage / "run", out)
    begun = time.monotonic()
    try:
        ended = _follow(trace, nodes, driver, watch, out, tick)
        lives = watch.lives()
        wrong = [] if ended else ["the job did not end", driver.tail()]
        wrong += [*samples(lives, epochs=epochs), *resumed(lives, watch)] if ended else []
        return Replayed(
            seconds=time.monotonic() - begun,
            sizes=tuple(life.world_size for life in lives),
            steps=epochs * EPOCH_STEPS,
            lost=lost(lives),
            wrong=tuple(wrong),
        )
    finally:
        driver.kill()
        nodes.forget()


def _follow(
    trace: Trace, nodes: Nodes, driver: Driver, watch: Watch, out: Path, tick: float
) -> bool:
    """Whether the job ended."""
    for number, count in enumerate(trace.counts):
        print(f"tick {number}: {count} nodes", flush=True)
        while nodes.count() > count:
            nodes.lose_any()
        while nodes.count() < count:
            nodes.add()
        for _ in _seconds(tick):
            watch.look()
            if driver.supervise():
                return True
    nodes.have(MOST)
    (out / "go").touch()
    for _ in _seconds(LIMIT):
        watch.look()
        if driver.supervise():
            return True
    return False


def _seconds(seconds: float) -> Iterator[None]:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        yield
        time.sleep(0.05)
