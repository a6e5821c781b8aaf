"""The page about the command line says what is so."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from ray_accel_ckpt.cli.export import Exported, To
from ray_accel_ckpt.cli.heal import Healed
from ray_accel_ckpt.cli.report import Reported
from ray_accel_ckpt.cli.verify import Verified
from ray_accel_ckpt.image.difference import Difference
from ray_accel_ckpt.report.history import Attempt, Save, Spent
from ray_accel_ckpt.runtime.listing import ListedCheckpoint, RunListing
from ray_accel_ckpt.runtime.quiet import Swept, SweptDirectory
from ray_accel_ckpt.state.leaves import Form
from ray_accel_ckpt.storage import comparison, description, proving
from tests.cli.commands import refused, told

DOCS = Path(__file__).parents[2] / "docs"

DOCUMENTS = {
    "ls": (RunListing, ListedCheckpoint),
    "show": (
        *(description.Description, description.PartLine, description.FileLine),
        *(description.TensorLine, description.ValueLine),
    ),
    "verify": (Verified, proving.Proof, proving.Fault),
    "diff": (
        *(comparison.Comparison, comparison.ReshapedTensor, comparison.ChangedTensor),
        *(comparison.ChangedValue, Form, Difference),
    ),
    "export": (Exported,),
    "heal": (Healed,),
    "sweep": (Swept, SweptDirectory),
    "report": (Reported, Attempt, Save, Spent),
}


def _screens() -> Any:
    spec = importlib.util.spec_from_file_location("screens", DOCS / "screens.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_screens_of_the_page_are_what_is_printed() -> None:
    """Else: `python docs/screens.py`."""
    page = (DOCS / "cli.md").read_text()
    assert len(re.findall(r"^\$ ray-accel-ckpt ", page, re.MULTILINE)) == 9
    assert _screens().rendered(page) == page


def test_the_error_on_the_page_about_errors_is_what_is_printed(tmp_path: Path) -> None:
    page = (DOCS / "troubleshooting.md").read_text()
    [(command, shown)] = re.findall(
        r"^```console\n\$ ray-accel-ckpt (.*)\n([^`]*)^```$", page, re.M
    )
    arguments = command.replace("/mnt/shared", str(tmp_path)).split()
    assert refused(*arguments).replace(str(tmp_path), "/mnt/shared") == shown


@pytest.mark.parametrize("command", DOCUMENTS)
def test_each_key_of_a_document_is_on_the_page(command: str) -> None:
    page = (DOCS / "cli.md").read_text()
    [row] = re.findall(rf"^\| `{command}` \| (`.*) \|$", page.partition("## JSON")[2], re.MULTILINE)
    keys = {field.name for kind in DOCUMENTS[command] for field in dataclasses.fields(kind)}
    values = {"good", "torn", "absent"} if command == "ls" else set()
    said = set(re.findall(r"`(\w+)`", row))
    assert said - values - {"gone", "damaged"} == keys - values


def test_each_option_is_on_the_page_or_in_the_help() -> None:
    page = (DOCS / "cli.md").read_text()
    options = re.findall(r"(?<!-)(--[a-z][a-z-]+)", page)
    commands = ["ls", "show", "verify", "diff", "export", "heal", "sweep", "report"]
    known = "".join(told(command, "--help") for command in commands) + told("--help")
    assert [option for option in options if option not in known] == []
    assert all(f"`{to}`" in page for to in To)
