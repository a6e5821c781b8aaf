"""`ray-accel-ckpt report`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ray_accel_ckpt.cli import output
from ray_accel_ckpt.cli.options import Anonymous, AsJson, EndpointUrl, Region, Run, place
from ray_accel_ckpt.location import require_local

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ray_accel_ckpt.report.history import Attempt, History, Spent


@dataclass(frozen=True, kw_only=True)
class Reported:
    """What a run's journal tells.

    Attributes:
        begun, known: when it began and when the last was heard of it, seconds since the epoch.
        goodput: the part of that time that went to steps nobody had made before; what lies between
            a finished attempt and the next is left out.
        lost: steps that each attempt but the first had to make again.
        written: files that were asked for.
    """

    run: str
    begun: float
    known: float
    steps: int
    goodput: float | None
    spent: Spent
    lost: tuple[int, ...]
    attempts: tuple[Attempt, ...]
    written: tuple[str, ...]


def report(
    run: Run,
    html: Annotated[
        str | None,
        typer.Option("--html", metavar="FILE", help="Write a page that needs nothing else."),
    ] = None,
    png: Annotated[
        str | None, typer.Option("--png", metavar="FILE", help="Write the timeline alone.")
    ] = None,
    as_json: AsJson = False,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    anonymous: Anonymous = False,
) -> None:
    """Tell what happened in a run: its attempts, where its time went, what was lost.

    By the journal that it writes beside its checkpoints, in `events`. A run that is going can be
    looked at too. Between two entries, ten seconds apart at most, steps are taken to be even.
    """
    from ray_accel_ckpt.report.history import history_of
    from ray_accel_ckpt.storage.journal import read_events

    page = None if html is None else require_local(html, name="the page")
    picture = None if png is None else require_local(png, name="the picture")
    filesystem, path = place(run, endpoint_url, region, anonymous)
    history = history_of(read_events(filesystem, path), where=path)
    found = Reported(
        run=path,
        begun=history.begun,
        known=history.known,
        steps=history.steps,
        goodput=history.spent.goodput,
        spent=history.spent,
        lost=history.lost,
        attempts=history.attempts,
        written=tuple(_written(history, run, page, picture)),
    )
    output.emit(found, lambda: _screen(history, found), as_json=as_json)


def _written(history: History, run: str, html: Path | None, png: Path | None) -> Iterator[str]:
    if html is not None:
        from ray_accel_ckpt.report.page import page

        # Paths may hold what no text encodes.
        html.write_text(page(history, run=run), encoding="utf-8", errors="backslashreplace")
        yield str(html)
    if png is not None:
        from ray_accel_ckpt.report import figure

        png.write_bytes(figure.png(figure.timeline(history)))
        yield str(png)


def _screen(history: History, found: Reported) -> Iterator[RenderableType]:
    from ray_accel_ckpt.report.page import clock, duration, spent

    yield f"{found.run}: {output.counted(len(history.attempts), 'attempt')}, step {found.steps}"
    yield f"from {clock(found.begun)} to {clock(found.known)} UTC"
    yield ""
    numbers = ("RANKS", "RESTORED IN", "STEPS", "AGAIN", "SAVES")
    table = output.table("ATTEMPT", "BEGAN", "FROM", *numbers, "ENDED", numbers=numbers)
    table.columns[1].no_wrap = True
    for attempt, again in zip(history.attempts, (0, *history.lost), strict=True):
        restored = attempt.resumed_from is not None
        table.add_row(
            attempt.writer,
            clock(attempt.begun),
            f"step {attempt.first}, {attempt.tier}" if restored else "the beginning",
            str(attempt.world_size),
            duration(attempt.restoring) if restored else "-",
            f"{attempt.first}-{attempt.last}",
            str(again),
            str(len(attempt.saves)),
            attempt.ending or "-",
            style="" if attempt.ending in ("finished", "") else "red",
        )
    yield table
    yield ""
    where = output.table("TIME", "", "", numbers=("",))
    for what, seconds, part in spent(history):
        where.add_row(what, duration(seconds), f"{100 * part:.1f} %")
    yield where
    if found.written:
        yield ""
        yield from (f"written: {path}" for path in found.written)
