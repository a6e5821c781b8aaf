"""Automatic names on storage of every kind, and what `total_limit` removes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from ray_accel_ckpt import Checkpointer, ProjectConfiguration
from ray_accel_ckpt.errors import CheckpointExistsError, StorageError
from ray_accel_ckpt.storage.fakes import Fault, FaultyFilesystem, MemoryFilesystem
from ray_accel_ckpt.storage.filesystem import Filesystem, LocalFilesystem
from ray_accel_ckpt.storage.naming import AutomaticNames


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
