"""The model: parameters, buffers, extra state, under any wrapper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ray_accel_ckpt.errors import UnsupportedStateError
from ray_accel_ckpt.state.entries import (
    copies_in,
    fits,
    fitting,
    give,
    is_extra,
    overlapping_in,
    stored_entries,
)
from ray_accel_ckpt.state.materialise import Unset
from ray_accel_ckpt.state.part import Captured, Differences, SavedPart, Scope, require
from ray_accel_ckpt.state.sharding import (
    has_unreduced_gradients,
    is_sharded,
    memory_of,
    reshard,
)
from ray_accel_ckpt.state.tree import flatten, same_view


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside `DistributedDataParallel` and `torch.compile` wrappers."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


class ModelPart:
    """Names are those of the unwrapped module's `state_dict()`; values go in place.

    Where `state_dict()` returns no memory of the module but copies (hooks that clone or cast,
    metrics, packed weights), the module's own `load_state_dict` takes them.

    Args:
        unset: what has no values until it is loaded.
    """

    kind = "model"

    def __init__(self, name: str, model: nn.Module, unset: Unset | None = None) -> None:
        self.name = name
        self.unset = unset or Unset()
        self.model = model
        self.module = unwrap(model)

    def weights(self) -> dict[str, Any]:
        """The state dict that save hooks see and may take entries out of."""
        return dict(self.module.state_dict())

    def capture(self, weights: Mapping[str, Any] | None = None) -> Captured:
        whole = self.weights()
        state = whole if weights is None else dict(weights)
        flat = flatten(state, self.name)
        for name in overlapping_in(self.module, state):
            raise UnsupportedStateError(
                "cannot save a tensor whose elements share memory",
                where=f"{self.name}/{name}",
                why="it was expanded, and loading cannot write its elements one by one",
                remedy="give the module a contiguous one: tensor.clone()",
            )
        return Captured(
            kind=self.kind,
            per_rank=False,
            value=flat.value,
            tensors=flat.tensors,
            scopes=self._scopes(flat.tensors, state),
            omitted=tuple(n for n in whole if n not in state),
        )

    def _scopes(
        self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
    ) -> dict[str, Scope]:
        """Of the tensors of a state dict, by stored name."""
        parameters = {
            f"{self.name}/{n}" for n, _ in self.module.named_parameters(remove_duplicate=False)
        }
        own = {f"{self.name}/{n}" for n in self.own_names()}
        buffers = {f"{self.name}/{n}" for n, _ in self.module.named_buffers(remove_duplicate=False)}
        added: dict[str, torch.Tensor] = {}
        scopes = {}
        for name, tensor in tensors.items():
            if is_sharded(tensor):
                scopes[name] = Scope.SHARDED
            elif name in own:
                scopes[name] = Scope.PER_RANK
            elif name in parameters:
                scopes[name] = Scope.REPLICATED
            else:
                scopes[name] = self._buffer_scope()
                key = name.removeprefix(f"{self.name}/")
                if name not in buffers and key in state and not is_extra(key):
                    added[name] = tensor
        return {**scopes, **(self._scopes_of_added(added) if added else {})}

    def compare(self, saved: SavedPart, differences: Differences) -> None:
        live, stored = self.module.state_dict(), stored_entries(saved)
        # What no state can hold cannot be compared either, and this says why.
        flatten(live, self.name)
        differences.missing += [
            f"{self.name}/{n}" for n in live if n not in stored and n not in saved.omitted
        ]
        differences.unexpected += [f"{self.name}/{n}" for n in stored if n not in live]
        differences.differing += [
            f"{self.name}/{n} (model: expanded, its elements share memory)"
            for n in overlapping_in(self.module, live)
            if n in stored
        ]
        for name, tensor in live.items():
            ref = stored.get(name)
            if not isinstance(tensor, torch.Tensor) or ref is None or is_extra(name):
                continue
            spec = saved.tensors.get(ref)
            if spec is None or (spec.dtype, spec.shape) != (tensor.dtype, tuple(tensor.shape)):
                has = "no tensor" if spec is None else f"{spec.dtype} {list(spec.shape)}"
                differences.differing.append(
                    f"{self.name}/{name} (checkpoint: {has}, "
                    f"model: {tensor.dtype} {list(tensor.shape)})"
                )

    def targets(self, saved: SavedPart) -> Mapping[str, torch.Tensor]:
        live = self.module.state_dict()
        others = {*copies_in(self.module, live), *overlapping_in(self.module, live)}
        return {ref: t for name, ref, t in fitting(live, saved) if name not in others}

    def templates(self, saved: SavedPart) -> Mapping[str, torch.Tensor]:
        live = self.module.state_dict()
        copies = copies_in(self.module, live)
        found = fitting(live, saved)
        return {ref: t for name, ref, t in found if name in copies and is_sharded(t)}

    def check(self, state: Any) -> None:
        known = isinstance(state, Mapping) and all(type(name) is str for name in state)
        require(known, self.name, "expected a state dict")

    def apply(self, state: Any) -> None:
        live = self.module.state_dict()
        copies = copies_in(self.module, live)
        others = copies.union(overlapping_in(self.module, live))
        self.unset.names.difference_update(state)
        given = {n: saved for n, saved in state.items() if n in copies and fits(live[n], saved)}
        with torch.no_grad():
            for name, saved in state.items():
                if name in others:
                    continue
                if is_extra(name):
                    if name in live:
                        owner = name.rpartition(".")[0]
                        self.module.get_submodule(owner).set_extra_state(saved)
                    continue
                # Tied weights are stored once: the names beside the target are filled from it
                # unless they are the very same memory.
                target = live.get(name)
                if not isinstance(target, torch.Tensor) or not fits(target, saved):
                    continue
                if same_view(target) != same_view(saved):
                    target.copy_(saved)
            if given:
                give(self.module, given, where=self.name, like=live)

    def own_names(self) -> set[str]:
        """Parameters and buffers of which nobody says that they are equal on all ranks.

        Those that DDP ignores, and plain parameters beside sharded ones.
        """
        parameters = list(self.module.named_parameters(remove_duplicate=False))
        beside = any(is_sharded(p) for _, p in parameters)
        plain = {n for n, p in parameters if beside and not is_sharded(p)}
        return self._ignored_by_ddp() | plain

    def replicated(self) -> set[str]:
        """Stored names of what has to be the same on all ranks."""
        state = self.weights()
        scopes = self._scopes(flatten(state, self.name).tensors, state)
        return {name for name, scope in scopes.items() if scope is Scope.REPLICATED}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those that an optimizer knows, also when a forward has gathered sharded ones."""
        reshard(self.module)
        yield from self.module.named_parameters()

    def frozen(self) -> set[str]:
        """Stored names of parameters that are not trained."""
        reshard(self.module)
        parameters = self.module.named_parameters(remove_duplicate=False)
        return {f"{self.name}/{name}" for name, p in parameters if not p.requires_grad}

    def require_reduced_gradients(self) -> None:
        """Raise `UnsupportedStateError` if gradients wait where no state can hold them."""
        if has_unreduced_gradients(self.module):
            raise UnsupportedStateError(
                "cannot save gradients that FSDP has not summed over the workers yet",
                where=self.name,
                why="the backward ran under set_requires_gradient_sync(False), or under "
                "set_requires_all_reduce(False)",
                remedy="save after optimizer.step(), or leave the gradient sync on",
            )

    def _scopes_of_added(self, added: Mapping[str, torch.Tensor]) -> dict[str, Scope]:
        """Of tensors that are in the state under names that the module does not have.

        Under another name a parameter is still one. What the module does not hold is
        each worker's own: DDP hands out buffers and nothing else.
        """
        own, buffers = self.own_names(), self._buffer_scope()
        scopes = {memory_of(buffer): buffers for buffer in self.module.buffers()}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            scopes[memory_of(parameter)] = Scope.PER_RANK if name in own else Scope.REPLICATED
        return {n: scopes.get(memory_of(t), Scope.PER_RANK) for n, t in added.items()}

    def _ignored_by_ddp(self) -> set[str]:
        ignored = getattr(self.module, "_ddp_params_and_buffers_to_ignore", ())
        return set(ignored) if isinstance(self.model, DistributedDataParallel) else set()

    def _buffer_scope(self) -> Scope:
        """DDP hands rank 0's buffers out at the next forward, unless it was told not to
        or stands inside an accumulation window (`no_sync`), where no forward syncs them."""
        wrapped = self.model
        if isinstance(getattr(wrapped, "_orig_mod", None), nn.Module):
            wrapped = wrapped._orig_mod  # type: ignore[assignment]
        if not isinstance(wrapped, DistributedDataParallel):
            # Nobody hands them out: a frozen model's statistics are each worker's own.
            return Scope.PER_RANK
        handed_out = wrapped.broadcast_buffers and wrapped.require_forward_param_sync
        return Scope.RANK_ZERO if handed_out else Scope.PER_RANK
