"""Optimizers: state keyed by parameter name, so that order and grouping may change.

`Optimizer.state_dict()` numbers parameters by position. DCP's helper names
them, but steps an optimizer that has no state yet, which leaves Adam's `step`
one too high for ever. Here the positions are translated and nothing is run.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.optim import Optimizer

from ray_accel_ckpt.errors import CorruptCheckpointError, UnsupportedStateError
from ray_accel_ckpt.state.part import (
    Captured,
    Differences,
    SavedPart,
    Scope,
    captured_tree,
    require,
)
from ray_accel_ckpt.state.sharding import is_sharded
from ray_accel_ckpt.state.tree import Json, encoded_items, tensor_refs

# What torch's own optimizers keep in the shape of the parameter. Others may mean something else
# by these names: NovoGrad's exp_avg_sq is a number.
_LIKE_PARAMETER = frozenset(
    ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg", "acc_delta")
)

Index = Callable[[], Mapping[int, str]]
Own = Callable[[], Collection[int]]


class OptimizerPart:
    """Saved as ``{"state": {parameter: {...}}, "groups": [{"params": [...], ...}]}``.

    Args:
        index: names of parameters by their `id`.
        own: the `id`s of those that each rank has for itself: so is their state.
    """

    kind = "optimizer"

    def __init__(self, name: str, optimizer: Optimizer, index: Index, own: Own = frozenset) -> None:
        self.name = name
        self.optimizer = optimizer
        self._index = index
        self._own = own

    def capture(self) -> Captured:
        captured = self.named(self.optimizer.state_dict())
        return replace(captured, scopes={**captured.scopes, **self._scopes(captured)})

    def named(self, live: Mapping[str, Any]) -> Captured:
        """What `state_dict()` of an optimizer of these parameters returned, by their names."""
        names = self._names()
        tree = {
            "state": {
                names[key] if isinstance(key, int) else key: value
                for key, value in live["state"].items()
            },
            "groups": [
                {**group, "params": [names[i] for i in group["params"]]}
                for group in live["param_groups"]
            ],
        }
        extra = {k: v for k, v in live.items() if k not in ("state", "param_groups")}
        if extra:
            tree["extra"] = extra
        return captured_tree(tree, name=self.name, kind=self.kind, scope=Scope.REPLICATED)

    def _scopes(self, captured: Captured) -> dict[str, Scope]:
        """What is not replicated in an optimizer of sharded parameters.

        Raises:
            UnsupportedStateError: a state of a sharded parameter that is neither
                sharded like it nor a single number.
        """
        own = self._own()
        if not own and not self._sharded():
            return {}
        parameters = self._named()
        scopes = {}
        for name, parameter, ref in self._states(captured.value, parameters):
            tensor = captured.tensors[ref]
            if id(parameter) in own:
                scopes[ref] = Scope.PER_RANK
            elif not is_sharded(parameter):
                continue
            elif is_sharded(tensor) and tensor.shape == parameter.shape:
                scopes[ref] = Scope.SHARDED
            elif is_sharded(tensor) or tensor.numel() != 1:
                raise UnsupportedStateError(
                    "cannot save this optimizer's state of a sharded parameter",
                    where=ref,
                    why=f"it is no DTensor of {list(parameter.shape)} as {name!r} is, and what "
                    "part of it belongs to which worker is not known",
                    remedy="use an optimizer whose state has the parameter's shape, as that of "
                    "AdamW has, or do not shard the model",
                )
        return scopes

    def replicated(self, saved: SavedPart) -> set[str]:
        """Stored names of what has to be the same on all ranks."""
        own = self._own()
        states = self._states(saved.value, self._named())
        return {ref for _, p, ref in states if id(p) not in own and not is_sharded(p)}

    def _states(
        self, value: Json, parameters: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor, str]]:
        """Name and parameter of each tensor of a captured or saved state, and the tensor's name."""
        for name, encoded in encoded_items(encoded_items(value).get("state")).items():
            if name in parameters:
                for ref in tensor_refs(encoded):
                    yield name, parameters[name], ref

    def compare(self, saved: SavedPart, differences: Differences) -> None:
        parameters = self._named()
        stored = [name for group in _groups(saved.value) for name in group]
        known = set(stored)
        differences.missing += [f"{self.name}/{n}" for n in parameters if n not in known]
        differences.unexpected += [f"{self.name}/{n}" for n in stored if n not in parameters]
        live_groups = len(self.optimizer.param_groups)
        if len(_groups(saved.value)) != live_groups:
            differences.differing.append(
                f"{self.name} (checkpoint: {len(_groups(saved.value))} parameter groups, "
                f"optimizer: {live_groups})"
            )
        lacking = _lacking(self.optimizer, saved.value["groups"])
        if lacking:
            differences.differing.append(
                f"{self.name} (checkpoint: of an optimizer without {', '.join(lacking)}, "
                f"registered: {type(self.optimizer).__qualname__})"
            )
        if not self._sharded():
            return
        for name, parameter, ref in self._states(saved.value, parameters):
            shape = saved.tensors[ref].shape
            if is_sharded(parameter) and shape != tuple(parameter.shape) and math.prod(shape) != 1:
                differences.differing.append(
                    f"{ref} (checkpoint: {list(shape)}; {name!r} is sharded, and only what has "
                    f"its shape {list(parameter.shape)} can be dealt out like it)"
                )

    def targets(self, saved: SavedPart) -> Mapping[str, torch.Tensor]:
        return {}

    def templates(self, saved: SavedPart) -> Mapping[str, torch.Tensor]:
        # Fused kernels go through parameter and state as they lie in memory.
        return {
            ref: parameter
            for _, parameter, ref in self._states(saved.value, self._named())
            if saved.tensors[ref].shape == tuple(parameter.shape)
            # The count of steps has the shape of a scalar parameter, and is no part of it.
            and not ref.endswith("/step")
        }

    def check(self, state: Any) -> None:
        torchs = _is_torchs(self.optimizer)
        shapes = {name: p.shape for name, p in self._named().items()} if torchs else {}
        known = isinstance(state, dict) and {"state", "groups"} <= set(state)
        extra = state.get("extra", {}) if known else None
        sound = known and isinstance(state["state"], dict)
        sound = sound and isinstance(extra, dict) and not {"state", "param_groups"} & set(extra)
        require(sound, self.name, "expected state and groups")
        for name, saved in state["state"].items():
            require(isinstance(saved, dict), self.name, f"the state of {name!r} is no dict")
            for key, value in saved.items():
                alike = key not in _LIKE_PARAMETER or name not in shapes
                fits = alike or (isinstance(value, torch.Tensor) and value.shape == shapes[name])
                require(fits, self.name, f"{key} of {name!r} has not the parameter's shape")

    def apply(self, state: Any) -> None:
        names = self._names()
        groups = _regrouped(state["groups"], self._grouped(names))
        self.optimizer.load_state_dict(positional({**state, "groups": groups}, names))
        self._undo_casts(state["state"], names)

    def _undo_casts(self, saved: Mapping[str, Any], names: list[str]) -> None:
        """`load_state_dict` casts state to the parameter's dtype: fp32 moments of a bf16
        parameter would be rounded. What was saved in another dtype goes back as it was."""
        for name, parameter in zip(names, self._parameters(), strict=True):
            live = self.optimizer.state.get(parameter, {})
            for key, value in saved.get(name, {}).items():
                if key in live:
                    live[key] = _uncast(live[key], value)

    def written(self) -> list[torch.Tensor]:
        """All that `step` writes: parameters, and the state that it keeps of them."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        return [*self._parameters(), *(t for t in states if isinstance(t, torch.Tensor))]

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _sharded(self) -> bool:
        return any(map(is_sharded, self._parameters()))

    def _named(self) -> dict[str, torch.nn.Parameter]:
        return dict(zip(self._names(), self._parameters(), strict=True))

    def _grouped(self, names: list[str]) -> list[list[str]]:
        each = iter(names)
        return [[next(each) for _ in group["params"]] for group in self.optimizer.param_groups]

    def _names(self) -> list[str]:
        """One name a parameter, in position order; unnamed ones go by group and place."""
        index = self._index()
        return [
            index.get(id(p), f"group.{g}.{i}")
            for g, group in enumerate(self.optimizer.param_groups)
            for i, p in enumerate(group["params"])
        ]


def _uncast(now: Any, saved: Any) -> Any:
    """What `load_state_dict` has made of a saved value, with the dtypes that it was saved with."""
    if isinstance(saved, torch.Tensor) and isinstance(now, torch.Tensor):
        return now if now.dtype == saved.dtype else saved.to(now.device)
    if isinstance(saved, dict) and isinstance(now, dict):
        return type(saved)({key: _uncast(now.get(key), value) for key, value in saved.items()})
    if isinstance(saved, deque) and isinstance(now, deque):
        return deque(map(_uncast, now, saved), saved.maxlen)
    if isinstance(saved, (list, tuple)) and type(now) is type(saved):
        return type(saved)(map(_uncast, now, saved))
    # It goes through a text as through a list, and writes down what it goes through it with.
    return saved if isinstance(saved, str) else now


def positional(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The decoded state of a part as `Optimizer.state_dict()` has it: parameters by position.

    Args:
        names: of all parameters, in the order of their positions.
    """
    position = {name: i for i, name in enumerate(names)}
    return {
        "state": {position.get(key, key): each for key, each in state["state"].items()},
        "param_groups": [
            {**group, "params": [position[n] for n in group["params"]]} for group in state["groups"]
        ],
        **state.get("extra", {}),
    }


def _groups(value: Json) -> list[list[str]]:
    try:
        return [[str(n) for n in group["params"]] for group in value["groups"]]
    except (KeyError, TypeError) as e:
        raise CorruptCheckpointError(
            "an optimizer's manifest entry has no parameter groups",
            why=f"{type(e).__name__}: {e}",
            remedy="use another checkpoint",
        ) from e


def _lacking(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Hyperparameters that an optimizer of torch's would look for in saved groups in vain.

    What groups of an older torch lack, its `__setstate__` fills in: asked of one without a state.
    """
    if not _is_torchs(optimizer):
        return []
    kind = type(optimizer)
    blank = kind.__new__(kind)
    blank.defaults = {}
    blank.__setstate__({"state": {}, "param_groups": [{**group, "params": []} for group in groups]})
    return [key for key in optimizer.defaults if any(key not in g for g in blank.param_groups)]


def _is_torchs(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torch.optim.")


def _regrouped(groups: list[dict[str, Any]], live: list[list[str]]) -> list[dict[str, Any]]:
    """The saved groups in the live order, parameters in the live order within each.

    Groups are matched by their parameters. Where these were redistributed among as many
    groups, the group in the same place gives the hyperparameters. Torch keeps the live
    group's own `param_names` if a saved one has none.
    """
    unnamed = [{k: v for k, v in group.items() if k != "param_names"} for group in groups]
    by_members = {frozenset(group["params"]): group for group in unnamed}
    return [
        {**by_members.get(frozenset(names), unnamed[i]), "params": names}
        for i, names in enumerate(live)
    ]
