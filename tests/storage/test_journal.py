"""What happened to a run is written down beside its checkpoints, and costs it nothing."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from ray_accel_ckpt.storage import journal as journals
from ray_accel_ckpt.storage.fakes import Fault, FaultyFilesystem, MemoryFilesystem
from ray_accel_ckpt.storage.filesystem import LocalFilesystem
from ray_accel_ckpt.storage.journal import Event, Journal, begun, read_events


def _told(events: list[Event]) -> list[tuple[str, Any]]:
    return [(event.kind, event.fields.get("n")) for event in events]


def _journal(memory: Any, **options: Any) -> Journal:
    return Journal(lambda: (memory, "run"), writer="abcdef", **options)


def test_events_come_back_in_their_order_with_all_they_say() -> None:
    memory = MemoryFilesystem()
    journal = _journal(memory)
    journal.add("start", n=1, of={"a": [1.5, None]})
    journal.add("end", n=2)
    journal.flush(60)
    first, second = read_events(memory, "run")
    assert (first.kind, first.writer, first.fields) == (
        "start",
        "abcdef",
        {"n": 1, "of": {"a": [1.5, None]}},
    )
    assert second.kind == "end"
    assert first.at <= second.at
    (at,) = begun(memory, "run")
    assert at <= first.at + 0.001


def test_a_journal_that_has_grown_goes_on_in_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "_PART_NBYTES", 200)
    memory = MemoryFilesystem()
    journal = _journal(memory)
    for n in range(20):
        journal.add("save", n=n)
        journal.flush(60)
    entries = memory.list("run/events")
    assert len(entries) > 3
    assert all(entry.nbytes is not None and entry.nbytes < 300 for entry in entries)
    assert _told(read_events(memory, "run")) == [("save", n) for n in range(20)]
    assert len(begun(memory, "run")) == 1
    latest = _told(read_events(memory, "run", latest=True))
    assert latest[-1] == ("save", 19)
    assert len(latest) < 12


def test_a_pulse_is_written_when_nothing_else_is() -> None:
    memory, said = MemoryFilesystem(), iter([{"n": 1}, None, {"n": 2}])
    heard = threading.Event()

    def pulse() -> dict[str, int] | None:
        fields = next(said, None)
        if fields == {"n": 2}:
            heard.set()
        return fields

    journal = _journal(memory, pulse=pulse, every=0.01)
    assert heard.wait(60)
    journal.add("end")
    journal.flush(60)
    journal.close()
    assert _told(read_events(memory, "run"))[:2] == [("heartbeat", 1), ("heartbeat", 2)]


@pytest.mark.parametrize("error", [PermissionError("no"), TimeoutError(), EOFError(), KeyError()])
def test_what_fails_is_warned_of_once_and_tried_again(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    memory = MemoryFilesystem()
    journal = _journal(FaultyFilesystem(memory, Fault(error=error, operation="write", times=2)))
    for n in range(3):
        journal.add("save", n=n)
        journal.flush(60)
    assert caplog.text.count("not written down") == 1
    assert _told(read_events(memory, "run")) == [("save", n) for n in range(3)]


def test_what_is_no_event_is_passed_over_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    memory = MemoryFilesystem()
    good = json.dumps({"at": 5, "event": "end", "n": 7}).encode()
    bad: Iterable[bytes] = (
        b"{",
        b"[]",
        b"\xff",
        b'{"at": "x", "event": "a"}',
        b'{"event": "a"}',
        b'{"at": 1' + b"0" * 400 + b', "event": "a"}',
        b'{"at": NaN, "event": "a"}',
        b'{"at": 1e18, "event": "a"}',
        b'{"at": -1, "event": "a"}',
    )
    memory.write("run/events/1-abcdef-0.jsonl", [b"\n".join([*bad, good])])
    memory.write("run/events/2-ABC-0.jsonl", [good])
    memory.write("run/events/notes.txt", [good])
    assert _told(read_events(memory, "run")) == [("end", 7)]
    assert caplog.text.count("is no event") == 9


def test_a_run_without_a_journal_has_no_events() -> None:
    assert read_events(MemoryFilesystem(), "run") == []
    assert begun(MemoryFilesystem(), "run") == []


def test_a_file_that_is_no_journal_by_its_length_is_passed_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    memory = MemoryFilesystem()
    memory.write("run/events/1-abcdef-0.jsonl", [b" " * (2**20 + 1)])
    assert read_events(memory, "run") == []
    assert "too long for a journal" in caplog.text


def test_a_pulse_that_fails_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    memory, asked = MemoryFilesystem(), threading.Event()

    def pulse() -> dict[str, int]:
        asked.set()
        raise RuntimeError("no step")

    journal = _journal(memory, pulse=pulse, every=0.01)
    assert asked.wait(60)
    journal.add("end", n=1)
    journal.flush(60)
    journal.close()
    assert _told(read_events(memory, "run")) == [("end", 1)]
    assert "not written down" in caplog.text


def test_many_events_at_once_are_several_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "_PART_NBYTES", 1000)
    memory = MemoryFilesystem()
    refused = threading.Event()

    def place() -> tuple[MemoryFilesystem, str]:
        assert refused.wait(60)
        return memory, "run"

    journal = Journal(place, writer="abcdef")
    for n in range(100):
        journal.add("save", n=n)
    refused.set()
    journal.flush(60)
    assert all((entry.nbytes or 0) < 1200 for entry in memory.list("run/events"))
    assert _told(read_events(memory, "run")) == [("save", n) for n in range(100)]
    # The last part may be short: the one before it counts too.
    assert len(read_events(memory, "run", latest=True)) > 10


def test_a_process_that_ends_writes_its_last_events(tmp_path: Path) -> None:
    code = f"""
from ray_accel_ckpt.storage.filesystem import LocalFilesystem
from ray_accel_ckpt.storage.journal import Journal
journal = Journal(lambda: (LocalFilesystem(), {str(tmp_path)!r}), writer="abcdef")
for n in range(50):
    journal.add("save", n=n)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    found = _told(read_events(LocalFilesystem(), str(tmp_path)))
    assert found == [("save", n) for n in range(50)]
    assert not list(tmp_path.rglob("*.partial"))


def test_at_the_end_of_the_process_the_last_save_is_told_though_thread_pools_are_closed(
    tmp_path: Path,
) -> None:
    """Filesystems of fsspec need one for new connections."""
    script = """
import sys, time
from concurrent.futures import ThreadPoolExecutor

import torch
from ray_accel_ckpt import Checkpointer, EverySteps, ProjectConfiguration
from ray_accel_ckpt.storage.filesystem import LocalFilesystem

write = LocalFilesystem.write

def pooled(*arguments):
    time.sleep(0.5)
    with ThreadPoolExecutor() as pool:
        pool.submit(write, *arguments).result()

LocalFilesystem.write = pooled
project = ProjectConfiguration(sys.argv[1], automatic_checkpoint_naming=True)
ckpt = Checkpointer(save=EverySteps(1), project_config=project)
ckpt.prepare(torch.nn.Linear(1, 1))
ckpt.step()
"""
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "not written down" not in ended.stderr
    events = read_events(LocalFilesystem(), f"{tmp_path}/checkpoints")
    assert [event.kind for event in events] == ["start", "save", "durable"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_its_parent_s_journal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(journals, "_PATIENCE", 600.0)
    answers = threading.Event()

    def place() -> tuple[MemoryFilesystem, str]:
        assert answers.wait(60)
        return MemoryFilesystem(), "run"

    journal = Journal(place, writer="abcdef")
    journal.add("save", n=1)
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join(30)
    code = child.exitcode
    child.kill()
    answers.set()
    journal.close()
    assert code == 0
