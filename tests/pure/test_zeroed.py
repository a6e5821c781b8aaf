"""Gradients left from the step before: zeroed or dropped, a resumed run has the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ray_accel_ckpt import Checkpointer, open_checkpoint
from tests.pure.helpers import OnStep, Script, checkpoints, live, newest_state

STEPS = 8
PLACES = ("before the forward", "before the backward", "before the save", "after the save")


class Sometimes(nn.Module):
    """Uses its second layer in every other step."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, step: int) -> torch.Tensor:
        y: torch.Tensor = self.always(x)
        return y + self.sometimes(x) if step % 2 == 0 else y


def script(place: str, set_to_none: bool) -> Script:
    """A loop that gets rid of its gradients at `place`."""

    def train(ckpt: Checkpointer, on_step: OnStep) -> Any:
        model = Sometimes()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        model, optimizer = ckpt.prepare(model, optimizer)
        ckpt.load_state()

        def zero(now: str) -> None:
            if now == place:
                optimizer.zero_grad(set_to_none=set_to_none)

        for step in range(ckpt.global_step, STEPS):
            zero("before the forward")
            loss = model(torch.linspace(-1, step + 1, 6).view(2, 3), step).square().mean()
            zero("before the backward")
            ckpt.backward(loss)
            optimizer.step()
            zero("before the save")
            ckpt.step()
            on_step()
            zero("after the save")
        return model, optimizer

    return train


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**10)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("step", [2, 3, 4])
def test_killed_where_an_old_gradient_is_left(
    tmp_path: Path, place: str, set_to_none: bool, scaled: bool, step: int
) -> None:
    """And once more after one more step, which has not shown yet what the loop does."""
    train = script(place, set_to_none)

    def life(name: str, die_at: int = 0) -> str | None:
        options = {"scaler": scaler()} if scaled else {}
        return live(train, tmp_path / name, die_at=die_at, every=1, **options)

    whole = life("whole")
    assert life("killed", die_at=step) is None
    assert life("killed", die_at=step + 1) is None
    assert life("killed") == whole
    assert newest_state(tmp_path / "killed") == newest_state(tmp_path / "whole")


def test_killed_after_a_first_step_that_is_followed_by_zeroing(tmp_path: Path) -> None:
    train = script("before the save", set_to_none=False)
    whole = live(train, tmp_path / "whole", every=1)
    assert live(train, tmp_path / "killed", die_at=1, every=1) is None
    assert live(train, tmp_path / "killed", every=1) == whole


@pytest.mark.parametrize("place", PLACES)
def test_gradients_that_are_dropped_leave_nothing_in_a_checkpoint(
    tmp_path: Path, place: str
) -> None:
    live(script(place, set_to_none=True), tmp_path, every=1)
    for name in checkpoints(tmp_path):
        saved = open_checkpoint(tmp_path / "checkpoints" / name)
        assert set(saved.parts) == {"progress", "model", "optimizer", "rng"}


def test_zeros_are_saved_as_names(tmp_path: Path) -> None:
    live(script("before the save", set_to_none=False), tmp_path, every=1)
    newest = open_checkpoint(tmp_path / "checkpoints" / checkpoints(tmp_path)[-1])
    assert newest.state_dict("zeroed_gradients") == [
        f"model.{name}" for name, _ in Sometimes().named_parameters()
    ]


def test_sparse_gradients_are_left_alone(tmp_path: Path) -> None:
    """Zeros would be a dense one, which their optimizers do not take."""

    def train(ckpt: Checkpointer, on_step: OnStep) -> Any:
        model = nn.Embedding(5, 2, sparse=True)
        optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
        model, optimizer = ckpt.prepare(model, optimizer)
        ckpt.load_state()
        for step in range(ckpt.global_step, STEPS):
            optimizer.zero_grad(set_to_none=False)
            ckpt.backward(model(torch.tensor([step % 5, 0])).square().sum())
            optimizer.step()
            ckpt.step()
            on_step()
        return model, optimizer

    whole = live(train, tmp_path / "whole", every=1)
    assert live(train, tmp_path / "killed", die_at=4, every=1) is None
    assert live(train, tmp_path / "killed", every=1) == whole


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch 2.10 brought it")
@pytest.mark.parametrize("dtype", [torch.float32, None])
@pytest.mark.parametrize("window", [1, 2])
def test_gradients_of_another_dtype_than_their_parameter(
    tmp_path: Path, dtype: torch.dtype | None, window: int
) -> None:
    """Zeroed, and in a window that a save falls into."""

    def train(ckpt: Checkpointer, on_step: OnStep) -> Any:
        model = nn.Linear(3, 2, dtype=torch.bfloat16)
        for parameter in model.parameters():
            parameter.grad_dtype = dtype
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
        model, optimizer = ckpt.prepare(model, optimizer)
        ckpt.load_state()
        for step in range(ckpt.global_step, STEPS):
            x = torch.linspace(-1, step + 1, 6, dtype=torch.bfloat16).view(2, 3)
            ckpt.backward(model(x).square().mean())
            if step % window == window - 1:
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
            ckpt.step()
            on_step()
        return model, optimizer

    whole = live(train, tmp_path / "whole", every=1)
    assert live(train, tmp_path / "killed", die_at=3, every=1) is None
    assert live(train, tmp_path / "killed", every=1) == whole
