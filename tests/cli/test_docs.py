"""The page about the command line says what is so."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ray_accel_ckpt import open_checkpoint
from ray_accel_ckpt.cli.export import Exported, To
from ray_accel_ckpt.cli.heal import Healed
from ray_accel_ckpt.cli.report import Reported
from ray_accel_ckpt.cli.verify import Verified
from ray_accel_ckpt.image.difference import Difference
from ray_accel_ckpt.report.history import Attempt, Save, Spent
from ray_accel_ckpt.runtime.listing import ListedCheckpoint, RunListing
from ray_accel_ckpt.runtime.node_watch import WatchEvent
from ray_accel_ckpt.runtime.quiet import Swept, SweptDirectory
from ray_accel_ckpt.state.leaves import Form
from ray_accel_ckpt.storage import comparison, description, proving
from ray_accel_ckpt.storage.filesystem import resolve
from tests.cli import runs
from tests.cli.commands import refused, told
from tests.pages import snippets, split
from tests.report import runs as journals
from tests.storage.conftest import BUCKET

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
    "watch-node": (WatchEvent,),
}
VALUES = {
    "ls": {"good", "torn", "absent"},
    "watch-node": {"notice", "taken", "at_risk", "paused", "drain"},
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
    values = VALUES.get(command, set())
    said = set(re.findall(r"`(\w+)`", row))
    assert said - values - {"gone", "damaged"} == keys - values


def test_each_option_is_on_the_page_or_in_the_help() -> None:
    page = (DOCS / "cli.md").read_text()
    options = re.findall(r"(?<!-)(--[a-z][a-z-]+)", page)
    known = "".join(told(command, "--help") for command in DOCUMENTS) + told("--help")
    assert [option for option in options if option not in known] == []
    assert all(f"`{to}`" in page for to in To)


def _commands(page: str, block: int, **replaced: str) -> list[list[str]]:
    """What a block has `ray-accel-ckpt` do, with places that are there."""
    text = snippets(page, "sh")[block]
    for old, new in replaced.items():
        text = text.replace(old, new)
    return [words[1:] for words in split(text)]


def _digits(place: Path) -> tuple[Path, Path]:
    """A run that tells what happened to it, and a checkpoint of it."""
    run = journals.write(place / "digits")
    name = runs.saved(run, 40)
    runs.register(run, name)
    return run, run / name


def test_the_commands_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run, checkpoint = _digits(tmp_path)
    places = {"/mnt/shared/digits": str(run), "CKPT": str(checkpoint)}
    said = [told(*command) for command in _commands("README.md", 1, **places)]
    assert [len(said), "good" in said[0], "3 attempts" in said[1]] == [3, True, True]
    assert "<svg" in (tmp_path / "out.html").read_text()
    saved = load_file(tmp_path / "weights" / "model.safetensors")
    assert saved.keys() == open_checkpoint(checkpoint).state_dict("model").keys()


def test_the_command_of_the_page_about_reports_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"s3://bucket/runs/digits": str(_digits(tmp_path)[0])}
    (command,) = _commands("docs/report.md", 0, **places)
    assert "3 attempts" in told(*command)
    assert "<svg" in (tmp_path / "out.html").read_text()


def test_the_code_of_the_page_reads_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "digits"
    told("export", run / runs.saved(run, 40), "model.pt", "--to", "torch")
    worker = runs.Worker(0, 0, 2)
    names = {"torch": torch, "model": worker.model, "optimizer": worker.optimizer}
    (code,) = snippets("docs/cli.md", "python")
    exec(code, names)  # noqa: S102
    expected = runs.Worker(40, 0, 2)
    theirs = expected.model.state_dict()
    assert all(torch.equal(t, theirs[n]) for n, t in worker.model.state_dict().items())
    assert str(worker.optimizer.state_dict()) == str(expected.optimizer.state_dict())


def test_the_three_ways_to_a_server_lead_there(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.save(
        resolve(f"s3://{BUCKET}?endpoint_override={s3}&scheme=http&region=us-east-1")[0],
        f"{BUCKET}/run/checkpoint_00000040_5d8e3f",
        40,
    )
    (block,) = snippets("docs/cli.md", "sh")
    ways = block.replace("localhost:9000", s3).splitlines()
    for way in ways:
        with monkeypatch.context() as patch:
            for name, value in re.findall(r"(\w+)=(\S+) ", way.partition("ray-accel-ckpt")[0]):
                patch.setenv(name, value)
            ((_, *command),) = split(way)
            assert "checkpoint_00000040_5d8e3f" in told(*command)
    assert len(ways) == 3
