"""A loop that counts its epochs itself says when it is over."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from ray_accel_ckpt import Checkpointer
from ray_accel_ckpt.errors import StorageError
from ray_accel_ckpt.storage import background
from tests.pure.helpers import checkpointer, checkpoints


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
