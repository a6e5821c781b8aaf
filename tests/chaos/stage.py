"""One scenario, played: a run is started, struck, and watched to its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.chaos.cluster import Nodes
from tests.chaos.driver import Driver
from tests.chaos.job import Job
from tests.chaos.records import Life, Rank
from tests.chaos.scenario import Scenario
from tests.chaos.seam import Switch
from tests.chaos.watch import Watch

LIMIT = 300.0
"""Seconds for one scenario."""

SMALL = 4 * 2**20
"""Bytes of a small filesystem: many checkpoints of the jobs here."""


class StuckError(Exception):
    """Something did not come within the limit."""


@dataclass(frozen=True, kw_only=True)
class Drained:
    """A drain in time, as it was announced in a life at a step; a node is `taken` later.

    Attributes:
        announced, taken: seconds since the epoch.
    """

    life: int
    step: int
    announced: float
    taken: float


class Stage:
    """What a fault strikes.

    Attributes:
        storage: the directory that the run is in.
        struck: the moments of all strikes, seconds since the epoch.
        drained: the drains with enough time.
    """

    def __init__(self, scenario: Scenario, nodes: Nodes, directory: Path, *, limit: float) -> None:
        self.scenario, self.nodes = scenario, nodes
        self._out = directory / "out"
        self._out.mkdir(parents=True)
        self.storage = directory / "storage"
        self.storage.mkdir()
        self._control = directory / "switch.json"
        self._mounted = scenario.storage == "small" and _mounted(self.storage)
        switched = scenario.storage != "disk" and not self._mounted
        job = Job(
            shape=scenario.shape,
            workers=(1, 2),
            every=scenario.every,
            storage=str(self.storage),
            out=str(self._out),
            control=str(self._control) if switched else None,
            memory=scenario.memory,
        )
        self.driver = Driver(job, nodes.address, directory / "driver.log")
        self.watch = Watch(self.storage / "run", self._out)
        self.struck: list[float] = []
        self.drained: list[Drained] = []
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._deadline = time.monotonic() + limit
        self.began = time.monotonic()

    def play(self) -> None:
        """Run the job to its end, with all that strikes it. Raises `StuckError`."""
        for strike in self.scenario.strikes:
            self.until(partial(self._reached, strike.step), f"step {strike.step}")
            time.sleep(strike.delay)
            self.watch.look()
            self.struck.append(time.time())
            strike.fault.strike(self)
        self.until(lambda: not self._later, "all to have struck")
        (self._out / "go").touch()
        self.until(self.driver.supervise, "the job to end")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Keep all going until `condition` holds."""
        while not condition():
            if time.monotonic() > self._deadline:
                raise StuckError(f"waited in vain for {what}")
            self.driver.supervise()
            self.watch.look()
            now = time.monotonic()
            due = [each for each in self._later if each[0] <= now]
            self._later = [each for each in self._later if each[0] > now]
            for _, action in due:
                action()
            time.sleep(0.02)

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        self._later.append((time.monotonic() + seconds, action))

    def close(self) -> None:
        """End what is left of the run."""
        self.driver.kill()
        if self.driver.exits or self.nodes.processes():
            self.nodes.forget()
        if self._mounted:
            subprocess.run(["umount", "--lazy", str(self.storage)], check=True)  # noqa: S607

    # --- what faults do ----------------------------------------------------------------

    def victim(self, rank: int, *, stepping: bool = False) -> Rank:
        """A worker that lives: the last rank if there are not so many.

        Args:
            stepping: it must have done a step in this life.
        """
        found: list[Rank] = []

        def there() -> bool:
            found[:] = self._alive(rank, stepping=stepping)
            return bool(found)

        self.until(there, f"rank {rank} to live")
        return found[0]

    def kill(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def end_attempt(self, rank: int) -> None:
        """Kill a worker, and wait until the others of its life are gone too."""
        victim = self.victim(rank)
        pids = [each.pid for each in self.watch.lives()[-1].ranks.values()]
        self.kill(victim.pid)
        self.until(lambda: not any(map(_lives, pids)), "the group to end")

    def lose(self, node: str, back: float | None) -> None:
        """A node goes, and another comes `back` seconds later; at once if none is left."""
        if not self.nodes.lose(node):
            return
        if back is None and self.nodes.count() == 0:
            back = 0.0
        if back is not None:
            self.later(back, self.nodes.add)

    def drain(
        self, node: str, notice: float, *, taken_after: float, back: float | None, in_time: bool
    ) -> None:
        """Ray is told that a node goes in `notice` seconds."""
        life = self.watch.lives()[-1]
        if in_time:
            now = time.time()
            self.drained.append(
                Drained(life=life.number, step=life.step, announced=now, taken=now + taken_after)
            )
        self.nodes.drain(node, notice)
        self.later(taken_after, lambda: self.lose(node, back))

    def switch(self, switch: Switch) -> None:
        switch.write(self._control)
        self.later(switch.until - time.time(), lambda: None)

    def fill(self, seconds: float) -> None:
        """No room for a while: to the last byte if the filesystem is small, else as errors."""
        if not self._mounted:
            self.switch(Switch(trouble="full", scope="uploads", until=time.time() + seconds))
            return
        ballast = self.storage / "ballast"
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        self.later(seconds, ballast.unlink)

    # --- inside ------------------------------------------------------------------------

    def _reached(self, step: int) -> bool:
        return any(life.step >= step for life in self.watch.lives() if life.ranks[0].steps)

    def _alive(self, rank: int, *, stepping: bool) -> list[Rank]:
        lives: list[Life] = self.watch.lives()[-1:]
        for life in lives:
            found = life.ranks.get(min(rank, life.world_size - 1))
            if found is not None and _lives(found.pid):
                return [found] if found.steps or not stepping else []
        return []


def _lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _mounted(directory: Path) -> bool:
    """A small filesystem there, if this user may mount one."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", str(directory)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


@contextlib.contextmanager
def set_for(
    scenario: Scenario, nodes: Nodes, directory: Path, *, limit: float = LIMIT
) -> Iterator[Stage]:
    """A stage with two nodes, cleared in the end."""
    nodes.have(2)
    stage = Stage(scenario, nodes, directory, limit=limit)
    try:
        yield stage
    finally:
        stage.close()
