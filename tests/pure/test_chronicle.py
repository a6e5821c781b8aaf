"""What a run tells of itself: in its journal, and in a line of the log a save and a restore."""

from __future__ import annotations

import gc
import logging
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from ray_accel_ckpt import Checkpointer, EverySteps
from ray_accel_ckpt.runtime.ray_run import Registered
from ray_accel_ckpt.storage.filesystem import LocalFilesystem
from ray_accel_ckpt.storage.journal import Event, read_events
from tests.pure.helpers import checkpoints, project


def _events(directory: Path) -> list[Event]:
    return read_events(LocalFilesystem(), str(directory / "checkpoints"))


def _attempt(directory: Path, *, until: int, epochs: int = 1) -> Checkpointer:
    ckpt = Checkpointer(save=EverySteps(2), project_config=project(directory))
    ckpt.prepare(nn.Linear(3, 3))
    ckpt.load_state()
    for _ in ckpt.epochs(epochs):
        while ckpt.global_step < until:
            ckpt.step()
            ckpt.flush()
    return ckpt


def _of(events: list[Event], kind: str) -> list[dict[str, Any]]:
    return [dict(event.fields) for event in events if event.kind == kind]


def test_a_run_writes_down_what_happens_to_it(tmp_path: Path) -> None:
    _attempt(tmp_path, until=5)
    events = _events(tmp_path)
    assert (events[0].kind, events[-1].kind) == ("start", "end")
    (start,) = _of(events, "start")
    assert start["torch"] == torch.__version__
    assert (start["world_size"], start["policy"]) == (1, "EverySteps(steps=2)")
    saves, durable = _of(events, "save"), _of(events, "durable")
    # The end is saved too.
    assert [(save["step"], save["epoch"]) for save in saves] == [(2, 0), (4, 0), (5, 1)]
    assert all(save["blocked"] > 0 for save in saves)
    assert [each["name"] for each in durable] == [save["name"] for save in saves]
    assert [each["name"] for each in durable] == checkpoints(tmp_path)
    assert all(each["share_nbytes"] > 9 * 4 and each["seconds"] > 0 for each in durable)


def test_a_restart_writes_down_where_it_came_from_and_what_was_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ckpt = Checkpointer(save=EverySteps(4), project_config=project(tmp_path))
    ckpt.prepare(nn.Linear(3, 3))
    ckpt.load_state()
    for _ in range(4):
        ckpt.step()
    ckpt.flush()
    ckpt.step()
    ckpt._chronicle._tell("heartbeat", step=7)
    ckpt._chronicle.end()
    caplog.set_level(logging.INFO)
    again = _attempt(tmp_path, until=8)
    (resumed,) = _of(_events(tmp_path), "resumed")
    assert (resumed["step"], resumed["tier"], resumed["lost"]) == (4, "storage", 3)
    assert (resumed["name"], resumed["path"]) == (checkpoints(tmp_path)[0], again.resumed_from)
    assert resumed["seconds"] > 0
    lines = [line for line in caplog.messages if line.startswith("resumed from ")]
    assert lines == [
        line
        for line in lines
        if line.startswith(f"resumed from {again.resumed_from} at step 4: ")
        and "3 steps are made again" in line
    ]
    assert len(lines) == 1
    assert len({event.writer for event in _events(tmp_path)}) == 2


def test_a_save_and_a_load_of_another_place_are_a_line_of_the_log_at_most(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    _attempt(tmp_path / "a", until=2)
    saved = [line for line in caplog.messages if line.startswith("saved step ")]
    assert [line.split()[2] for line in saved] == ["2", "2"]
    assert "durable after" in saved[0]
    caplog.clear()
    other = Checkpointer(save=EverySteps(4), project_config=project(tmp_path / "b"))
    other.prepare(nn.Linear(3, 3))
    other.load_state(tmp_path / "a" / "checkpoints" / checkpoints(tmp_path / "a")[0])
    assert [line for line in caplog.messages if line.startswith("resumed from ")]
    assert not (tmp_path / "b").exists()


def test_the_thread_goes_with_the_checkpointer(tmp_path: Path) -> None:
    def threads() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t.name == "ray_accel_ckpt-journal"]

    before = set(threads())
    ckpt = _attempt(tmp_path, until=2)
    (mine,) = set(threads()) - before
    del ckpt
    gc.collect()
    mine.join(60)
    assert not mine.is_alive()


def test_a_second_load_is_told_and_does_not_begin_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = _attempt(tmp_path, until=2)
    caplog.set_level(logging.INFO)
    assert first.load_state()
    first._chronicle.end()
    assert len([line for line in caplog.messages if line.startswith("resumed from ")]) == 1
    events = _events(tmp_path)
    assert len(_of(events, "start")) == 1
    (resumed,) = _of(events, "resumed")
    assert resumed["begins"] is False


def test_a_run_that_never_loads_begins_before_its_first_save(tmp_path: Path) -> None:
    ckpt = Checkpointer(save=EverySteps(1), project_config=project(tmp_path))
    ckpt.step()
    ckpt.flush()
    ckpt._chronicle.end()
    kinds = [event.kind for event in _events(tmp_path)]
    assert kinds[0] == "start"
    assert sorted(kinds[1:]) == ["durable", "end", "save"]


def test_a_save_that_is_durable_after_the_end_is_written_down_before_it_is_reported(
    tmp_path: Path,
) -> None:
    """Under Ray: the loop is over, the last save is not, and then the process is ended."""
    ckpt = _attempt(tmp_path, until=2)
    ckpt._chronicle.durable("run/checkpoint_9", step=9, nbytes=1, seconds=0.5)
    assert _of(_events(tmp_path), "durable")[-1]["name"] == "checkpoint_9"


def test_of_a_state_without_counters_all_steps_are_lost(tmp_path: Path) -> None:
    _attempt(tmp_path, until=4)
    again = Checkpointer(save=EverySteps(2), project_config=project(tmp_path))
    again.prepare(nn.Linear(3, 3))
    assert again.load_state(parts=("model",))
    again._chronicle.end()
    (resumed,) = _of(_events(tmp_path), "resumed")
    assert resumed["lost"] == 4


def test_what_others_wrote_into_the_journal_stops_no_restart(tmp_path: Path) -> None:
    _attempt(tmp_path, until=2)
    events = tmp_path / "events"
    steps = ("1" + "0" * 400, "true", "-1", '"x"', "1e300")
    lines = [f'{{"at": 5, "event": "heartbeat", "step": {step}}}\n' for step in steps]
    (events / "999999999999999-ffffff-0.jsonl").write_text("".join(lines))
    _attempt(tmp_path, until=4)
    (resumed,) = _of(_events(tmp_path), "resumed")
    assert resumed["lost"] is None


def test_the_runs_latest_metrics_go_on_with_it(tmp_path: Path) -> None:
    """An end that is saved without a step has them too; a checkpoint by hand is none of the run."""
    ckpt = _attempt(tmp_path, until=2)
    latest = Registered(metrics={"loss": 1.0})
    with mock.patch.object(ckpt._session, "registered", return_value=latest):
        ckpt.load_state(tmp_path / "checkpoints" / checkpoints(tmp_path)[0])
        assert ckpt._last_metrics is None
        ckpt.load_state()
        assert ckpt._last_metrics == {"loss": 1.0}
