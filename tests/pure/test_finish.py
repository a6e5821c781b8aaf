"""A loop that counts its epochs itself says when it is over."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from ray_accel_ckpt import Checkpointer, open_checkpoint
from ray_accel_ckpt.errors import StorageError
from ray_accel_ckpt.storage import background
from ray_accel_ckpt.storage.filesystem import LocalFilesystem
from ray_accel_ckpt.storage.journal import read_events
from tests.pure.helpers import KilledError, Plain, checkpointer, checkpoints


def test_the_end_is_saved_once(tmp_path: Path) -> None:
    ckpt = checkpointer(tmp_path, every=2)
    ckpt.prepare(torch.nn.Linear(1, 1))
    for _ in range(5):
        ckpt.step()
    ckpt.finish()
    assert len(checkpoints(tmp_path)) == 3
    ckpt.finish()
    assert len(checkpoints(tmp_path)) == 3
    again = checkpointer(tmp_path, every=2)
    again.prepare(torch.nn.Linear(1, 1))
    assert again.load_state()
    assert again.global_step == 5
    again.finish()
    assert len(checkpoints(tmp_path)) == 3


def test_an_end_that_a_step_has_saved_is_not_saved_again(tmp_path: Path) -> None:
    ckpt = checkpointer(tmp_path, every=2)
    ckpt.prepare(torch.nn.Linear(1, 1))
    for _ in range(4):
        ckpt.step()
    ckpt.finish()
    assert len(checkpoints(tmp_path)) == 2


def _model(ckpt: Checkpointer) -> torch.nn.Linear:
    model: torch.nn.Linear = ckpt.prepare(torch.nn.Linear(1, 1))
    return model


def _saved_twice(directory: Path) -> tuple[str, str]:
    """One after the other, with other weights."""
    ckpt = checkpointer(directory, every=100)
    model = _model(ckpt)
    ckpt.step()
    first = ckpt.save_state()
    with torch.no_grad():
        model.weight += 1
    ckpt.step()
    return first, ckpt.save_state()


def test_an_end_with_weights_of_before_is_saved(tmp_path: Path) -> None:
    """The best ones, say: the position is that of the last save, the state is not."""
    best, _ = _saved_twice(tmp_path)
    ckpt = checkpointer(tmp_path, every=100)
    model = _model(ckpt)
    ckpt.load_state()
    ckpt.load_state(best, parts=("model",))
    ckpt.finish()
    again = checkpointer(tmp_path)
    resumed = _model(again)
    again.load_state()
    assert again.global_step == 2
    assert torch.equal(resumed.weight, model.weight)


@pytest.mark.parametrize("place", ["project", "another"])
def test_an_end_that_was_loaded_by_its_path_is_saved(tmp_path: Path, place: str) -> None:
    """It is not what the project would be resumed from."""
    first, _ = _saved_twice(tmp_path / "project")
    ckpt = checkpointer(tmp_path / place, every=100)
    _model(ckpt)
    ckpt.load_state(first)
    ckpt.finish()
    assert _resumed_at(tmp_path / place) == 1


def _no_space(*args: object, **options: object) -> None:
    raise StorageError("no space", why=str(OSError(errno.ENOSPC, "No space left on device")))


def _resumed_at(directory: Path) -> int:
    again = checkpointer(directory)
    again.prepare(torch.nn.Linear(1, 1))
    again.load_state()
    return again.global_step


def _trained(directory: Path) -> Checkpointer:
    ckpt = checkpointer(directory, every=2)
    ckpt.prepare(torch.nn.Linear(1, 1))
    ckpt.step()
    ckpt.step()
    ckpt.flush()
    return ckpt


@pytest.mark.parametrize("due", [True, False])
def test_an_end_that_could_not_be_saved_is_saved_when_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, due: bool
) -> None:
    """Whether its save was begun by a step or by `finish`."""
    ckpt = _trained(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(background, "write_image", _no_space)
        for _ in range(2 if due else 1):
            ckpt.step()
        with pytest.raises(StorageError, match="no space"):
            ckpt.finish()
    assert _resumed_at(tmp_path) == 2
    ckpt.finish()
    assert _resumed_at(tmp_path) == ckpt.global_step
    saved = checkpoints(tmp_path)
    ckpt.finish()
    assert checkpoints(tmp_path) == saved


def test_a_failure_that_flush_told_is_not_taken_for_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = _trained(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(background, "write_image", _no_space)
        ckpt.step()
        ckpt.step()
        with pytest.raises(StorageError, match="no space"):
            ckpt.flush()
    ckpt.finish()
    assert _resumed_at(tmp_path) == 4


def seen(directory: Path, *, fail_at: int = 0, stop_at: int = 0) -> list[int]:
    """The samples of one life; it fails in the body of its loop, or breaks out of both loops."""
    ckpt = checkpointer(directory, every=10**9)
    loader: Any = ckpt.prepare(DataLoader(Plain(4), batch_size=1, shuffle=True))
    ckpt.load_state()
    found = []
    try:
        for _ in ckpt.epochs(2):
            for batch in loader:
                found.append(int(batch))
                ckpt.step()
                if ckpt.global_step == fail_at:
                    raise KilledError(found)
                if ckpt.global_step == stop_at:
                    break
            if ckpt.global_step == stop_at:
                break
    finally:
        ckpt.finish()
    return found


def told(directory: Path) -> list[str]:
    where = str(directory / "checkpoints")
    return [event.kind for event in read_events(LocalFilesystem(), where, latest=True)]


def test_a_run_that_an_error_broke_off_is_saved_where_it_is_and_not_at_its_end(
    tmp_path: Path,
) -> None:
    whole = seen(tmp_path / "whole")
    assert told(tmp_path / "whole")[-1] == "end"
    with pytest.raises(KilledError) as caught:
        seen(tmp_path / "left", fail_at=3)
    assert "end" not in told(tmp_path / "left")
    assert caught.value.args[0] + seen(tmp_path / "left") == whole


def test_a_run_that_was_ended_within_an_epoch_is_saved_after_it(tmp_path: Path) -> None:
    whole = seen(tmp_path / "whole")
    assert seen(tmp_path / "ended", stop_at=3) == whole[:3]
    saved = open_checkpoint(tmp_path / "ended" / "checkpoints" / "checkpoint_0")
    assert saved.state_dict("progress")["epoch"] == saved.state_dict("loader")["epoch"] == 1
    assert seen(tmp_path / "ended") == whole[4:]
