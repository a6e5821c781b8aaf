"""A run's history as one page that needs nothing else."""

from __future__ import annotations

import datetime
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ray_accel_ckpt.report.figure import durations, svg, timeline
from ray_accel_ckpt.report.history import History

_MOST = 1000
"""Rows of a table: a page of more is read by nobody."""


def page(history: History, *, run: str) -> str:
    """HTML of its own: no script, no style sheet, no picture from elsewhere.

    Args:
        run: where it lies, for the heading.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"clock": clock, "duration": duration, "nbytes": nbytes}
    template = environment.from_string(
        files("ray_accel_ckpt.report").joinpath("page.html.j2").read_text()
    )
    events = history.events[-_MOST:]
    return template.render(
        run=run,
        history=history,
        spent=spent(history),
        attempts=list(zip(history.attempts, (None, *history.lost), strict=True)),
        saves=history.saves[-_MOST:],
        events=events,
        left_out=len(history.events) - len(events),
        # Made here, of numbers and fixed words.
        timeline=Markup(svg(timeline(history))),  # noqa: S704
        durations=Markup(svg(durations(history))),  # noqa: S704
    )


def spent(history: History) -> list[tuple[str, float, float]]:
    """What the time went to: words, seconds, and the share of all."""
    spent = history.spent
    rows = [
        ("training, new steps", spent.training),
        ("training, steps made again", spent.again),
        ("waiting for saves", spent.saving),
        ("restoring", spent.restoring),
        ("down, until the workers were there again", spent.down),
    ]
    return [(what, seconds, seconds / spent.all if spent.all else 0.0) for what, seconds in rows]


def clock(at: float) -> str:
    """Seconds since the epoch as date and time, UTC."""
    moment = datetime.datetime.fromtimestamp(at, tz=datetime.UTC)
    return moment.strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float | None) -> str:
    """Seconds for a reader: 0.031 s, 12.4 s, 3 min 20 s, 2 h 05 min, 3 d 04 h."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def nbytes(count: int | None) -> str:
    if count is None:
        return "-"
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
