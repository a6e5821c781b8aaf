"""One adapter for each kind of object that is neither a model, an optimizer nor a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist

from ray_accel_ckpt.errors import UnsupportedStateError
from ray_accel_ckpt.state import rng
from ray_accel_ckpt.state.entries import is_extra
from ray_accel_ckpt.state.part import (
    Captured,
    Differences,
    SavedPart,
    Scope,
    captured_tree,
    require,
)
from ray_accel_ckpt.state.sharding import is_sharded
from ray_accel_ckpt.state.tree import encoded_items, tensor_ref


@runtime_checkable
class Stateful(Protocol):
    """Anything that can be registered: schedulers, scalers, averages, metrics, samplers."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


class PlainPart:
    """Parts that bring nothing to compare and copy nothing in place."""

    def compare(self, saved: SavedPart, differences: Differences) -> None:
        del saved, differences

    def targets(self, saved: SavedPart) -> Mapping[str, torch.Tensor]:
        del saved
        return {}

    def templates(self, saved: SavedPart) -> Mapping[str, torch.Tensor]:
        del saved
        return {}

    def check(self, state: Any) -> None:
        del state


class ObjectPart(PlainPart):
    """An object with `state_dict` and `load_state_dict`.

    Args:
        per_rank: each worker's state is its own; otherwise rank 0's is the truth.
    """

    def __init__(self, name: str, obj: Stateful, *, kind: str, per_rank: bool = False) -> None:
        self.name = name
        self.kind = kind
        self.object = obj
        self._per_rank = per_rank

    def capture(self) -> Captured:
        captured = captured_tree(
            self.object.state_dict(),
            name=self.name,
            kind=self.kind,
            scope=Scope.PER_RANK if self._per_rank else Scope.RANK_ZERO,
            per_rank=self._per_rank,
        )
        sharded = [n for n, scope in captured.scopes.items() if scope is Scope.SHARDED]
        if self._per_rank and sharded:
            raise UnsupportedStateError(
                "a sharded tensor is no worker's own",
                where=sharded[0],
                why=f"{self.name!r} is registered with per_rank=True",
                remedy="register it without per_rank",
            )
        return captured

    def compare(self, saved: SavedPart, differences: Differences) -> None:
        """A registered module is compared like a model, and a scaler that is enabled
        needs the state of one that was; of other objects only they know."""
        if not isinstance(self.object, (torch.nn.Module, torch.amp.GradScaler)):
            return
        live = self.object.state_dict()
        stored = encoded_items(saved.value)
        differences.missing += [f"{self.name}/{n}" for n in live if n not in stored]
        if not isinstance(self.object, torch.nn.Module):
            return
        differences.unexpected += [f"{self.name}/{n}" for n in stored if n not in live]
        for name, tensor in live.items():
            if is_extra(name) or not isinstance(tensor, torch.Tensor):
                continue
            spec = saved.tensors.get(tensor_ref(stored[name])) if name in stored else None
            if spec and (spec.dtype, spec.shape) != (tensor.dtype, tuple(tensor.shape)):
                differences.differing.append(
                    f"{self.name}/{name} (checkpoint: {spec.dtype} {list(spec.shape)}, "
                    f"registered: {tensor.dtype} {list(tensor.shape)})"
                )

    def templates(self, saved: SavedPart) -> Mapping[str, torch.Tensor]:
        """The object's own sharded tensors: an average of a sharded model's weights has such."""
        # In a process without peers nothing is sharded, and `state_dict` may cost anything.
        alone = not (dist.is_available() and dist.is_initialized())
        live = {} if alone else self.capture().tensors
        return {
            name: tensor
            for name, tensor in live.items()
            if is_sharded(tensor)
            and name in saved.tensors
            and saved.tensors[name].shape == tuple(tensor.shape)
        }

    def apply(self, state: Any) -> None:
        self.object.load_state_dict(state)


def gradient_dtype(parameter: torch.Tensor) -> torch.dtype | None:
    """Of what dtype a parameter's gradient has to be: of its own, unless the user has set another.

    None if of any. Before torch 2.10 nothing else could be set.
    """
    return getattr(parameter, "grad_dtype", parameter.dtype)


def _is_gradient(tensor: torch.Tensor, parameter: torch.Tensor) -> bool:
    return tensor.shape == parameter.shape and gradient_dtype(parameter) in (None, tensor.dtype)


class GradientPart(PlainPart):
    """Gradients of an accumulation window that a save falls into; per rank, as DDP leaves them."""

    kind = "gradients"
    name = "gradients"

    def __init__(self, named: Callable[[], Iterable[tuple[str, torch.nn.Parameter]]]) -> None:
        self._named = named

    def capture(self) -> Captured:
        gradients = {n: p.grad for n, p in self._named() if p.grad is not None}
        return captured_tree(
            gradients, name=self.name, kind=self.kind, scope=Scope.PER_RANK, per_rank=True
        )

    def templates(self, saved: SavedPart) -> Mapping[str, torch.Tensor]:
        refs = {n: tensor_ref(value) for n, value in encoded_items(saved.value).items()}
        return {
            refs[name]: parameter
            for name, parameter in self._named()
            if refs.get(name) in saved.tensors
            and saved.tensors[refs[name]].shape == tuple(parameter.shape)
        }

    def check(self, state: Any) -> None:
        known = dict(self._named())
        tensors = isinstance(state, dict) and all(
            isinstance(g, torch.Tensor) and (name not in known or _is_gradient(g, known[name]))
            for name, g in state.items()
        )
        require(tensors, self.name, "expected a gradient of its shape for each parameter")

    def fits(self, saved: SavedPart) -> bool:
        """Whether these gradients can be gone on with.

        A parameter that is sharded now has gradients that are summed over the
        ranks; of one that was not, each rank has saved its own.
        """
        templates = self.templates(saved).items()
        return all(saved.tensors[name].sharded for name, p in templates if is_sharded(p))

    def apply(self, state: Any) -> None:
        for name, parameter in self._named():
            saved = state.get(name)
            parameter.grad = None if saved is None else saved.to(parameter.device)

    def clear(self) -> None:
        """As after `zero_grad`: what a checkpoint outside any window stands for."""
        for _, parameter in self._named():
            parameter.grad = None


class RngPart(PlainPart):
    """This worker's random streams. Restored last of all.

    A rank that the checkpoint does not know gets streams derived from (seed,
    rank, attempt), so that no two workers ever share one.
    """

    kind = "rng"
    name = "rng"

    def capture(self) -> Captured:
        return captured_tree(
            rng.capture(), name=self.name, kind=self.kind, scope=Scope.PER_RANK, per_rank=True
        )

    def check(self, state: Any) -> None:
        try:
            rng.check(state)
        except rng.NOT_A_STATE as e:
            require(False, self.name, f"{type(e).__name__}: {e}")

    def apply(self, state: Any) -> None:
        rng.restore(state)


class ProgressPart(PlainPart):
    """Counters of the loop: `global_step`, `epoch`, the seed."""

    kind = "progress"
    name = "progress"

    def __init__(self, read: Callable[[], dict[str, int]], write: Callable[..., None]) -> None:
        self._read = read
        self._write = write

    def capture(self) -> Captured:
        return captured_tree(self._read(), name=self.name, kind=self.kind, scope=Scope.RANK_ZERO)

    def check(self, state: Any) -> None:
        known = isinstance(state, dict) and set(state) == set(self._read())
        counts = known and all(
            type(value) is int and -(2**63) <= value < 2**64 for value in state.values()
        )
        sound = counts and min(state["global_step"], state["epoch"]) >= 0
        require(sound, self.name, f"expected the counters {', '.join(self._read())}")

    def apply(self, state: Any) -> None:
        self._write(**state)
