"""Models: names of the plain module, bytes into the live tensors, all or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ray_accel_ckpt import errors, open_checkpoint
from ray_accel_ckpt.image.dtypes import STORED
from ray_accel_ckpt.state.model import ModelPart, unwrap
from ray_accel_ckpt.state.part import Scope
from tests.pure.helpers import checkpointer, digest, tensor_bytes


def saved(directory: Path, model: nn.Module) -> str:
    ckpt = checkpointer(directory)
    ckpt.prepare(model)
    return ckpt.save_state()


def loaded(directory: Path, model: Any, *, strict: bool = True) -> Any:
    ckpt = checkpointer(directory)
    ckpt.prepare(model)
    assert ckpt.load_state(strict=strict)
    return model


def refused(directory: Path, model: nn.Module) -> errors.StateMismatchError:
    """The error of loading; the model must stay as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ckpt = checkpointer(directory)
    ckpt.prepare(model)
    with pytest.raises(errors.StateMismatchError, match="nothing was changed") as caught:
        ckpt.load_state()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    return caught.value


# --- what a module holds ---------------------------------------------------------------


def test_parameters_and_buffers_come_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model(torch.randn(5, 3))
    saved(tmp_path, model)
    other = loaded(tmp_path, nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    assert digest(other) == digest(model)
    assert other[1].num_batches_tracked == 1


def test_values_go_into_the_live_tensors(tmp_path: Path) -> None:
    """So optimizers, views and compiled graphs that hold them see what was loaded."""
    model = nn.Linear(3, 3)
    saved(tmp_path, model)
    weight, pointer = model.weight, model.weight.data_ptr()
    expected = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    loaded(tmp_path, model)
    assert model.weight is weight
    assert weight.data_ptr() == pointer
    assert torch.equal(weight, expected)
    assert weight.requires_grad


def test_buffers_that_are_not_persistent_are_left_alone(tmp_path: Path) -> None:
    class Cached(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.register_buffer("cache", torch.tensor(value), persistent=False)
            self.register_buffer("kept", torch.tensor(value))

    saved(tmp_path, Cached(1.0))
    other = loaded(tmp_path, Cached(2.0))
    assert (other.cache, other.kept) == (torch.tensor(2.0), torch.tensor(1.0))


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_buffers_of_every_dtype_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    def model(seed: int) -> nn.Module:
        module = nn.Module()
        bits = torch.arange(6 * dtype.itemsize).mul(seed).remainder(2).to(torch.uint8)
        module.register_buffer("b", bits.view(dtype).view(2, 3))
        return module

    saved(tmp_path, model(1))
    other = loaded(tmp_path, model(0))
    assert tensor_bytes(other.b) == tensor_bytes(model(1).state_dict()["b"])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,)])
def test_scalars_and_empty_tensors_come_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    def model(value: float) -> nn.Module:
        module = nn.Module()
        module.p = nn.Parameter(torch.full(shape, value))
        return module

    saved(tmp_path, model(1.0))
    assert digest(loaded(tmp_path, model(2.0))) == digest(model(1.0))


def test_a_model_without_anything_comes_back(tmp_path: Path) -> None:
    saved(tmp_path, nn.ReLU())
    loaded(tmp_path, nn.ReLU())


def test_strides_of_the_live_tensor_stay(tmp_path: Path) -> None:
    saved(tmp_path, conv := nn.Conv2d(3, 4, 3))
    other = loaded(tmp_path, nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last))
    assert torch.equal(other.weight, conv.weight)
    assert other.weight.is_contiguous(memory_format=torch.channels_last)


# --- shared memory ---------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model = Tied()
    path = saved(tmp_path, model)
    other = loaded(tmp_path, Tied())
    assert other.head.weight is other.embed.weight
    assert digest(other) == digest(model)
    stored = ModelPart("model", model).capture()
    assert list(stored.tensors) == ["model/embed.weight"]
    assert set(open_checkpoint(path).state_dict("model")) == {"embed.weight", "head.weight"}


def test_tied_weights_load_into_a_model_that_does_not_tie_them(tmp_path: Path) -> None:
    model = Tied()
    saved(tmp_path, model)
    other = loaded(tmp_path, Tied(tied=False))
    assert torch.equal(other.embed.weight, model.embed.weight)
    assert torch.equal(other.head.weight, model.embed.weight)


def test_equal_weights_that_are_not_tied_load_into_a_model_that_ties_them(tmp_path: Path) -> None:
    model = Tied(tied=False)
    model.head.weight.data.copy_(model.embed.weight.data)
    saved(tmp_path, model)
    assert torch.equal(loaded(tmp_path, Tied()).embed.weight, model.embed.weight)


def test_views_of_one_memory_come_back_as_such(tmp_path: Path) -> None:
    def model(value: float) -> nn.Module:
        module = nn.Module()
        flat = torch.arange(6.0) * value
        module.register_buffer("whole", flat)
        module.register_buffer("tail", flat[3:])
        module.register_buffer("square", flat.view(2, 3))
        return module

    saved(tmp_path, model(1.0))
    other = loaded(tmp_path, model(0.0))
    assert digest(other) == digest(model(1.0))
    assert other.tail.data_ptr() == other.whole[3:].data_ptr()


def buffered(value: torch.Tensor) -> Any:
    module = nn.Linear(2, 2)
    module.register_buffer("b", value)
    return module


@pytest.mark.parametrize("view", [lambda t: t.conj(), lambda t: t.conj().imag], ids=["conj", "neg"])
def test_views_whose_values_are_not_their_memory_are_filled(tmp_path: Path, view: Any) -> None:
    value = view(torch.randn(3, dtype=torch.complex64))
    saved(tmp_path, buffered(value))
    other = loaded(tmp_path, buffered(view(torch.zeros(3, dtype=torch.complex64))))
    assert torch.equal(other.b.resolve_conj().resolve_neg(), value.resolve_conj().resolve_neg())
    assert (other.b.is_conj(), other.b.is_neg()) == (value.is_conj(), value.is_neg())


def test_an_expanded_tensor_is_refused_when_saving(tmp_path: Path) -> None:
    with pytest.raises(errors.UnsupportedStateError, match="share memory") as caught:
        saved(tmp_path, buffered(torch.zeros(1).expand(5)))
    assert caught.value.where == "model/b"


def test_an_expanded_tensor_is_found_before_anything_is_loaded(tmp_path: Path) -> None:
    saved(tmp_path, model := buffered(torch.ones(5)))
    error = refused(tmp_path, buffered(torch.zeros(1).expand(5)))
    assert error.differing == ("model/b (model: expanded, its elements share memory)",)
    other = loaded(tmp_path, buffered(torch.zeros(1).expand(5)), strict=False)
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(other.b, torch.zeros(5))


def test_an_expanded_tensor_that_is_a_copy_comes_back(tmp_path: Path) -> None:
    def model(value: float) -> nn.Module:
        hook = lambda _, state: state.update(mean=state["mean"][:1].clone().expand(3))  # noqa: E731
        return Hooked(hook, value)

    saved(tmp_path, model(3.0))
    assert loaded(tmp_path, model(0.0)).mean.tolist() == [3.0] * 3


# --- wrappers --------------------------------------------------------------------------


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def test_compiled_and_plain_models_share_checkpoints(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    saved(tmp_path / "plain", model)
    assert digest(unwrap(loaded(tmp_path / "plain", compiled(nn.Linear(2, 2))))) == digest(model)
    path = saved(tmp_path / "compiled", compiled(model))
    assert digest(loaded(tmp_path / "compiled", nn.Linear(2, 2))) == digest(model)
    assert set(open_checkpoint(path).state_dict("model")) == {"weight", "bias"}


def test_wrappers_come_off_in_any_order() -> None:
    model = nn.Linear(1, 1)
    assert unwrap(model) is model
    assert unwrap(compiled(model)) is model


def test_parameters_are_shared_out_and_buffers_nobody_hands_out_are_each_ranks_own() -> None:
    scopes = ModelPart("model", nn.BatchNorm1d(2)).capture().scopes
    assert scopes["model/weight"] is Scope.REPLICATED
    assert scopes["model/running_mean"] is Scope.PER_RANK


# --- extra state -----------------------------------------------------------------------


class Counting(nn.Module):
    """Keeps plain values beside its tensors."""

    def __init__(self, count: int, depth: int = 1) -> None:
        super().__init__()
        self.count: Any = count
        self.weight = nn.Parameter(torch.full((2,), float(count)))
        if depth:
            self.inner = Counting(count + 1, depth - 1)

    def get_extra_state(self) -> Any:
        return {"count": self.count, "history": (1, torch.arange(self.count))}

    def set_extra_state(self, state: Any) -> None:
        self.count = state["count"]
        self.history = state["history"]


def test_extra_state_comes_back(tmp_path: Path) -> None:
    saved(tmp_path, Counting(3))
    other = loaded(tmp_path, Counting(7))
    assert (other.count, other.inner.count) == (3, 4)
    assert torch.equal(other.inner.history[1], torch.arange(4))
    assert torch.equal(other.weight, torch.full((2,), 3.0))


class Scales(nn.Module):
    """Its extra state is a tensor, as transformer_engine's is; or None, before there is one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scales = torch.arange(float(size)) if size else None

    def get_extra_state(self) -> torch.Tensor | None:
        return self.scales

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        self.scales = state


@pytest.mark.parametrize(("before", "now"), [(5, 2), (5, 0), (0, 5)])
def test_an_extra_state_that_is_a_tensor_comes_back(tmp_path: Path, before: int, now: int) -> None:
    saved(tmp_path, Scales(before))
    assert digest(loaded(tmp_path, Scales(now)).scales) == digest(Scales(before).scales)


@pytest.mark.parametrize(("before", "now"), [(5, 2), (5, 0), (0, 5)])
def test_so_does_that_of_a_module_that_is_registered(tmp_path: Path, before: int, now: int) -> None:
    ckpt, again = checkpointer(tmp_path), checkpointer(tmp_path)
    ckpt.register_for_checkpointing(average=nn.Sequential(Scales(before), nn.Linear(2, 1)))
    ckpt.save_state()
    average = nn.Sequential(Scales(now), nn.Linear(2, 1))
    again.register_for_checkpointing(average=average)
    assert again.load_state()
    assert digest(average[0].scales) == digest(Scales(before).scales)


# --- entries that are no memory of the module ----------------------------------------------


class Hooked(nn.Module):
    """Its `state_dict()` goes through `hook`."""

    def __init__(self, hook: Any, value: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), value))
        self.register_buffer("mean", torch.full((3,), value))
        self.register_state_dict_post_hook(lambda module, state, *_: hook(module, state))


def cloned(module: Any, state: dict[str, Any]) -> None:
    state.update({name: value.clone() for name, value in state.items()})


def cast(module: Any, state: dict[str, Any]) -> None:
    state.update({name: value.bfloat16() for name, value in state.items()})


@pytest.mark.parametrize("hook", [cloned, cast])
def test_what_a_hook_returns_copies_of_is_loaded(tmp_path: Path, hook: Any) -> None:
    saved(tmp_path, Hooked(hook, 3.0))
    other = Hooked(hook)
    weight = other.weight
    loaded(tmp_path, other)
    assert other.weight is weight
    assert (other.weight.tolist(), other.mean.tolist()) == ([3.0] * 2, [3.0] * 3)
    assert other.weight.dtype is torch.float32


class Metric(nn.Module):
    """As torchmetrics' are with persistent(True): plain attributes, saved as copies."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.total = torch.tensor(float(sum(values)))
        self.seen = [torch.tensor(value) for value in values]

    def _save_to_state_dict(self, state: Any, prefix: str, keep_vars: bool) -> None:
        state[prefix + "total"] = self.total.clone()
        state[prefix + "seen"] = [value.clone() for value in self.seen]

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        for name in ("total", "seen"):
            if prefix + name in state:
                setattr(self, name, state.pop(prefix + name))
        super()._load_from_state_dict(state, prefix, *rest)


def test_what_a_module_saves_in_its_own_way_is_loaded_in_its_own_way(tmp_path: Path) -> None:
    model = nn.ModuleDict({"linear": nn.Linear(2, 2), "metric": Metric(1.0, 2.5)})
    saved(tmp_path, model)
    other = loaded(tmp_path, nn.ModuleDict({"linear": nn.Linear(2, 2), "metric": Metric()}))
    assert digest(other) == digest(model)
    assert other["metric"].total == 3.5
    assert [value.item() for value in other["metric"].seen] == [1.0, 2.5]


def test_what_nothing_but_the_hook_knows_is_loaded_into_its_memory(tmp_path: Path) -> None:
    """As scales of packed weights, which are neither parameters nor buffers."""

    def model(scale: float) -> Any:
        module = Hooked(lambda module, state: state.update({"scale": module.scale}))
        module.scale = torch.tensor(scale)
        return module

    saved(tmp_path, model(5.0))
    assert loaded(tmp_path, model(1.0)).scale == 5.0


def test_what_nothing_loads_must_be_as_it_was(tmp_path: Path) -> None:
    def model(version: float) -> nn.Module:
        both = {"version": torch.tensor(version), "name": "a"}
        return Hooked(lambda _, state: state.update({**both, "version": both["version"].clone()}))

    saved(tmp_path, model(1.0))
    loaded(tmp_path, model(1.0))
    ckpt = checkpointer(tmp_path)
    ckpt.prepare(model(2.0))
    with pytest.raises(errors.UnsupportedStateError, match="model/version"):
        ckpt.load_state()


def test_strict_false_leaves_copies_of_another_shape(tmp_path: Path) -> None:
    saved(tmp_path, Hooked(cloned, 3.0))
    other = Hooked(cloned)
    other.mean = torch.zeros(4)
    loaded(tmp_path, other, strict=False)
    assert (other.weight.tolist(), other.mean.tolist()) == ([3.0] * 2, [0.0] * 4)


def test_a_parameter_under_another_name_is_shared_out_and_what_is_added_is_each_ranks_own() -> None:
    def hook(module: Any, state: dict[str, Any]) -> None:
        state["renamed"] = state.pop("weight")
        state["added"] = torch.ones(1)

    scopes = ModelPart("model", Hooked(hook)).capture().scopes
    assert scopes["model/renamed"] is Scope.REPLICATED
    assert scopes["model/added"] is Scope.PER_RANK


# --- what does not fit -----------------------------------------------------------------


def test_other_names_are_listed(tmp_path: Path) -> None:
    saved(tmp_path, nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}))
    error = refused(tmp_path, nn.ModuleDict({"a": nn.Linear(2, 2), "c": nn.Linear(2, 2)}))
    assert error.missing == ("model/c.weight", "model/c.bias")
    assert error.unexpected == ("model/b.weight", "model/b.bias")
    assert error.differing == ()


def test_another_shape_is_listed_with_both(tmp_path: Path) -> None:
    saved(tmp_path, nn.Linear(2, 3))
    error = refused(tmp_path, nn.Linear(2, 4))
    assert error.differing == (
        "model/weight (checkpoint: torch.float32 [3, 2], model: torch.float32 [4, 2])",
        "model/bias (checkpoint: torch.float32 [3], model: torch.float32 [4])",
    )


@pytest.mark.filterwarnings("ignore:Lazy modules are:UserWarning")
def test_a_parameter_without_a_shape_is_named(tmp_path: Path) -> None:
    saved(tmp_path, nn.Linear(3, 2))
    ckpt = checkpointer(tmp_path)
    model = ckpt.prepare(nn.LazyLinear(2))
    for call in (ckpt.save_state, ckpt.load_state):
        with pytest.raises(errors.UnsupportedStateError, match="model/weight"):
            call()
    model(torch.ones(1, 3))
    assert ckpt.load_state()


def test_another_dtype_is_listed_with_both(tmp_path: Path) -> None:
    saved(tmp_path, nn.Linear(1, 1, bias=False))
    error = refused(tmp_path, nn.Linear(1, 1, bias=False, dtype=torch.bfloat16))
    assert error.differing == (
        "model/weight (checkpoint: torch.float32 [1, 1], model: torch.bfloat16 [1, 1])",
    )


def test_a_missing_model_is_listed_by_its_name(tmp_path: Path) -> None:
    saved(tmp_path, nn.Linear(1, 1))
    ckpt = checkpointer(tmp_path)
    ckpt.prepare(nn.Linear(1, 1), nn.Linear(1, 1))
    with pytest.raises(errors.StateMismatchError) as caught:
        ckpt.load_state()
    assert caught.value.missing == ("model_1",)


def test_strict_false_takes_what_fits_and_leaves_the_rest(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "gone": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    saved(tmp_path, model)
    other = nn.ModuleDict({"a": nn.Linear(2, 2), "new": nn.Linear(2, 2), "b": nn.Linear(2, 3)})
    before = digest(other["new"], other["b"].weight, other["b"].bias)
    loaded(tmp_path, other, strict=False)
    assert digest(other["a"]) == digest(model["a"])
    assert digest(other["new"], other["b"].weight, other["b"].bias) == before


def test_strict_false_leaves_extra_state_of_modules_that_are_gone(tmp_path: Path) -> None:
    saved(tmp_path, nn.ModuleDict({"a": nn.Linear(1, 1), "gone": Counting(3)}))
    loaded(tmp_path, nn.ModuleDict({"a": nn.Linear(1, 1)}), strict=False)


def test_strict_false_warns_about_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, nn.Linear(2, 2))
    loaded(tmp_path, nn.Linear(2, 3), strict=False)
    assert "model/weight" in caplog.text
