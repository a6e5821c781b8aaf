"""Models built on the meta device: memory, and values as far as their modules know them.

A model that does not fit twice is built without memory (``with torch.device("meta")``)
and filled from the checkpoint. What the checkpoint does not fill must not be used:
before a first checkpoint, modules initialise themselves, as FSDP has them do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ray_accel_ckpt.errors import ConfigurationError


class Unset:
    """Names of a model's tensors that have memory and no values yet.

    A forward hook of the model until they have: it may be copied and pickled with it.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names = set(names)

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.require_none()

    def __deepcopy__(self, memo: Any) -> Unset:
        return self

    def require_none(self) -> None:
        """Raise `ConfigurationError` if a tensor has no values."""
        if self.names:
            raise ConfigurationError(
                f"{len(self.names)} tensors of a model have no values",
                where=", ".join(sorted(self.names)[:5]),
                why="it was built on the meta device, their modules have no reset_parameters(), "
                "and no checkpoint was loaded",
                remedy="add reset_parameters() to these modules, or call load_state() on a "
                "checkpoint that holds them",
            )


def materialise(model: nn.Module, device: torch.device) -> Unset:
    """Give what lies on the meta device memory on `device`; the rest stays where it is.

    Parameters keep their identity, so optimizers and ties stay right. Of modules that
    hold such tensors, `reset_parameters()` is called.

    Returns:
        What has no values: its modules have no such method.

    Raises:
        ConfigurationError: a buffer that no checkpoint would hold has none.
    """
    found = {name: m for name, m in model.named_modules() if any(t.is_meta for t in _own(m))}
    if not found:
        return Unset()
    with _identity_kept():
        model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)  # type: ignore[no-untyped-call]
    unset: list[str] = []
    lost: list[str] = []
    for name, module in found.items():
        if callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()
            continue
        prefix = f"{name}." if name else ""
        for key in itertools.chain(module._parameters, module._buffers):
            passing = key in module._non_persistent_buffers_set
            (lost if passing else unset).append(prefix + key)
    if lost:
        raise ConfigurationError(
            "a buffer on the meta device would never get values",
            where=", ".join(lost[:5]),
            why="it is not persistent, so no checkpoint holds it, and its module has no "
            "reset_parameters()",
            remedy="compute it in reset_parameters(), or build this module on a real device",
        )
    state = model.state_dict(keep_vars=True)
    return Unset(name for name in unset if name in state)


def _own(module: nn.Module) -> Iterator[torch.Tensor]:
    held = itertools.chain(module._parameters.values(), module._buffers.values())
    return (tensor for tensor in held if tensor is not None)


@contextmanager
def _identity_kept() -> Iterator[None]:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
