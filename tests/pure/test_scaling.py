"""Prepared optimizers and their scaler: gradients are divided once, by what multiplied them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from ray_accel_ckpt import Checkpointer, errors, open_checkpoint
from tests.pure.helpers import checkpointer, digest, project

Make = Callable[[Any], Optimizer]

ADAMS: dict[str, Make] = {
    "plain": lambda m: torch.optim.AdamW(m.parameters(), lr=0.1),
    "fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, fused=True),
}


def grad_scaler(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1024.0, **options)


def sgd(model: Any) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def fused_sgd(model: Any) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, fused=True)


def linear(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(4, 1)


X = torch.linspace(-1, 1, 8).view(2, 4)


# --- unscaling by hand -----------------------------------------------------------------


def clipped(make: Make, scaler: torch.amp.GradScaler | None, *, inner: bool) -> str:
    """The bits after three clipped steps; the scale is a power of two, so it leaves no trace."""
    model = linear()
    optimizer = make(model)
    ckpt = Checkpointer(scaler=scaler)
    prepared, stepping = ckpt.prepare(model, optimizer)
    for n in range(3):
        ckpt.backward(prepared(X * (n + 1)).square().mean())
        if scaler is not None:
            scaler.unscale_(optimizer if inner else stepping)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        stepping.step()
        stepping.zero_grad()
    return digest(model, optimizer)


@pytest.mark.parametrize("make", [sgd, fused_sgd, *ADAMS.values()])
@pytest.mark.parametrize("inner", [True, False])
def test_gradients_may_be_unscaled_before_a_step(make: Make, inner: bool) -> None:
    """By whichever name: what `prepare` returned, or what it was given."""
    assert clipped(make, grad_scaler(), inner=inner) == clipped(make, None, inner=inner)


@pytest.mark.parametrize("make", [sgd, fused_sgd])
@pytest.mark.parametrize("before", [True, False])
def test_a_scheduler_may_be_made_before_and_after(make: Make, before: bool) -> None:
    """It has a wrapping of its own around the optimizer's step."""

    def run(scaler: torch.amp.GradScaler | None) -> str:
        model = linear()
        optimizer = make(model)
        ckpt = Checkpointer(scaler=scaler)
        if before:
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        ckpt.prepare(model, optimizer)
        if not before:
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for _ in range(3):
            ckpt.backward(model(X).square().mean())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return digest(model, optimizer)

    assert run(grad_scaler()) == run(None)


# --- several optimizers ----------------------------------------------------------------


def pair(
    directory: Path, make: Make = sgd, **options: Any
) -> tuple[Checkpointer, list[Any], list[Any]]:
    """Two models with an optimizer each, on one scaler."""
    ckpt = Checkpointer(project_config=project(directory), scaler=grad_scaler(**options))
    models = [linear(n) for n in range(2)]
    optimizers = [make(model) for model in models]
    return ckpt, list(ckpt.prepare(*models)), list(ckpt.prepare(*optimizers))


@pytest.mark.parametrize("make", [sgd, fused_sgd])
def test_all_gradients_of_one_backward_are_divided_by_its_scale(tmp_path: Path, make: Make) -> None:
    """The scale grows at each update: one between the two steps would halve the second."""
    ckpt, models, optimizers = pair(tmp_path, make, growth_interval=1)
    without = [linear(n) for n in range(2)]
    others = [make(model) for model in without]
    ckpt.backward(models[0](X).sum() + models[1](X).sum())
    (without[0](X).sum() + without[1](X).sum()).backward()
    for optimizer in (*optimizers, *others):
        optimizer.step()
    assert digest(*models) == digest(*without)
    assert ckpt.scaler is not None
    assert ckpt.scaler.get_scale() == 2048.0


def test_an_overflow_of_the_first_lowers_the_scale_after_the_second(tmp_path: Path) -> None:
    ckpt, models, optimizers = pair(tmp_path)
    ckpt.backward(models[0](X).sum() * torch.inf + models[1](X).sum())
    before = digest(*models)
    optimizers[0].step()
    assert digest(*models) == before
    assert ckpt.scaler is not None
    assert ckpt.scaler.get_scale() == 1024.0
    optimizers[1].step()
    assert ckpt.scaler.get_scale() == 512.0


def test_optimizers_with_backwards_of_their_own_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """As a GAN whose critic steps five times before the generator does once."""
    ckpt, models, optimizers = pair(tmp_path, growth_interval=1)
    without = [linear(n) for n in range(2)]
    others = [sgd(model) for model in without]
    for n in (0, 0, 0, 1, 0, 1):
        ckpt.backward(models[n](X).square().mean())
        optimizers[n].step()
        optimizers[n].zero_grad()
        without[n](X).square().mean().backward()
        others[n].step()
        others[n].zero_grad()
    assert digest(*models) == digest(*without)
    ckpt.backward(models[0](X).sum())
    assert ckpt.scaler is not None
    assert ckpt.scaler.get_scale() == 1024.0 * 2**6


def test_a_step_at_a_scale_that_was_to_be_updated_is_refused(tmp_path: Path) -> None:
    """A loop that scales by hand, and does not say where its iterations begin."""
    ckpt, models, optimizers = pair(tmp_path)
    assert ckpt.scaler is not None
    ckpt.scaler.scale(models[0](X).sum()).backward()
    optimizers[0].step()
    ckpt.scaler.scale(models[0](X).sum()).backward()
    with pytest.raises(errors.ConfigurationError, match=r"ckpt\.backward"):
        optimizers[0].step()


@pytest.mark.parametrize("make", [sgd, fused_sgd])
@pytest.mark.parametrize("factor", [1.0, torch.inf])
def test_saved_between_two_steps_the_update_still_knows_of_the_first(
    tmp_path: Path, make: Make, factor: float
) -> None:
    def both(ckpt: Checkpointer, models: list[Any], optimizers: list[Any]) -> str:
        optimizers[1].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        ckpt.backward(models[0](X).sum() + models[1](X).sum())
        for optimizer in optimizers:
            optimizer.step()
        return digest(*models, ckpt.scaler)

    ckpt, models, optimizers = pair(tmp_path, make, growth_interval=1)
    ckpt.backward(models[0](X).sum() * factor + models[1](X).sum())
    optimizers[0].step()
    path = ckpt.save_state()
    assert open_checkpoint(path).state_dict("scaler")["stepped"] == [0]
    whole = both(ckpt, models, optimizers)

    resumed = pair(tmp_path, make, growth_interval=1)
    assert resumed[0].load_state()
    assert both(*resumed) == whole


@pytest.mark.parametrize("factor", [1.0, torch.inf])
def test_loading_forgets_a_step_that_the_update_was_to_know_of(
    tmp_path: Path, factor: float
) -> None:
    ckpt, models, optimizers = pair(tmp_path, growth_interval=1)
    ckpt.save_state()
    ckpt.backward(models[0](X).sum() * factor + models[1](X).sum())
    optimizers[0].step()
    assert ckpt.load_state()
    for model, optimizer in zip(models, optimizers, strict=True):
        ckpt.backward(model(X).sum())
        optimizer.step()
    assert ckpt.scaler is not None
    assert ckpt.scaler.get_scale() == 2048.0


# --- other checkpointers ---------------------------------------------------------------


def test_an_optimizer_that_another_checkpointer_steps_is_refused(tmp_path: Path) -> None:
    """A notebook cell run twice: two scalers would divide the same gradients."""
    model = linear()
    optimizer = sgd(model)
    Checkpointer(scaler=grad_scaler()).prepare(model, optimizer)
    for options in ({}, {"scaler": grad_scaler()}):
        with pytest.raises(errors.ConfigurationError, match="another Checkpointer"):
            checkpointer(tmp_path, **options).prepare(optimizer)


# --- enabled and disabled --------------------------------------------------------------


@pytest.mark.parametrize("way", ["scaler", "register_for_checkpointing"])
def test_a_scaler_that_was_disabled_has_no_scale_to_go_on_with(tmp_path: Path, way: str) -> None:
    def life(*, enabled: bool) -> tuple[Checkpointer, nn.Module]:
        scaler = grad_scaler(enabled=enabled)
        ckpt = checkpointer(tmp_path, **({"scaler": scaler} if way == "scaler" else {}))
        model = ckpt.prepare(linear(seed=enabled))
        if way != "scaler":
            ckpt.register_for_checkpointing(scaler=scaler)
        return ckpt, model

    life(enabled=False)[0].save_state()
    ckpt, model = life(enabled=True)
    before = digest(model)
    with pytest.raises(errors.StateMismatchError) as caught:
        ckpt.load_state()
    assert "scaler/scale" in caught.value.missing
    assert digest(model) == before
    assert ckpt.load_state(strict=False)
    assert digest(model) != before


def test_a_scaler_that_is_disabled_now_ignores_the_scale(tmp_path: Path) -> None:
    checkpointer(tmp_path, scaler=grad_scaler()).save_state()
    assert checkpointer(tmp_path, scaler=grad_scaler(enabled=False)).load_state()
