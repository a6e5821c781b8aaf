"""The `GradScaler` that prepared optimizers step through."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any
from weakref import WeakSet

import torch
from torch.optim import Optimizer

from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.state.part import Captured, Scope, captured_tree, require
from ray_accel_ckpt.state.parts import ObjectPart

_driven: WeakSet[Optimizer] = WeakSet()


class ScalerPart(ObjectPart):
    """Steps optimizers through a scaler, and says when its scale changes.

    The scale is updated once for all of them: when each has stepped since the last
    update, or before the next loss is scaled. So all gradients of one backward are
    divided by the scale that they were multiplied by, whichever optimizer steps first;
    and optimizers that have backwards of their own, as a GAN's, do not wait for each other.

    A step that the next update is to know of is part of the state.
    """

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        super().__init__("scaler", scaler, kind="scaler")
        self._scaler = scaler
        self._optimizers: list[Optimizer] = []
        # Of those that have stepped since the last update: whether a gradient was infinite or NaN.
        self._overflowed: dict[int, Any] = {}
        self._told: Optimizer | None = None

    def drive(self, optimizer: Optimizer, stepped: Callable[[], None]) -> None:
        """Let ``optimizer.step`` go through the scaler from now on: `optimizer` stays the object
        by which the scaler knows its gradients, so ``scaler.unscale_(optimizer)`` may come before.

        Args:
            stepped: called after each step, also after one that the scaler skipped.
        """
        number, alone, inside = len(self._optimizers), optimizer.step, False
        overflowed: Any = True
        self._optimizers.append(optimizer)
        _driven.add(optimizer)

        # With the name and the arguments of the method: the scaler looks at them.
        @functools.wraps(getattr(alone, "__func__", alone))
        def step(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            nonlocal inside, overflowed
            if inside:
                # The gradients are finite, or this is a fused optimizer, which is told.
                overflowed = getattr(optimizer, "found_inf", False)
                return alone(*args, **kwargs)
            self._require_scaled(number)
            inside, overflowed = True, True
            try:
                loss = self._scaler.step(optimizer, *args, **kwargs)
            finally:
                inside = False
            self._overflowed[number] = overflowed
            if len(self._overflowed) == len(self._optimizers):
                self._update()
            stepped()
            return loss

        # As schedulers do it. They may do it before and after.
        optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the scale, which is updated before if there was a step."""
        if self._overflowed:
            self._update()
        return self._scaler.scale(loss)

    def capture(self) -> Captured:
        state = self._scaler.state_dict()
        if self._overflowed and state:
            state["stepped"] = sorted(self._overflowed)
            state["overflowed"] = any(map(bool, self._overflowed.values()))
        return captured_tree(state, name=self.name, kind=self.kind, scope=Scope.RANK_ZERO)

    def check(self, state: Any) -> None:
        known = isinstance(state, dict)
        stepped = state.get("stepped", []) if known else None
        sound = isinstance(stepped, list) and all(type(n) is int and n >= 0 for n in stepped)
        sound = sound and type(state.get("overflowed", False)) is bool
        require(sound, self.name, "expected the state of a scaler")

    def apply(self, state: Any) -> None:
        if self._overflowed:
            self._update()
        state = dict(state)
        stepped, overflowed = state.pop("stepped", []), state.pop("overflowed", False)
        self._scaler.load_state_dict(state)
        for number in stepped:
            self._overflowed[number] = overflowed
        if stepped and self._optimizers:
            self._tell(overflowed)

    def _update(self) -> None:
        self._scaler.update()
        self._overflowed.clear()
        self._told = None

    def _tell(self, overflowed: bool) -> None:
        """Let the scaler's next update know what it knew when it was saved."""
        # It takes no other word for it than the gradients of an optimizer; which must stay,
        # since it goes by its id.
        device = self._optimizers[0].param_groups[0]["params"][0].device
        gradient = torch.nn.Parameter(torch.zeros((), device=device))
        gradient.grad = torch.full_like(gradient, torch.inf if overflowed else 0.0)
        self._told = torch.optim.SGD([gradient])
        self._scaler.scale(torch.zeros((), device=device))
        self._scaler.unscale_(self._told)

    def _require_scaled(self, number: int) -> None:
        if number in self._overflowed:
            raise ConfigurationError(
                "an optimizer steps a second time, and the scale was not updated in between",
                where=type(self._optimizers[number]).__name__,
                why=f"{len(self._optimizers)} prepared optimizers share the scaler, so it is "
                "updated when all have stepped, or before Checkpointer.backward scales a loss",
                remedy="call ckpt.backward(loss) in the place of scaler.scale(loss).backward()",
            )


def refuse_driven(optimizer: Optimizer) -> None:
    """Raise `ConfigurationError` if the optimizer steps through a scaler already."""
    if optimizer in _driven:
        raise ConfigurationError(
            "an optimizer is prepared already, by another Checkpointer",
            where=type(optimizer).__name__,
            why="its step goes through the scaler of that one",
            remedy="make the optimizer anew for each Checkpointer, in the same notebook cell say",
        )
