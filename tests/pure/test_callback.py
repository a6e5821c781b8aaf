"""What is told of in Ray's controller must not end the run that is led by it."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ray_accel_ckpt.runtime.callback import ControllerEvents
from ray_accel_ckpt.storage.filesystem import LocalFilesystem
from ray_accel_ckpt.storage.journal import read_events

# Ray's own.
pytestmark = pytest.mark.filterwarnings("ignore")


class Unspeakable(Exception):  # noqa: N818 - its text is what is tested
    def __str__(self) -> str:
        raise RuntimeError("no text")

    def __bool__(self) -> bool:
        raise RuntimeError("no truth")


def _context(storage: str) -> Any:
    config = SimpleNamespace(storage_path=storage, storage_filesystem=None, name="run")
    return SimpleNamespace(run_config=config)


def test_failures_and_registered_checkpoints_are_told(tmp_path: Path) -> None:
    events, context = ControllerEvents(), _context(str(tmp_path))
    events.after_report(context, [{}], None)
    checkpoint: Any = SimpleNamespace(path="run/checkpoint_00000004_abcdef")
    events.after_report(context, [{}], checkpoint)
    failures: dict[int, Exception] = {n: ValueError(str(n)) for n in range(1000)}
    events.after_exception(context, failures)
    first, second = read_events(LocalFilesystem(), str(tmp_path / "run"))
    assert (first.kind, first.fields) == ("registered", {"name": "checkpoint_00000004_abcdef"})
    assert second.fields["workers"] == 1000
    assert second.fields["errors"]["7"] == "ValueError: 7"
    assert len(second.fields["errors"]) == 8


@pytest.mark.parametrize("error", [Unspeakable(), SimpleNamespace(cause=Unspeakable())])
def test_an_error_that_has_no_text_is_told_by_its_kind(tmp_path: Path, error: Any) -> None:
    ControllerEvents().after_exception(_context(str(tmp_path)), {0: error})
    (event,) = read_events(LocalFilesystem(), str(tmp_path / "run"))
    assert event.fields["errors"] == {"0": "Unspeakable"}


def test_storage_that_is_not_there_raises_nothing(caplog: pytest.LogCaptureFixture) -> None:
    ControllerEvents().after_exception(_context("nosuch://bucket/run"), {0: ValueError()})
    ControllerEvents().after_exception(None, {0: ValueError()})
    assert caplog.text.count("not written down") == 2


def test_a_used_one_can_be_given_to_another_run(tmp_path: Path) -> None:
    events = ControllerEvents()
    events.after_exception(_context(str(tmp_path)), {0: ValueError()})
    assert isinstance(pickle.loads(pickle.dumps(events)), ControllerEvents)
