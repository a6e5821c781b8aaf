"""A run as its journal tells it: lost in its first attempt, announced to go in its second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ray_accel_ckpt.storage.journal import Event

BEGAN = 1_790_000_000.0
STEP = 0.6
"""Seconds a step."""


def event(at: float, kind: str, writer: str, **fields: Any) -> Event:
    return Event(at=BEGAN + at, kind=kind, writer=writer, fields=fields)


def attempt(
    writer: str,
    at: float,
    first: int,
    last: int,
    *,
    tier: str | None = None,
    unfinished: int | None = None,
    end: bool = False,
) -> list[Event]:
    """Saves each 50 steps, of which the one at step `unfinished` never becomes durable."""
    found = [event(at, "start", writer, step=first, world_size=4, policy="EverySteps(steps=50)")]
    if tier is not None:
        name = f"checkpoint_{first:08d}_000000"
        resumed = {"name": name, "step": first, "tier": tier, "begins": True, "seconds": 2.0}
        found.append(event(at, "resumed", writer, **resumed))
    for step in range(first + 10, last + 1, 10):
        now = at + (step - first) * STEP
        found.append(event(now, "heartbeat", writer, step=step))
        if step % 50 == 0:
            name = f"checkpoint_{step:08d}_{writer}"
            found.append(event(now, "save", writer, name=name, step=step, epoch=0, blocked=0.5))
            if step != unfinished:
                durable = {"name": name, "step": step, "seconds": 3.0, "share_nbytes": 7}
                found.append(event(now, "durable", writer, **durable))
                found.append(event(now, "registered", "controller", name=name))
    if end:
        found.append(event(at + (last - first) * STEP, "end", writer, step=last))
    return found


def run() -> list[Event]:
    text = "ActorDiedError: the node is gone"
    return [
        *attempt("aaaaaa", 0, 0, 240, unfinished=200),
        event(146, "failure", "controller", errors={"2": text}),
        *attempt("bbbbbb", 180, 150, 300, tier="storage"),
        event(268, "notice", "bbbbbb", step=296, nodes=["ff"], ranks=[1], deadline=BEGAN + 300),
        *attempt("cccccc", 300, 300, 400, tier="memory", end=True),
    ]


def write(directory: Path) -> Path:
    """The run's directory, with its journal as it would lie there."""
    for writer in ("aaaaaa", "bbbbbb", "cccccc", "controller"):
        events = [event for event in run() if event.writer == writer]
        path = directory / "events" / f"{int(events[0].at * 1000)}-{writer}-0.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [{"at": e.at, "event": e.kind, **e.fields} for e in events]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory
