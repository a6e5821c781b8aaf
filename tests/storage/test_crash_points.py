"""A save cut off anywhere leaves the checkpoint before it or the new one, whole, nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from ray_accel_ckpt import Checkpointer, ProjectConfiguration
from ray_accel_ckpt.errors import CheckpointError
from ray_accel_ckpt.image import hashing as images
from ray_accel_ckpt.storage.fakes import (
    MemoryFilesystem,
    Operation,
    RecordingFilesystem,
    replay,
)
from ray_accel_ckpt.storage.filesystem import Filesystem
from ray_accel_ckpt.storage.writer import write_image
from tests.helpers_image import RUN, Small, newest, opened, save, small_image

BEFORE, AFTER = 1, 2


@pytest.fixture(autouse=True)
def _a_chunk_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_CHUNK", 1)


def _operations(rank: int, world_size: int) -> list[Operation]:
    """What one rank does to storage in one save."""
    recording = RecordingFilesystem(MemoryFilesystem())
    image = small_image(AFTER, rank=rank, world_size=world_size)
    write_image(recording, f"{RUN}/checkpoint_{AFTER}", image, timeout=1.0)
    return recording.operations


def _before(world_size: int) -> dict[str, bytes]:
    memory = MemoryFilesystem()
    save(memory, BEFORE, world_size=world_size)
    return memory.files


def _found(filesystem: Filesystem) -> int:
    """Load the newest; which one it is, after comparing every bit."""
    into = Small(9)
    restored = newest(filesystem, into)
    assert restored is not None
    number = restored.snapshot.step
    assert into.bits() == Small(number).bits()
    assert restored.path == f"{RUN}/checkpoint_{number}"
    return number


def test_a_save_is_many_operations_and_ends_with_the_manifest() -> None:
    operations = _operations(0, 1)
    kinds = [operation.kind for operation in operations]
    assert kinds.count("append") > 5
    assert [o.path.rpartition("/")[2][:8] for o in operations[-3:]] == ["manifest"] * 3
    assert kinds[-3:] == ["create", "append", "complete"]


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("torn", [True, False])
def test_one_rank_cut_off_after_any_operation(torn: bool, atomic: bool) -> None:
    operations, before = _operations(0, 1), _before(1)
    found = [
        _found(replay(operations[:n], onto=before, atomic=atomic, torn=torn))
        for n in range(len(operations) + 1)
    ]
    # The manifest's only chunk decides where files grow in sight, its completion where not.
    last = 1 if atomic or torn else 2
    assert found == [BEFORE] * (len(found) - last) + [AFTER] * last


@pytest.mark.parametrize("torn", [True, False])
def test_two_ranks_cut_off_after_any_operations_of_either(torn: bool) -> None:
    """The ranks write different files, so every interleaving leaves one of these states."""
    first, second = _operations(0, 2), _operations(1, 2)
    before = _before(2)
    whole = 0
    for m in range(len(first) + 1):
        partly = replay(first[:m], onto=before, torn=torn).files
        for n in range(len(second) + 1):
            found = _found(replay(second[:n], onto=partly, torn=torn))
            manifests_written = m >= len(first) - (not torn) and n >= len(second) - (not torn)
            assert found == (AFTER if manifests_written else BEFORE)
            whole += found == AFTER
    assert whole == (1 if torn else 4)


def test_a_first_save_cut_off_is_no_checkpoint() -> None:
    operations = _operations(0, 1)
    for n in range(len(operations) - 1):
        with pytest.raises(CheckpointError):
            opened(replay(operations[:n]), f"{RUN}/checkpoint_{AFTER}")


def test_a_run_cut_off_in_its_first_save_starts_anew() -> None:
    """It never had a checkpoint, so there is none that could be damaged."""
    operations = _operations(0, 1)
    for n in range(len(operations)):
        into = Small(9)
        assert newest(replay(operations[:n], atomic=True), into) is None
        assert into.bits() == Small(9).bits()


def _trainer(number: int, *, total_limit: int | None) -> tuple[Checkpointer, nn.Module]:
    project = ProjectConfiguration("p", automatic_checkpoint_naming=True, total_limit=total_limit)
    ckpt = Checkpointer(project_config=project)
    model = ckpt.prepare(nn.Linear(2, 1))
    for parameter in model.parameters():
        nn.init.constant_(parameter, number)
    return ckpt, model


@pytest.mark.parametrize("torn", [True, False])
def test_a_checkpointer_that_also_removes_an_old_one(
    route: Callable[[Filesystem], None], torn: bool
) -> None:
    memory = MemoryFilesystem()
    route(memory)
    for number in range(2):
        _trainer(number, total_limit=None)[0].save_state()
    before = dict(memory.files)
    recording = RecordingFilesystem(memory)
    route(recording)
    _trainer(2, total_limit=1)[0].save_state()
    operations = recording.operations
    assert [o.kind for o in operations].count("delete") == 4
    found = []
    for n in range(len(operations) + 1):
        route(replay(operations[:n], onto=before, torn=torn))
        ckpt, model = _trainer(9, total_limit=1)
        assert ckpt.load_state()
        (number,) = {float(value) for p in model.parameters() for value in p.detach().flatten()}
        assert ckpt.resumed_from == f"p/checkpoints/checkpoint_{number:.0f}"
        found.append(number)
    assert found == sorted(found)
    assert set(found) == {1.0, 2.0}
