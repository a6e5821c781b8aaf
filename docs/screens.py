"""The screens in docs/cli.md: `python docs/screens.py` writes them anew.

A screen is a block that begins with a command line. The command itself is run, on runs
that are made for it, at a time that is always the same.
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from pathlib import Path
from unittest import mock

from rich.console import Console
from typer.testing import CliRunner

from ray_accel_ckpt.cli import app, output
from tests.cli import runs
from tests.report import runs as journals

PAGE = Path(__file__).parent / "cli.md"
SHARED = "/mnt/shared"
"""Where the runs of the page are said to be."""
WIDTH = 100

_SCREEN = re.compile(r"^```console\n\$ ray-accel-ckpt (.*)\n(?:.*\n)*?```$", re.MULTILINE)


def rendered(page: str) -> str:
    """The page with each screen as the command prints it now."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary).resolve()
        _make_runs(place)
        return _SCREEN.sub(lambda screen: _screen(screen[1], place), page)


def _screen(command: str, place: Path) -> str:
    arguments = shlex.split(command.replace(SHARED, str(place)))
    console = Console(width=WIDTH, highlight=False, markup=False, emoji=False, color_system=None)
    with (
        mock.patch.object(output, "console", lambda: console),
        mock.patch.object(output, "now", lambda: runs.SAVED_AT + 420),
    ):
        text = CliRunner().invoke(app, arguments, catch_exceptions=False).output
    return f"```console\n$ ray-accel-ckpt {command}\n{text.replace(str(place), SHARED)}```"


def _make_runs(place: Path) -> None:
    """`digits`, which lost workers on its way, `again`, which lost none, and `lost`, its driver."""
    digits, again, lost = place / "digits", place / "again", place / "lost"
    options = {"library": "0.1.0", "frozen": True}
    names = [runs.saved(digits, step, **options) for step in (40, 60)]
    runs.saved(digits, 50, attempt="0c1d2e", **options)
    runs.saved(digits, 80, ranks=1, **options)
    runs.register(digits, *names)
    runs.damage(digits / names[0] / "shard-00001-of-00002.safetensors")
    runs.saved(again, 60, attempt="77aa01", **options)
    first = runs.saved(lost, 10)
    runs.saved(lost, 20)
    runs.register(lost, first)
    journals.write(place / "spot")
    for path in place.rglob("*"):
        os.utime(path, (runs.SAVED_AT, runs.SAVED_AT))


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text()))
