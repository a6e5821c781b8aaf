"""Automatic names on storage of every kind, and what `total_limit` removes."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ray_accel_ckpt import Checkpointer, ProjectConfiguration
from ray_accel_ckpt.errors import CheckpointExistsError, NotACheckpointError, StorageError
from ray_accel_ckpt.storage.catalog import candidates, open_snapshot
from ray_accel_ckpt.storage.fakes import Fault, FaultyFilesystem, MemoryFilesystem
from ray_accel_ckpt.storage.filesystem import Filesystem, LocalFilesystem
from ray_accel_ckpt.storage.naming import AutomaticNames, prune
from ray_accel_ckpt.storage.writer import write_image
from tests.helpers_image import RUN, edited, small_image

MANIFEST, SHARD = "manifest-00000-of-00002.json", "shard-00000-of-00002.safetensors"


def _checkpointer(total_limit: int | None = None) -> Checkpointer:
    project = ProjectConfiguration("p", automatic_checkpoint_naming=True, total_limit=total_limit)
    ckpt = Checkpointer(project_config=project)
    ckpt.prepare(nn.Linear(2, 1))
    return ckpt


def test_the_directory_is_listed_once(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_4").mkdir()
    disk = FaultyFilesystem(
        LocalFilesystem(), Fault(PermissionError("no"), operation="list", nth=2, times=None)
    )
    names = AutomaticNames(disk, str(tmp_path), at_least=0)
    assert [names.take()[0] for _ in range(3)] == [f"{tmp_path}/checkpoint_{n}" for n in (5, 6, 7)]


def test_what_is_in_the_way_of_a_number_is_passed_over(tmp_path: Path) -> None:
    names = AutomaticNames(LocalFilesystem(), str(tmp_path), at_least=0)
    (tmp_path / "checkpoint_0").write_text("a file, not a directory")
    assert names.take() == (f"{tmp_path}/checkpoint_1", True)


def test_a_directory_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    names = AutomaticNames(LocalFilesystem(), f"{tmp_path}/checkpoints", at_least=0)
    with pytest.raises(StorageError, match="could not make a directory"):
        names.take()


def test_where_names_cannot_be_claimed_the_second_of_two_is_told(
    memory: MemoryFilesystem, route: Callable[[Filesystem], None]
) -> None:
    route(memory)
    one, two = _checkpointer(), _checkpointer()
    hook = one.register_save_state_pre_hook(lambda *_: two.save_state())
    with pytest.raises(CheckpointExistsError, match="another process saves to the same directory"):
        one.save_state()
    hook.remove()
    assert one.save_state() == "p/checkpoints/checkpoint_1"
    assert two.save_state() == "p/checkpoints/checkpoint_2"


# --- total_limit ---------------------------------------------------------------------------


def _saved(filesystem: Filesystem, number: int) -> str:
    """A checkpoint of two ranks; its path."""
    path = f"{RUN}/checkpoint_{number}"
    for rank in range(2):
        image = small_image(number, rank=rank, world_size=2)
        write_image(filesystem, path, image, timeout=1.0)
    return path


def _numbers(filesystem: Filesystem) -> list[int]:
    return sorted(candidate.number for candidate in candidates(filesystem, RUN))


def test_a_newer_format_is_never_removed(memory: MemoryFilesystem) -> None:
    paths = [_saved(memory, number) for number in range(4)]
    for path in paths[:2]:
        name = f"{path}/{MANIFEST}"
        memory.files[name] = edited(memory.files[name], lambda body: body.update(version=99))
    prune(memory, RUN, keep=9, newest=paths[3])
    assert _numbers(memory) == [0, 1, 2, 3]
    prune(memory, RUN, keep=1, newest=paths[3])
    assert _numbers(memory) == [0, 1, 3]


def test_damaged_ones_go_with_those_beyond_the_limit(memory: MemoryFilesystem) -> None:
    paths = [_saved(memory, number) for number in range(5)]
    memory.files[f"{paths[3]}/{MANIFEST}"] = b"damaged"
    del memory.files[f"{paths[1]}/{SHARD}"]
    prune(memory, RUN, keep=3, newest=paths[4])
    assert _numbers(memory) == [0, 1, 2, 3, 4]
    prune(memory, RUN, keep=2, newest=paths[4])
    assert _numbers(memory) == [2, 3, 4]


def test_what_a_killed_save_left_goes_with_the_next_that_is_whole(tmp_path: Path) -> None:
    disk, run = LocalFilesystem(), tmp_path / RUN
    partial, shard, empty, mine, newer = (run / f"checkpoint_{n}" for n in (1, 2, 3, 4, 6))
    for directory in (partial, shard, empty, mine, newer):
        directory.mkdir(parents=True)
    (partial / f".{SHARD}.1f2e3d4c.partial").write_bytes(b"half")
    (shard / SHARD).write_bytes(b"half")
    (shard / "config.json").write_text("by a hook")
    (mine / "model.pt").write_bytes(b"mine")
    write_image(disk, f"{run}/checkpoint_5", small_image(5), timeout=1.0)
    prune(disk, str(run), keep=1, newest=f"{run}/checkpoint_5")
    left = sorted(path.name for path in run.iterdir())
    assert left == ["checkpoint_4", "checkpoint_5", "checkpoint_6"]


@pytest.mark.usefixtures("no_waits")
@pytest.mark.parametrize("operation", ["list", "read_into", "delete"])
def test_removing_is_tried_again(memory: MemoryFilesystem, operation: Any) -> None:
    paths = [_saved(memory, number) for number in range(2)]
    passing = Fault(OSError(errno.EBUSY, "busy"), operation=operation, times=3)
    prune(FaultyFilesystem(memory, passing), RUN, keep=1, newest=paths[1])
    assert _numbers(memory) == [1]


@pytest.mark.parametrize("operation", ["list", "read_into", "delete"])
def test_what_cannot_be_removed_costs_a_warning_and_goes_later(
    memory: MemoryFilesystem, caplog: pytest.LogCaptureFixture, operation: Any
) -> None:
    paths = [_saved(memory, number) for number in range(3)]
    refused = Fault(OSError(errno.ENOTEMPTY, "not empty"), operation=operation)
    filesystem = FaultyFilesystem(memory, refused)
    prune(filesystem, RUN, keep=1, newest=paths[2])
    assert "later save" in caplog.text
    # One that cannot be removed does not keep the others from going.
    assert _numbers(memory) == ([1, 2] if operation == "delete" else [0, 1, 2])
    prune(filesystem, RUN, keep=1, newest=paths[2])
    assert _numbers(memory) == [2]


def test_cut_off_while_it_is_removed_it_is_no_checkpoint(memory: MemoryFilesystem) -> None:
    paths = [_saved(memory, number) for number in range(2)]
    refused = Fault(OSError(errno.ENOTEMPTY, "not empty"), operation="delete", path=paths[0])
    prune(FaultyFilesystem(memory, refused), RUN, keep=1, newest=paths[1])
    with pytest.raises(NotACheckpointError):
        open_snapshot(memory, paths[0])
    prune(memory, RUN, keep=1, newest=paths[1])
    assert _numbers(memory) == [1]
