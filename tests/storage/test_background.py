"""The thread that writes: all that fails there is told, and nothing is forgotten while it waits."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from ray_accel_ckpt.errors import StorageError
from ray_accel_ckpt.storage import background
from ray_accel_ckpt.storage.background import BackgroundWriter
from ray_accel_ckpt.storage.fakes import Fault, FaultyFilesystem, MemoryFilesystem
from ray_accel_ckpt.storage.filesystem import Filesystem, LocalFilesystem
from tests.helpers_image import opened, small_image

FULL = OSError(errno.ENOSPC, "No space left on device")


class _Closed(MemoryFilesystem):
    """Lets nothing be written until its gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def write(self, path: str, chunks: Iterable[memoryview | bytes]) -> None:
        assert self.gate.wait(60)
        super().write(path, chunks)


def _submit(
    writer: BackgroundWriter,
    filesystem: Filesystem,
    *numbers: int,
    release: Callable[[], None] = lambda: None,
    parent: str = "run",
) -> None:
    for number in numbers:
        place = f"{parent}/{number}"
        writer.submit(filesystem, place, small_image(number), release=release, after=lambda: None)


def _full_at(memory: MemoryFilesystem, *numbers: int) -> Filesystem:
    return FaultyFilesystem(memory, *(Fault(FULL, path=f"run/{n}/*", times=None) for n in numbers))


def test_flush_waits_for_all_and_tells_all_that_failed(memory: MemoryFilesystem) -> None:
    writer = BackgroundWriter(timeout=1.0)
    released = []
    filesystem = _full_at(memory, 1, 3)
    _submit(writer, filesystem, 1, 2, 3, 4, release=lambda: released.append(1))
    with pytest.raises(StorageError, match="run/1/") as caught:
        writer.flush()
    (note,) = caught.value.__notes__
    assert "run/3/" in note
    assert "No space left" in note
    assert len(released) == 4
    for number in (2, 4):
        opened(memory, f"run/{number}").verify()
    # Once is enough.
    writer.flush()


def test_a_flush_that_is_interrupted_forgets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    writer, memory = BackgroundWriter(timeout=1.0), _Closed()
    _submit(writer, _full_at(memory, 2), 1, 2)

    class Interrupted(SimpleQueue[None]):
        def get(self, block: bool = True, timeout: float | None = None) -> None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(background, "SimpleQueue", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.flush()
    memory.gate.set()
    with pytest.raises(StorageError, match="run/2/"):
        writer.flush()
    opened(memory, "run/1").verify()


def test_what_is_under_way_is_awaited_after_an_earlier_failure_was_told() -> None:
    writer, memory = BackgroundWriter(timeout=1.0), _Closed()
    failed = threading.Event()
    _submit(writer, _full_at(memory, 1), 1, release=failed.set)
    _submit(writer, memory, 2)
    assert failed.wait(60)
    with pytest.raises(StorageError, match="run/1/"):
        # The second waits at the gate meanwhile.
        while True:
            writer.raise_earlier()
    memory.gate.set()
    writer.flush()
    opened(memory, "run/2").verify()


def test_a_writer_that_nobody_has_any_more_writes_what_it_was_given() -> None:
    memory = _Closed()
    writer = BackgroundWriter(timeout=1.0)
    _submit(writer, memory, 1, 2)
    thread = background._RUNNING[writer._jobs]
    del writer
    memory.gate.set()
    thread.join(60)
    assert not thread.is_alive()
    for number in (1, 2):
        opened(memory, f"run/{number}").verify()


def test_a_failure_is_logged_before_anyone_asks(memory: MemoryFilesystem) -> None:
    told: list[str] = []
    heard = threading.Event()

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())
            heard.set()

    ear = Ear(level=logging.ERROR)
    background.logger.addHandler(ear)
    try:
        _submit(BackgroundWriter(timeout=1.0), _full_at(memory, 7), 7)
        assert heard.wait(60)
    finally:
        background.logger.removeHandler(ear)
    (line,) = told
    assert "run/7" in line
    assert "No space left" in line
    assert "free space" in line
    assert "\n" not in line


def test_a_script_that_ends_without_asking_is_told(tmp_path: Path) -> None:
    """Its process waits for the save, and prints what became of it."""
    script = """
import atexit, sys, threading
held_back = threading.Event()
def last():
    print("the end", file=sys.stderr, flush=True)
    held_back.set()
atexit.register(last)

import torch
from ray_accel_ckpt import Checkpointer, EverySteps, ProjectConfiguration
from ray_accel_ckpt.storage.filesystem import LocalFilesystem

def full(filesystem, path, chunks):
    held_back.wait()
    raise OSError(28, "No space left on device", path)

join = threading.Thread.join
def joined(thread, *args):
    if thread.name == "ray_accel_ckpt-writer":
        held_back.set()
    join(thread, *args)

LocalFilesystem.write, threading.Thread.join = full, joined
project = ProjectConfiguration(sys.argv[1], automatic_checkpoint_naming=True)
ckpt = Checkpointer(save=EverySteps(1), project_config=project)
ckpt.prepare(torch.nn.Linear(1, 1))
ckpt.step()
"""
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    place = tmp_path / "checkpoints" / "checkpoint_0"
    assert f"while saving to {place}: StorageError" in ended.stderr.partition("the end")[0]


def _written_when_the_script_is_over(path: Path) -> None:
    """Saves to storage that is slow, and needs a pool of threads, and waits for nothing."""
    write = LocalFilesystem.write

    def pooled(filesystem: LocalFilesystem, *args: Any) -> None:
        time.sleep(1)
        with ThreadPoolExecutor() as pool:
            pool.submit(write, filesystem, *args).result()

    LocalFilesystem.write = pooled  # type: ignore[method-assign]
    _submit(BackgroundWriter(timeout=1.0), LocalFilesystem(), 1, parent=str(path))


def test_at_the_end_of_the_process_storage_has_its_threads_yet(tmp_path: Path) -> None:
    script = """
import pathlib, sys
from tests.storage import test_background
test_background._written_when_the_script_is_over(pathlib.Path(sys.argv[1]))
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    opened(LocalFilesystem(), f"{tmp_path}/1").verify()


def test_a_child_process_waits_for_what_it_saves(tmp_path: Path) -> None:
    """One of this kind calls nothing that is registered with `atexit`."""
    child = multiprocessing.get_context("forkserver").Process(
        target=_written_when_the_script_is_over, args=(tmp_path,)
    )
    child.start()
    child.join()
    assert child.exitcode == 0
    opened(LocalFilesystem(), f"{tmp_path}/1").verify()
