"""From events to attempts: how far each came, what it saved, how it ended, what was lost."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.storage.journal import REACHED, Event

CONTROLLER = "controller"

# Texts of a journal come onto terminals.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


@dataclass(frozen=True, kw_only=True)
class Save:
    """One save of an attempt, as rank 0 saw it.

    Attributes:
        at: when training went on, in seconds since the epoch.
        blocked: seconds that training waited.
        durable: seconds from its beginning until the share was durable; None if that was
            never told: the attempt was lost before.
        nbytes: of rank 0's share.
        registered: whether Ray's controller told that it knows it.
    """

    name: str
    step: int
    at: float
    blocked: float
    durable: float | None
    nbytes: int | None
    registered: bool


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One life of the group of workers.

    Attributes:
        writer: its six hex digits.
        begun: when it could train, its state restored; seconds since the epoch.
        restoring: seconds that took, before.
        restoring_later: seconds of states that were loaded once it had begun.
        known: when the last was heard of it.
        resumed_from: a checkpoint's name; None: it began at the beginning.
        tier: "storage" or "memory", or None.
        points: (seconds since the epoch, step) at which it is known to have been, in order.
        ending: "finished", "failed: ..." or "lost"; "" for the last one if nobody told.
    """

    writer: str
    world_size: int
    begun: float
    restoring: float
    restoring_later: float
    known: float
    resumed_from: str | None
    tier: str | None
    points: tuple[tuple[float, int], ...]
    saves: tuple[Save, ...]
    ending: str

    @property
    def first(self) -> int:
        return self.points[0][1]

    @property
    def last(self) -> int:
        return max(step for _, step in self.points)

    def reached(self, step: int) -> float:
        """When it came to a step, on a straight line between what is known; its end if never."""
        for (t0, s0), (t1, s1) in zip(self.points, self.points[1:], strict=False):
            if s1 >= step and s1 > s0:
                return t0 + (t1 - t0) * (max(step, s0) - s0) / (s1 - s0)
        return self.begun if self.first >= step else self.known


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Where the time of a run went, in seconds.

    Attributes:
        training: on steps that nobody had made before; saves left out. It is the useful part.
        again: on steps that an attempt before had made.
        saving: waiting for saves to be frozen.
        restoring: loading a state.
        down: from the last that was heard of an attempt to the next one's restoring, unless it
            had finished: what comes after that is nobody's loss, and in no part.
    """

    training: float = 0.0
    again: float = 0.0
    saving: float = 0.0
    restoring: float = 0.0
    down: float = 0.0

    @property
    def all(self) -> float:
        return self.training + self.again + self.saving + self.restoring + self.down

    @property
    def goodput(self) -> float | None:
        """The useful part of the time, 0 to 1; None if no time is known."""
        return self.training / self.all if self.all > 0 else None


@dataclass(frozen=True, kw_only=True)
class History:
    """A run as far as its journal tells it."""

    attempts: tuple[Attempt, ...]
    events: tuple[Event, ...]
    spent: Spent
    lost: tuple[int, ...]
    """Steps that each attempt but the first had to make again."""
    down: tuple[float, ...]
    """Seconds before each attempt's restoring in which the run was down."""

    @property
    def begun(self) -> float:
        return self.attempts[0].begun - self.attempts[0].restoring

    @property
    def known(self) -> float:
        return max(attempt.known for attempt in self.attempts)

    @property
    def steps(self) -> int:
        return max(attempt.last for attempt in self.attempts)

    @property
    def saves(self) -> tuple[Save, ...]:
        return tuple(save for attempt in self.attempts for save in attempt.saves)


def history_of(events: Iterable[Event], *, where: str) -> History:
    """Put the events of one run together.

    Args:
        where: the run, for errors.

    Raises:
        ConfigurationError: no attempt is among them.
    """
    found = sorted(events, key=lambda event: event.at)
    started = [event for event in found if event.kind == "start"]
    if not started:
        raise ConfigurationError(
            "nothing is written down of this run",
            where=where,
            why="there is no journal of an attempt in its directory 'events'",
            remedy="give the run's own directory, the one that holds its checkpoints; runs of "
            "versions before 0.1 have no journal",
        )
    controller = [event for event in found if event.writer == CONTROLLER]
    registered = {_text(e.fields, "name") for e in controller if e.kind == "registered"}
    attempts = []
    for n, start in enumerate(started):
        own = [event for event in found if event.writer == start.writer]
        following = started[n + 1].at if n + 1 < len(started) else None
        failures = [
            e
            for e in controller
            if e.kind == "failure" and start.at <= e.at < (following or float("inf"))
        ]
        attempts.append(_attempt(start, own, failures, registered, last=following is None))
    down = tuple(_down(attempts))
    return History(
        attempts=tuple(attempts),
        events=tuple(found),
        spent=_spent(attempts, down),
        lost=tuple(_lost(attempts)),
        down=down,
    )


def _attempt(
    start: Event,
    own: Sequence[Event],
    failures: Sequence[Event],
    registered: set[str | None],
    *,
    last: bool,
) -> Attempt:
    resumed = [event.fields for event in own if event.kind == "resumed"]
    begins = next((fields for fields in resumed if fields.get("begins") is True), {})
    later = [fields for fields in resumed if fields is not begins]
    return Attempt(
        writer=start.writer,
        world_size=_number(start.fields, "world_size") or 1,
        begun=start.at,
        restoring=_seconds(begins, "seconds") or 0.0,
        restoring_later=sum(_seconds(fields, "seconds") or 0.0 for fields in later),
        known=max(event.at for event in own),
        resumed_from=_text(begins, "name"),
        tier=_text(begins, "tier"),
        points=_points(start, own),
        saves=_saves(own, registered),
        ending=_ending(own, failures, last=last),
    )


def _points(start: Event, own: Sequence[Event]) -> tuple[tuple[float, int], ...]:
    """Steps only grow, but where a loop goes back by itself: those are left out."""
    points = [(start.at, _number(start.fields, "step") or 0)]
    for event in own:
        step = _number(event.fields, "step")
        if event.kind not in REACHED or step is None:
            continue
        if step >= points[-1][1] and event.at >= points[-1][0]:
            points.append((event.at, step))
    return tuple(points)


def _saves(own: Sequence[Event], registered: set[str | None]) -> tuple[Save, ...]:
    durable = {_text(e.fields, "name"): e.fields for e in own if e.kind == "durable"}
    saves = []
    for event in own:
        if event.kind == "save":
            name = _text(event.fields, "name") or ""
            whole = durable.get(name, {})
            saves.append(
                Save(
                    name=name,
                    step=_number(event.fields, "step") or 0,
                    at=event.at,
                    blocked=_seconds(event.fields, "blocked") or 0.0,
                    durable=_seconds(whole, "seconds"),
                    nbytes=_number(whole, "share_nbytes"),
                    registered=name in registered,
                )
            )
    return tuple(saves)


def _ending(own: Sequence[Event], failures: Sequence[Event], *, last: bool) -> str:
    if failures:
        # After its end too: what was saved last may have failed.
        errors = failures[0].fields.get("errors")
        known = errors if isinstance(errors, dict) and errors else {"?": "unknown"}
        rank = next(iter(known))
        return f"failed: rank {_CONTROL.sub(' ', rank)}: {_text(known, rank) or 'unknown'}"
    # What was saved last may become durable after training has ended.
    going = [event.kind for event in own if event.kind in ("save", "heartbeat", "end")]
    if going[-1:] == ["end"]:
        return "finished"
    return "" if last else "lost"


def _spent(attempts: Sequence[Attempt], down: Sequence[float]) -> Spent:
    training = again = saving = restoring = 0.0
    made, heard = 0, -math.inf
    for attempt in attempts:
        new_from = attempt.begun
        if made > attempt.first:
            new_from = min(max(attempt.reached(made), attempt.begun), attempt.known)
        times = [save.at for save in attempt.saves]
        blocked = [save.blocked for save in attempt.saves]
        before = sum(blocked[: bisect_right(times, new_from)])
        # Where two attempts overlap, the time is that of the first.
        left = max(0.0, attempt.known - max(attempt.begun - attempt.restoring, heard))
        old = max(0.0, new_from - attempt.begun - before)
        parts = []
        for seconds in (attempt.restoring, sum(blocked), old, attempt.restoring_later):
            parts.append(min(seconds, left))
            left -= parts[-1]
        restoring += parts[0] + parts[3]
        saving += parts[1]
        again += parts[2]
        training += left
        made, heard = max(made, attempt.last), max(heard, attempt.known)
    return Spent(training=training, again=again, saving=saving, restoring=restoring, down=sum(down))


def _down(attempts: Sequence[Attempt]) -> Iterable[float]:
    yield 0.0
    heard = accumulate((attempt.known for attempt in attempts), max)
    for last, before, attempt in zip(heard, attempts, attempts[1:], strict=False):
        idle = max(0.0, attempt.begun - attempt.restoring - last)
        yield 0.0 if before.ending == "finished" else idle


def _lost(attempts: Sequence[Attempt]) -> Iterable[int]:
    made = attempts[0].last
    for attempt in attempts[1:]:
        yield max(0, made - attempt.first)
        made = max(made, attempt.last)


# --- what a journal says is believed as far as it makes sense ----------------------------


def _number(fields: Mapping[str, Any], name: str) -> int | None:
    """A count that a machine could have; None if it is none."""
    value = fields.get(name)
    return value if type(value) is int and 0 <= value < 2**63 else None


def _seconds(fields: Mapping[str, Any], name: str) -> float | None:
    value = fields.get(name)
    if type(value) not in (int, float) or not 0 <= value < 1e11:  # type: ignore[operator]
        return None
    return float(value) if math.isfinite(value) else None  # type: ignore[arg-type]


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    return _CONTROL.sub(" ", value) if isinstance(value, str) else None
