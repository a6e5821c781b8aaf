"""Models that are built on the meta device, and filled from a checkpoint."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ray_accel_ckpt import Checkpointer
from ray_accel_ckpt.errors import ConfigurationError


class Scale(nn.Module):
    """Holds a parameter and a buffer, and cannot initialise them."""

    def __init__(self, *, persistent: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 2.0))
        self.register_buffer("shift", torch.ones(3), persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.shift


def _network() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    return model


def _trained(
    model: nn.Module, *, steps: int = 2
) -> tuple[Checkpointer, nn.Module, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ckpt = Checkpointer()
    model, optimizer = ckpt.prepare(model, optimizer)
    for _ in range(steps):
        ckpt.backward(model(torch.ones(2, 3)).square().sum())
        optimizer.step()
        optimizer.zero_grad()
        ckpt.step()
    return ckpt, model, optimizer


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def test_it_is_filled_from_a_checkpoint(tmp_path: Path) -> None:
    ckpt, model, optimizer = _trained(_network())
    ckpt.save_state(tmp_path / "a")
    ckpt, other, others = _trained(_on_meta(_network), steps=0)
    assert ckpt.load_state(tmp_path / "a")
    assert all(map(torch.equal, other.state_dict().values(), model.state_dict().values()))
    assert other[2].weight is other[0].weight
    # The optimizer was made before there was memory, and goes on all the same.
    for trained, with_ in ((model, optimizer), (other, others)):
        trained(torch.ones(2, 3)).square().sum().backward()
        with_.step()
    assert all(map(torch.equal, other.state_dict().values(), model.state_dict().values()))


def test_without_a_checkpoint_modules_initialise_themselves() -> None:
    torch.manual_seed(5)
    expected = _network().state_dict()
    torch.manual_seed(5)
    _, model, _ = _trained(_on_meta(_network), steps=0)
    found = model.state_dict()
    assert torch.equal(found["1.running_var"], expected["1.running_var"])
    assert all(t.isfinite().all() and not t.is_meta for t in found.values())


def test_what_has_no_values_is_not_used(tmp_path: Path) -> None:
    ckpt, model, _ = _trained(Scale())
    ckpt.save_state(tmp_path / "a")
    ckpt, model, _ = _trained(_on_meta(Scale), steps=0)
    with pytest.raises(ConfigurationError, match="shift, weight"):
        model(torch.ones(3))
    with pytest.raises(ConfigurationError, match="have no values"):
        ckpt.save_state(tmp_path / "b")
    assert list((tmp_path).iterdir()) == [tmp_path / "a"]
    copied = copy.deepcopy(model)
    pickle.dumps(model)
    ckpt.load_state(tmp_path / "a")
    assert torch.equal(model(torch.zeros(3)), torch.ones(3))
    copied(torch.ones(3))


def test_a_partial_load_sets_what_it_holds(tmp_path: Path) -> None:
    ckpt, _, _ = _trained(Scale())
    ckpt.register_save_state_pre_hook(lambda models, weights, to: weights[0].pop("shift"))
    ckpt.save_state(tmp_path / "a")
    ckpt, model, _ = _trained(_on_meta(Scale), steps=0)
    ckpt.load_state(tmp_path / "a")
    with pytest.raises(ConfigurationError, match="shift"):
        model(torch.ones(3))


def test_a_buffer_that_nobody_could_fill_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="never get values") as caught:
        Checkpointer().prepare(_on_meta(lambda: nn.Sequential(Scale(persistent=False))))
    assert caught.value.where == "0.shift"


def test_other_models_are_left_as_they_are() -> None:
    model = Scale(persistent=False)
    before = model.weight.data_ptr()
    assert Checkpointer().prepare(model).weight.data_ptr() == before
    assert len(model._forward_pre_hooks) == 1
