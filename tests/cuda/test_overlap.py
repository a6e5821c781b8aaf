"""Copies out of an accelerator's memory: by a stream of their own, and none of them torn.

Run on a machine with a GPU: `pytest -m cuda tests/cuda`. Skipped elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from ray_accel_ckpt import Checkpointer
from ray_accel_ckpt.image.copies import Copies, Copy
from tests.pure.helpers import Noisy, OnStep, assert_survives, live

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

NUMEL = 64 * 2**20
A_WHILE = 200_000_000
"""Cycles that the device is kept busy for: longer than it takes to enqueue what follows."""


@pytest.mark.parametrize("late", [False, True])
def test_a_step_that_is_enqueued_at_once_does_not_reach_the_copy(late: bool) -> None:
    parameter = nn.Parameter(torch.arange(NUMEL, dtype=torch.float32, device="cuda"))
    parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    before = parameter.detach().cpu()
    target = torch.zeros(NUMEL, pin_memory=True)
    copy = Copy(name="x", source=parameter.detach(), target=target, watched=(parameter,))
    torch.cuda._sleep(A_WHILE)
    begun = Copies([], [copy]) if late else Copies([copy])
    optimizer.step()
    begun.wait()
    assert torch.equal(target, before)
    assert torch.equal(parameter.detach().cpu(), before - 1)


def test_what_the_device_has_not_computed_yet_is_waited_for() -> None:
    source = torch.zeros(NUMEL, device="cuda")
    target = torch.zeros(NUMEL, pin_memory=True)
    torch.cuda._sleep(A_WHILE)
    source.add_(1)
    begun = Copies([], [Copy(name="x", source=source, target=target, watched=(source,))])
    begun.settle()
    begun.wait()
    assert torch.equal(target, torch.ones(NUMEL))


def _script(ckpt: Checkpointer, on_step: OnStep) -> Any:
    model = nn.Sequential(
        nn.Linear(4, 4096), nn.BatchNorm1d(4096), nn.ReLU(), nn.Dropout(0.4), nn.Linear(4096, 1)
    ).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    loader = DataLoader(Noisy(), batch_size=4, shuffle=True)
    model, optimizer, loader = ckpt.prepare(model, optimizer, loader)
    ckpt.load_state()
    for _ in ckpt.epochs(3):
        for x, _ in loader:
            ckpt.backward(model(x.float()).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            ckpt.step()
            on_step()
    return [p.cpu() for p in model.state_dict().values()], ckpt.global_step


@pytest.mark.parametrize("overlap", [False, True])
def test_killed_at_any_step(tmp_path: Path, overlap: bool) -> None:
    assert_survives(_script, tmp_path, kills=(4, 11, 12), every=1, overlap=overlap)


def test_overlapping_changes_no_bit(tmp_path: Path) -> None:
    at_once = live(_script, tmp_path / "at once", every=1, overlap=False)
    assert live(_script, tmp_path / "overlap", every=1, overlap=True) == at_once
