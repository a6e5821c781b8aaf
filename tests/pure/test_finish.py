"""A loop that counts its epochs itself says when it is over."""

from __future__ import annotations

from pathlib import Path

import torch

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
