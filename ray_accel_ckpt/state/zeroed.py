"""Gradients that a loop zeroes in place: to an optimizer, zeros are not None."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch.optim import Optimizer

from ray_accel_ckpt.state.part import Captured, Scope, captured_tree, require
from ray_accel_ckpt.state.parts import PlainPart, gradient_dtype
from ray_accel_ckpt.state.sharding import local


class ZeroedPart(PlainPart):
    """Which parameters have a gradient outside any accumulation window, in a loop that
    does not drop gradients (``zero_grad(set_to_none=False)``). They come back as zeros.

    What is left of the step before is of no use in itself. But an optimizer skips a
    parameter without a gradient, and goes on decaying one whose gradient is zero: that
    matters for parameters that not every step uses.

    Whether a loop drops gradients is seen from one step to the next, by whether they are
    the same tensors. Before its second step it is not known; then zeros are taken for
    zeroed ones, and anything else for what will be dropped.
    """

    kind = "zeroed_gradients"
    name = "zeroed_gradients"

    def __init__(self, named: Callable[[], Iterable[tuple[str, torch.nn.Parameter]]]) -> None:
        self._named = named
        # Whether gradients outlived the latest step; of each optimizer one, as it was then.
        self._kept: bool | None = None
        self._seen: dict[int, tuple[torch.nn.Parameter, ReferenceType[torch.Tensor]]] = {}

    def stepped(self, optimizer: Optimizer) -> None:
        """Look at what an optimizer has stepped with; once a step."""
        if id(optimizer) in self._seen:
            parameter, gradient = self._seen.pop(id(optimizer))
            self._kept = parameter.grad is not None and gradient() is parameter.grad
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        found = next((p for p in parameters if p.grad is not None), None)
        if found is not None:
            self._seen[id(optimizer)] = found, ref(found.grad)

    def forget(self) -> None:
        """As before the first step."""
        self._kept = None
        self._seen.clear()

    def capture(self) -> Captured:
        return captured_tree(self._names(), name=self.name, kind=self.kind, scope=Scope.RANK_ZERO)

    def _names(self) -> list[str]:
        if self._kept is False:
            return []
        found = {name: p.grad for name, p in self._named() if p.grad is not None}
        if self._kept is None and any(_any(gradient) for gradient in found.values()):
            return []
        return [name for name, gradient in found.items() if gradient.layout == torch.strided]

    def check(self, state: Any) -> None:
        names = isinstance(state, list) and all(type(name) is str for name in state)
        require(names, self.name, "expected names of parameters")

    def apply(self, state: Any) -> None:
        self.forget()
        self._kept = True
        names = set(state)
        for name, parameter in self._named():
            kind = gradient_dtype(parameter)
            parameter.grad = torch.zeros_like(parameter, dtype=kind) if name in names else None


def _any(gradient: torch.Tensor) -> bool:
    """Whether anything of it that lies here is not zero."""
    return gradient.layout != torch.strided or bool(local(gradient).any())
