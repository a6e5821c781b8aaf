"""Optimizers: state goes by the name of the parameter, and not a bit of it is changed."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from ray_accel_ckpt import Checkpointer, errors, open_checkpoint
from ray_accel_ckpt.state.optimizer import OptimizerPart
from ray_accel_ckpt.state.part import Differences
from tests.pure.helpers import as_saved, checkpointer, digest

Make = Callable[[Any], Optimizer]


def step(model: nn.Module, optimizer: Optimizer, count: int = 1) -> None:
    for n in range(count):
        x = torch.linspace(-1, 1 + n, 8, dtype=next(model.parameters()).dtype).view(2, 4)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().sum()  # noqa: B023 - called before the next turn
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]


def two_layers() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))


def prepared(directory: Path, model: nn.Module, make: Make) -> tuple[Checkpointer, Optimizer]:
    ckpt = checkpointer(directory)
    optimizer = make(model)
    ckpt.prepare(model, optimizer)
    return ckpt, optimizer


def adam(model: nn.Module) -> Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


# --- every optimizer goes on as if it had not been saved -------------------------------

OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.01),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), 0.01, momentum=0.9, nesterov=True),
    "Adam": adam,
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), 0.01, amsgrad=True),
    "foreach": lambda m: torch.optim.AdamW(m.parameters(), 0.01, foreach=True),
    "fused": lambda m: torch.optim.AdamW(m.parameters(), 0.01, fused=True),
    "tensor lr": lambda m: torch.optim.Adam(m.parameters(), torch.tensor(0.01)),
    "betas": lambda m: torch.optim.Adam(m.parameters(), 0.01, betas=(0.8, 0.9)),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), 0.01, centered=True),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), 0.01),
    "Adadelta": lambda m: torch.optim.Adadelta(m.parameters()),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters(), 0.01),
    "RAdam": lambda m: torch.optim.RAdam(m.parameters(), 0.01),
    "ASGD": lambda m: torch.optim.ASGD(m.parameters(), 0.01),
    "Rprop": lambda m: torch.optim.Rprop(m.parameters(), 0.01),
    "Adamax": lambda m: torch.optim.Adamax(m.parameters(), 0.01),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters(), 0.01),
    "LBFGS": lambda m: torch.optim.LBFGS(m.parameters(), 0.1, max_iter=3, history_size=3),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_it_goes_on_with_the_same_bits(tmp_path: Path, kind: str, steps: int) -> None:
    model = two_layers()
    ckpt, optimizer = prepared(tmp_path, model, OPTIMIZERS[kind])
    step(model, optimizer, steps)
    ckpt.save_state()
    step(model, optimizer, 2)

    other = two_layers()
    again, resumed = prepared(tmp_path, other, OPTIMIZERS[kind])
    step(other, resumed, 5)
    assert again.load_state()
    step(other, resumed, 2)
    assert digest(other, resumed) == digest(model, optimizer)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 2])
def test_what_is_loaded_is_what_was_saved(tmp_path: Path, kind: str, steps: int) -> None:
    model = two_layers()
    ckpt, optimizer = prepared(tmp_path, model, OPTIMIZERS[kind])
    step(model, optimizer, steps)
    before = digest(optimizer)
    ckpt.save_state()
    step(model, optimizer)
    ckpt.load_state()
    assert digest(optimizer) == before


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_capturing_at_step_0_changes_nothing(tmp_path: Path, kind: str) -> None:
    """A helper that makes an optimizer step to have a state leaves Adam's `step` 1 too high."""
    model, captured = two_layers(), two_layers()
    never = OPTIMIZERS[kind](model)
    ckpt, optimizer = prepared(tmp_path, captured, OPTIMIZERS[kind])
    before = copy.deepcopy(optimizer.state_dict())
    ckpt.save_state()
    assert len(optimizer.state) == len(never.state)
    assert digest(optimizer) == digest(before)
    step(model, never)
    step(captured, optimizer)
    assert digest(captured, optimizer) == digest(model, never)


class NovoGrad(Optimizer):
    """Keeps one number a parameter under a name that torch's optimizers keep a tensor under."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        with torch.enable_grad():
            closure()
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros(())
            state["exp_avg_sq"].mul_(0.98).add_(parameter.grad.square().sum(), alpha=0.02)
            state["exp_avg"].mul_(0.9).add_(parameter.grad / state["exp_avg_sq"].sqrt())
            parameter.sub_(state["exp_avg"], alpha=0.01)


def test_state_of_other_shapes_under_the_names_that_torch_uses(tmp_path: Path) -> None:
    def novograd(m: nn.Module) -> Optimizer:
        return NovoGrad(m.parameters())

    model, other = two_layers(), two_layers()
    ckpt, optimizer = prepared(tmp_path, model, novograd)
    step(model, optimizer, 2)
    ckpt.save_state()
    again, resumed = prepared(tmp_path, other, novograd)
    assert again.load_state()
    step(model, optimizer)
    step(other, resumed)
    assert digest(other, resumed) == digest(model, optimizer)


# --- names, not positions --------------------------------------------------------------


def test_other_order_of_parameters(tmp_path: Path) -> None:
    model = two_layers()
    ckpt, optimizer = prepared(tmp_path, model, adam)
    step(model, optimizer, 2)
    ckpt.save_state()

    other = two_layers()

    def backwards(m: nn.Module) -> Optimizer:
        return torch.optim.Adam(list(m.parameters())[::-1], lr=0.5)

    again, resumed = prepared(tmp_path, other, backwards)
    again.load_state()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert digest(optimizer.state[p]) == digest(resumed.state[q]), name
    assert resumed.param_groups[0]["lr"] == 0.01


def test_names_of_parameters_stay_with_them_in_another_order(tmp_path: Path) -> None:
    model, other = two_layers(), two_layers()
    ckpt, optimizer = prepared(tmp_path, model, lambda m: torch.optim.Adam(m.named_parameters()))
    step(model, optimizer)
    ckpt.save_state()

    def backwards(m: nn.Module) -> Optimizer:
        return torch.optim.Adam(list(m.named_parameters())[::-1])

    again, resumed = prepared(tmp_path, other, backwards)
    again.load_state()
    (group,) = resumed.param_groups
    names = {id(p): name for name, p in other.named_parameters()}
    assert group["param_names"] == [names[id(p)] for p in group["params"]]


def test_other_order_of_groups(tmp_path: Path) -> None:
    """Each group keeps its own learning rate."""

    def grouped(order: slice) -> Make:
        def make(m: Any) -> Optimizer:
            groups = [{"params": m[0].parameters(), "lr": 0.1}, {"params": m[1].parameters()}]
            return torch.optim.Adam(groups[order], lr=0.2)

        return make

    model, other = two_layers(), two_layers()
    ckpt, optimizer = prepared(tmp_path, model, grouped(slice(None)))
    step(model, optimizer, 2)
    ckpt.save_state()
    again, resumed = prepared(tmp_path, other, grouped(slice(None, None, -1)))
    for group in resumed.param_groups:
        group["lr"] = 0.9
    again.load_state()
    step(model, optimizer)
    step(other, resumed)
    assert digest(other) == digest(model)
    assert [group["lr"] for group in resumed.param_groups] == [0.2, 0.1]


def test_parameters_of_no_registered_model_go_by_group_and_place(tmp_path: Path) -> None:
    def life() -> tuple[Checkpointer, nn.Parameter, Optimizer]:
        ckpt, free = checkpointer(tmp_path), nn.Parameter(torch.ones(2))
        return ckpt, free, ckpt.prepare(torch.optim.Adam([free]))

    ckpt, free, optimizer = life()
    free.sum().backward()
    optimizer.step()
    ckpt.save_state()
    assert list(open_checkpoint(ckpt.save_state()).state_dict("optimizer")["state"]) == [
        "group.0.0"
    ]
    again, _, resumed = life()
    again.load_state()
    assert digest(resumed) == digest(optimizer)


def test_the_order_of_prepare_does_not_matter(tmp_path: Path) -> None:
    """An optimizer prepared before its model still goes by the model's names."""
    model = two_layers()
    ckpt = checkpointer(tmp_path)
    optimizer, _ = ckpt.prepare(adam(model), model)
    step(model, optimizer)
    saved = open_checkpoint(ckpt.save_state()).state_dict("optimizer")
    assert set(saved["state"]) == {f"model.{name}" for name, _ in model.named_parameters()}


# --- dtypes and kinds of parameters ----------------------------------------------------


def test_wide_state_of_narrow_parameters_is_not_rounded(tmp_path: Path) -> None:
    """`Optimizer.load_state_dict` casts moments to the parameter's dtype."""
    model = nn.Linear(4, 4, dtype=torch.bfloat16)
    ckpt, optimizer = prepared(tmp_path, model, adam)
    step(model, optimizer)
    moments = optimizer.state[model.weight]
    moments["exp_avg"] = torch.full((4, 4), 1 / 3)
    ckpt.save_state()
    ckpt.load_state()
    found = optimizer.state[model.weight]["exp_avg"]
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.full((4, 4), 1 / 3))


class Preconditioned(Optimizer):
    """Keeps wide tensors in lists and dicts, as SOAP and Shampoo do."""

    def __init__(self, parameters: Any, third: float = 0.0) -> None:
        self.third = third
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        """Give each parameter a state."""
        for parameter in self.param_groups[0]["params"]:
            third = torch.tensor([self.third])
            self.state[parameter] = {
                "Q": [third, None, torch.arange(3)],
                "sides": OrderedDict(left={"L": third * 2}, right=(third * 3, 0.5)),
                "latest": deque([third * 4], maxlen=3),
                "kind": "two-sided",
            }


def test_wide_state_in_lists_and_dicts_is_not_rounded(tmp_path: Path) -> None:
    model, other = (nn.Linear(4, 4, dtype=torch.bfloat16) for _ in range(2))
    ckpt, optimizer = prepared(
        tmp_path, model, lambda m: Preconditioned(m.parameters(), third=1 / 3)
    )
    optimizer.step()
    ckpt.save_state()
    again, resumed = prepared(tmp_path, other, lambda m: Preconditioned(m.parameters()))
    again.load_state()
    mine, its = resumed.state[other.weight], optimizer.state[model.weight]
    assert repr(mine) == repr(its)
    assert digest(mine["Q"], mine["sides"], *mine["latest"]) == digest(
        its["Q"], its["sides"], *its["latest"]
    )


FUSED: dict[str, Make] = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), 0.01, amsgrad=True, fused=True),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), 0.01, momentum=0.9, fused=True),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), 0.01, fused=True),
}


def laid_out() -> nn.Module:
    """Parameters that lie in memory in another order than that of their indices."""
    torch.manual_seed(1)
    model = nn.ParameterDict()
    model["conv"] = torch.randn(3, 4, 2, 2).to(memory_format=torch.channels_last)
    model["transposed"] = torch.randn(4, 3).t()
    return model


def descend(model: nn.Module, optimizer: Optimizer, count: int) -> None:
    for n in range(count):
        optimizer.zero_grad()
        for parameter in model.parameters():
            weights = torch.linspace(-1, n + 1, parameter.numel()).view(parameter.shape)
            (parameter * weights).square().sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@pytest.mark.parametrize("kind", FUSED)
def test_state_lies_in_memory_as_its_parameter_does(tmp_path: Path, kind: str) -> None:
    """Fused kernels go through both as they lie, whatever the strides say."""
    model, other = laid_out(), laid_out()
    ckpt, optimizer = prepared(tmp_path, model, FUSED[kind])
    descend(model, optimizer, 2)
    ckpt.save_state()
    descend(model, optimizer, 2)

    again, resumed = prepared(tmp_path, other, FUSED[kind])
    assert again.load_state()
    descend(other, resumed, 2)
    assert digest(other, resumed) == digest(model, optimizer)


def test_gradients_of_a_window_lie_in_memory_as_their_parameters_do(tmp_path: Path) -> None:
    """A norm sums them as they lie: in another order it rounds otherwise."""
    lives = []
    for _ in range(2):
        ckpt = checkpointer(tmp_path)
        lives.append((ckpt, ckpt.prepare(nn.Conv2d(4, 3, 2).to(memory_format=torch.channels_last))))
    (ckpt, model), (again, other) = lives
    model(torch.ones(1, 4, 3, 3)).square().sum().backward()
    ckpt.save_state()
    assert again.load_state()
    assert model.weight.grad.stride() != torch.empty(3, 4, 2, 2).stride()
    for mine, its in zip(other.parameters(), model.parameters(), strict=True):
        assert mine.grad.stride() == its.grad.stride()
        assert torch.equal(mine.grad, its.grad)


def test_what_is_loaded_is_not_shared_with_another_optimizer(tmp_path: Path) -> None:
    model = two_layers()
    ckpt, optimizer = prepared(tmp_path, model, adam)
    step(model, optimizer)
    ckpt.save_state()
    ckpt.load_state()
    held = [s["exp_avg"].data_ptr() for s in optimizer.state.values()]
    assert len(set(held)) == len(held)


def test_tied_parameters_have_one_state(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model

    model, other = tied(), tied()
    ckpt, optimizer = prepared(tmp_path, model, adam)
    step(model, optimizer, 2)
    ckpt.save_state()
    again, resumed = prepared(tmp_path, other, adam)
    again.load_state()
    step(model, optimizer)
    step(other, resumed)
    assert other[1].weight is other[0].weight  # type: ignore[index]
    assert digest(other, resumed) == digest(model, optimizer)


def test_frozen_parameters_have_no_state(tmp_path: Path) -> None:
    def frozen() -> nn.Module:
        model = two_layers()
        model[0].requires_grad_(False)  # type: ignore[index]
        return model

    model, other = frozen(), frozen()
    ckpt, optimizer = prepared(tmp_path, model, adam)
    step(model, optimizer, 2)
    ckpt.save_state()
    again, resumed = prepared(tmp_path, other, adam)
    again.load_state()
    assert len(resumed.state) == 2
    assert digest(other, resumed) == digest(model, optimizer)


def test_several_optimizers_keep_their_own(tmp_path: Path) -> None:
    def life() -> tuple[Checkpointer, Any, Any, Any]:
        ckpt, model = checkpointer(tmp_path), two_layers()
        first = torch.optim.Adam(model[0].parameters())  # type: ignore[index]
        second = torch.optim.SGD(model[1].parameters(), momentum=0.9)  # type: ignore[index]
        return ckpt, *ckpt.prepare(model, first, second)

    ckpt, model, first, second = life()
    step(model, first)
    step(model, second)
    ckpt.save_state()
    again, _, one, two = life()
    again.load_state()
    assert (digest(one), digest(two)) == (digest(first), digest(second))


def test_other_values_in_the_state_dict_come_back() -> None:
    class Counting(torch.optim.SGD):
        calls = 3

        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "calls": self.calls}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.calls = state_dict["calls"]
            super().load_state_dict(state_dict)

    model = two_layers()
    index = {id(p): name for name, p in model.named_parameters()}
    part = OptimizerPart("optimizer", Counting(model.parameters()), lambda: index)
    captured = part.capture()
    part.optimizer.calls = 9  # type: ignore[attr-defined]
    part.apply(captured.value)
    assert part.optimizer.calls == 3  # type: ignore[attr-defined]


# --- what does not fit -----------------------------------------------------------------


def mismatch(directory: Path, model: nn.Module, make: Make) -> errors.StateMismatchError:
    """The error of loading Adam over two layers into something else, which stays as it was."""
    first = two_layers()
    ckpt, optimizer = prepared(directory, first, adam)
    step(first, optimizer)
    ckpt.save_state()
    again, resumed = prepared(directory, model, make)
    before = digest(model, resumed)
    with pytest.raises(errors.StateMismatchError) as caught:
        again.load_state()
    assert digest(model, resumed) == before
    return caught.value


def test_parameters_that_are_not_optimized_any_more(tmp_path: Path) -> None:
    error = mismatch(tmp_path, two_layers(), lambda m: torch.optim.Adam(m[0].parameters()))
    assert error.unexpected == ("optimizer/model.1.weight", "optimizer/model.1.bias")
    assert "optimizer/model.1.bias" in str(error)


def test_parameters_that_were_not_optimized_before(tmp_path: Path) -> None:
    model = two_layers()
    extra = nn.Parameter(torch.ones(1))
    error = mismatch(tmp_path, model, lambda m: torch.optim.Adam([*m.parameters(), extra]))
    assert error.missing == ("optimizer/group.0.4",)


def test_another_number_of_groups(tmp_path: Path) -> None:
    def grouped(m: Any) -> Optimizer:
        return torch.optim.Adam([{"params": m[0].parameters()}, {"params": m[1].parameters()}])

    error = mismatch(tmp_path, two_layers(), grouped)
    assert error.differing == ("optimizer (checkpoint: 1 parameter groups, optimizer: 2)",)


def test_an_optimizer_of_another_class(tmp_path: Path) -> None:
    """Its next step would fail: of its hyperparameters some are not there."""
    error = mismatch(tmp_path, two_layers(), OPTIMIZERS["momentum"])
    assert error.differing == (
        "optimizer (checkpoint: of an optimizer without momentum, dampening, registered: SGD)",
    )


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_an_older_torch_did_not_know_is_not_missed(kind: str) -> None:
    model = two_layers()
    optimizer = OPTIMIZERS[kind](model)
    part = OptimizerPart("optimizer", optimizer, dict)
    saved = as_saved(part.capture())
    for group in saved.value["groups"]:
        # Those came one after the other, from torch 1.9 on.
        for key in ("maximize", "foreach", "capturable", "differentiable", "fused"):
            group.pop(key, None)
    part.compare(saved, differences := Differences())
    assert not differences


def test_one_optimizer_too_many(tmp_path: Path) -> None:
    ckpt, model = checkpointer(tmp_path), two_layers()
    ckpt.prepare(model, adam(model))
    ckpt.save_state()
    again = checkpointer(tmp_path)
    again.prepare(model, adam(model), adam(model))
    with pytest.raises(errors.StateMismatchError) as caught:
        again.load_state()
    assert caught.value.missing == ("optimizer_1",)


def test_with_strict_false_an_optimizer_is_taken_whole_or_not(tmp_path: Path) -> None:
    first = two_layers()
    ckpt, optimizer = prepared(tmp_path, first, adam)
    step(first, optimizer)
    ckpt.save_state()
    again, resumed = prepared(tmp_path, two_layers(), lambda m: torch.optim.Adam(m[0].parameters()))
    assert again.load_state(strict=False)
    assert not resumed.state
