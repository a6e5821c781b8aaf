"""Commands, called in this process."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from ray_accel_ckpt.cli import app

_PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
TROUBLES = [
    heading.lower() for heading in re.findall(r"^## (\w+)$", _PAGE.read_text(), re.MULTILINE)
]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def told(*arguments: object, status: int = 0) -> str:
    """What a command prints on stdout."""
    done = run(*arguments)
    assert done.exit_code == status, done.output
    assert done.stderr == ""
    return str(done.stdout)


def document(*arguments: object, status: int = 0) -> Any:
    """What a command prints with `--json`."""
    return json.loads(told(*arguments, "--json", status=status))


def refused(*arguments: object, status: int = 1) -> str:
    """What a command that fails says on stderr."""
    done = run(*arguments)
    assert done.exit_code == status, done.output
    assert done.stdout == ""
    assert done.stderr.startswith("Error: "), done.stderr
    assert "what to do: " in done.stderr
    [kind] = re.findall(r"^  more: docs/troubleshooting\.md#(\w+)$", done.stderr, re.MULTILINE)
    assert kind in TROUBLES
    return str(done.stderr)
