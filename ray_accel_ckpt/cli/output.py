"""How results come onto the screen, as text or as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

_UNBOUNDED = 100_000
_AGES = ((86_400, "d"), (3_600, "h"), (60, "min"), (0, "s"))


def emit(result: Any, render: Callable[[], Iterable[RenderableType]], *, as_json: bool) -> None:
    """Print a result, a frozen dataclass, as one JSON document or as `render` draws it."""
    if as_json:
        typer.echo(json.dumps(_plain(dataclasses.asdict(result)), indent=2))
    else:
        show(*render())


def emit_line(event: Any) -> None:
    """Print one of many, a frozen dataclass, as a line of JSON. Blocks while nobody reads.

    Raises:
        OSError: stdout leads nowhere any more.
    """
    line = json.dumps(_plain(dataclasses.asdict(event))) + "\n"
    # Past Python's buffer: what could not be written would be tried again at exit, and fail.
    os.write(sys.stdout.fileno(), line.encode())


def show(*renderables: RenderableType) -> None:
    """Print as wide as the terminal is; as wide as need be where there is none."""
    screen = console()
    with screen.capture() as captured:
        for each in renderables:
            # A line of text is the terminal's to wrap: so it can be copied and searched.
            screen.print(each, soft_wrap=isinstance(each, str))
    # Cells are padded, which is of no use at the end of a line.
    lines = [line.rstrip() for line in captured.get().splitlines()]
    typer.echo("\n".join(lines), color=True)


def console() -> Console:
    from rich.console import Console

    # Closed by whoever wants the exit status alone, stdout is None.
    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    width = None if on_terminal else _UNBOUNDED
    return Console(width=width, highlight=False, markup=False, emoji=False)


def table(*columns: str, numbers: Collection[str] = ()) -> Table:
    """A table without lines. What does not fit is folded, never cut off.

    Args:
        numbers: those of the columns that hold numbers.
    """
    from rich.table import Table

    made = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold", justify="right" if column in numbers else "left")
    return made


def size(nbytes: int) -> str:
    """``1.2 MB``: decimal units, as disks and buckets are sold in."""
    from rich.filesize import decimal

    return decimal(nbytes).replace("bytes", "B").replace("byte", "B")


def age(saved_at: float | None) -> str:
    """How long ago that was: ``5 min``."""
    if saved_at is None:
        return "-"
    seconds = max(0.0, now() - saved_at)
    for unit, name in _AGES:
        if seconds >= 2 * unit:
            return f"{int(seconds // max(unit, 1))} {name}"
    raise ValueError(saved_at)


def now() -> float:
    return time.time()


def number(value: float) -> str:
    """Three digits of a difference."""
    return f"{value:.3g}"


def counted(count: int, noun: str) -> str:
    """``1 tensor``, ``2 tensors``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _plain(value: Any) -> Any:
    """With a text for infinities and NaN, which JSON has not."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
