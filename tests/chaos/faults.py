"""What goes wrong: each a frozen object that is drawn from a seed and strikes a stage."""

from __future__ import annotations

import dataclasses
import os
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from tests.chaos.job import Shape
from tests.chaos.seam import Scope, Switch, Trouble

if TYPE_CHECKING:
    from tests.chaos.stage import Stage

Storage = Literal["disk", "switched", "small"]
"""A plain directory; one behind `seam.SwitchedFileSystem`; a filesystem of a few megabytes."""

Back = float | None
"""Seconds until another node comes for one that is lost. None: none comes."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        kind: as the tables name it.
        needs: storages on which it can strike; the first is the one to be had for it.
        shapes: jobs that it is for.
    """

    kind: ClassVar[str]
    needs: ClassVar[tuple[Storage, ...]] = ("disk", "switched", "small")
    shapes: ClassVar[tuple[Shape, ...]] = ("fixed", "elastic")

    @classmethod
    def drawn(cls, rng: random.Random, shape: Shape) -> Fault:
        raise NotImplementedError

    def strike(self, stage: Stage) -> None:
        """Do it now. What comes later of it is left to `stage.later`."""
        raise NotImplementedError

    def __str__(self) -> str:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        told = ", ".join(f"{name} {value}" for name, value in fields.items())
        return f"{self.kind} ({told})" if told else self.kind


def _rank(rng: random.Random) -> int:
    return rng.randrange(2)


def _back(rng: random.Random, shape: Shape) -> Back:
    """With a fixed number of workers nothing goes on without another node."""
    return 0.0 if shape == "fixed" else rng.choice([0.0, round(rng.uniform(1, 4), 1), None])


@dataclass(frozen=True, kw_only=True)
class KillWorker(Fault):
    kind = "worker killed"
    rank: int

    @classmethod
    def drawn(cls, rng: random.Random, shape: Shape) -> Fault:
        return cls(rank=_rank(rng))

    def strike(self, stage: Stage) -> None:
        stage.kill(stage.victim(self.rank).pid)


@dataclass(frozen=True, kw_only=True)
class KillNode(Fault):
    kind = "raylet killed"
    rank: int
    back: Back

    @classmethod
    def drawn(cls, rng: random.Random, shape: Shape) -> Fault:
        return cls(rank=_rank(rng), back=_back(rng, shape))

    def strike(self, stage: Stage) -> None:
        stage.lose(stage.victim(self.rank).node, self.back)


@dataclass(frozen=True, kw_only=True)
class KillDriver(Fault):
    """The job is submitted again at once.

    Not for elastic jobs: Ray keeps nodes reserved for a dead one for 180 s, and
    the next waits so long.
    """

    kind = "driver killed"
    shapes = ("fixed",)

    @classmethod
    def drawn(cls, rng: random.Random, shape: Shape) -> Fault:
        return cls()

    def strike(self, stage: Stage) -> None:
        stage.driver.kill()


@dataclass(frozen=True, kw_only=True)
class DrainInTime(Fault):
    """A notice, and the node goes when it was said."""

    kind = "drained in time"
    rank: int
    notice: float
    back: Back

    @classmethod
    def drawn(cls, rng: random.Random, shape: Shape) -> Fault:
        return cls(rank=_rank(rng), notice=round(rng.uniform(5, 11), 1), back=_back(rng, shape))

    def strike(self, stage: Stage) -> None:
        node = stage.victim(self.rank, stepping=True).node
        stage.drain(node, self.notice, taken_after=self.notice, back=self.back, in_time=True)


@dataclass(frozen=True, kw_only=True)
class DrainCutShort(Fault):
    """A notice of half a minute, and the node goes at once all the same."""

    kind = "drain cut short"
    rank: int
    taken_after: float
    back: Back

    @classmethod
    def drawn(cls, rng: random.Random, shape: Shape) -> Fault:
        return cls(rank=_rank(rng), taken_after=round(rng.uniform(0, 1), 2), back=_back(rng, shape))

    def strike(self, stage: Stage) -> None:
        node = stage.victim(self.rank).node
        stage.drain(node, 30.0, taken_after=self.taken_after, back=self.back, in_time=False)


def _scope(rng: random.Random, shape: Shape) -> Scope:
    """Ray's controller does not survive an error of its own record of the run.

    Then the driver ends and is started again: as `KillDriver`, not for elastic jobs.
    """
    return "everything" if shape == "fixed" and rng.random() < 0.3 else "uploads"


@dataclass(frozen=True, kw_only=True)
class StorageFails(Fault):
    """Errors that pass."""

    kind = "storage fails"
    needs = ("switched",)
    trouble: Trouble
    scope: Scope
    seconds: float

    @classmethod
    def drawn(cls, rng: random.Random, shape: Shape) -> Fault:
        trouble = rng.choice(["reset", "throttled", "timeout"])
        seconds = round(rng.uniform(0.5, 4), 1)
        return cls(trouble=trouble, scope=_scope(rng, shape), seconds=seconds)

    def strike(self, stage: Stage) -> None:
        stage.switch(Switch(trouble=self.trouble, scope=self.scope, until=_from_now(self.seconds)))


@dataclass(frozen=True, kw_only=True)
class StorageStalls(Fault):
    """No answer for a while."""

    kind = "storage stalls"
    needs = ("switched",)
    scope: Scope
    seconds: float

    @classmethod
    def drawn(cls, rng: random.Random, shape: Shape) -> Fault:
        return cls(scope=_scope(rng, shape), seconds=round(rng.uniform(0.5, 4), 1))

    def strike(self, stage: Stage) -> None:
        stage.switch(Switch(trouble="stall", scope=self.scope, until=_from_now(self.seconds)))


@dataclass(frozen=True, kw_only=True)
class DiskFull(Fault):
    """No room: really, on a small filesystem, where Ray's record is cut off too; else as told."""

    kind = "disk full"
    needs = ("small",)
    seconds: float

    @classmethod
    def drawn(cls, rng: random.Random, shape: Shape) -> Fault:
        return cls(seconds=round(rng.uniform(0.5, 3), 1))

    def strike(self, stage: Stage) -> None:
        stage.fill(self.seconds)


@dataclass(frozen=True, kw_only=True)
class Damage(Fault):
    """A worker dies, and before the next attempt a file of the newest checkpoint is damaged."""

    kind = "checkpoint damaged"
    file: Literal["shard", "manifest"]
    how: Literal["flipped", "cut off", "gone"]
    rank: int
    where: float

    @classmethod
    def drawn(cls, rng: random.Random, shape: Shape) -> Fault:
        return cls(
            file=rng.choice(["shard", "manifest"]),
            how=rng.choice(["flipped", "cut off", "gone"]),
            rank=_rank(rng),
            where=round(rng.random(), 3),
        )

    def strike(self, stage: Stage) -> None:
        # One to fall back to, else the run is lost, and says so.
        stage.until(lambda: len(stage.watch.whole()) >= 2, "two checkpoints to be whole")
        stage.end_attempt(self.rank)
        newest = stage.watch.whole()[-1]
        stage.watch.damaged[newest.name] = time.time()
        files = sorted(newest.glob(f"{self.file}-*"))
        file = files[self.rank % len(files)]
        data = bytearray(file.read_bytes())
        at = int(self.where * len(data))
        if self.how == "gone":
            file.unlink()
        elif self.how == "cut off":
            os.truncate(file, at)
        else:
            data[at] ^= 1 << (at % 8)
            file.write_bytes(data)


KINDS: tuple[type[Fault], ...] = (
    KillWorker,
    KillNode,
    KillDriver,
    DrainInTime,
    DrainCutShort,
    StorageFails,
    StorageStalls,
    DiskFull,
    Damage,
)


def _from_now(seconds: float) -> float:
    return time.time() + seconds
