"""The entries of a model's `state_dict()`: which are memory of the module, and which are copies.

Memory is filled in place. Copies are made by hooks that clone or cast, by metrics and
by packed weights: filling one would fill nothing, so the module loads it by its own means.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ray_accel_ckpt.errors import UnsupportedStateError
from ray_accel_ckpt.state.part import SavedPart
from ray_accel_ckpt.state.sharding import local, memory_of
from ray_accel_ckpt.state.tree import encoded_items, flatten, tensor_ref

_EXTRA_STATE = "_extra_state"


def is_extra(name: str) -> bool:
    """Whether `get_extra_state` returned it: a value of any kind, a tensor of any shape."""
    return name.rpartition(".")[2] == _EXTRA_STATE


def stored_entries(saved: SavedPart) -> dict[str, str]:
    """Names of the stored state dict, each with the tensor that holds it ("" for extra state)."""
    return {name: tensor_ref(value) for name, value in encoded_items(saved.value).items()}


def fitting(live: Mapping[str, Any], saved: SavedPart) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Tensors of a live state that the checkpoint has alike: name, stored name, tensor."""
    stored = stored_entries(saved)
    for name, tensor in live.items():
        spec = saved.tensors.get(stored.get(name, ""))
        if not isinstance(tensor, torch.Tensor) or spec is None or is_extra(name):
            continue
        if (spec.dtype, spec.shape) == (tensor.dtype, tuple(tensor.shape)):
            yield name, stored[name], tensor


def fits(live: Any, saved: Any) -> bool:
    """Whether a saved value may be given for a live one. Of what is no tensor the module judges."""
    if not isinstance(live, torch.Tensor):
        return True
    both = isinstance(saved, torch.Tensor)
    return both and (live.dtype, live.shape) == (saved.dtype, saved.shape)


def copies_in(module: nn.Module, state: Mapping[str, Any]) -> set[str]:
    """Names of entries that are no memory of the module."""
    held = {memory_of(t) for t in chain(module.parameters(), module.buffers())}
    # What has no address has no bytes either.
    held.add(0)
    return {
        name
        for name, value in state.items()
        if not is_extra(name) and not (isinstance(value, torch.Tensor) and memory_of(value) in held)
    }


def overlapping_in(module: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Names of memory of the module that cannot be filled, since elements share some of it."""
    found = [n for n, t in state.items() if isinstance(t, torch.Tensor) and _overlaps(t)]
    copies = copies_in(module, state) if found else set()
    return [name for name in found if name not in copies and not is_extra(name)]


def give(
    module: nn.Module, state: Mapping[str, Any], *, where: str, like: Mapping[str, Any]
) -> None:
    """Have the module load what its `state_dict()` returns copies of.

    Args:
        where: what names begin with in errors.
        like: what `state_dict()` returns.

    Raises:
        UnsupportedStateError: nothing loads some of it, and it is not what was saved.
    """
    given = OrderedDict(state)
    # Versions of the modules, without which they take a state for an old one.
    given._metadata = getattr(like, "_metadata", None)  # type: ignore[attr-defined]
    taken = module.load_state_dict(given, strict=False)
    left = [name for name in getattr(taken, "unexpected_keys", ()) if name in state]
    if not left:
        return
    # Memory that is neither a parameter nor a buffer (scales of packed weights), or constant.
    live = module.state_dict()
    for name in left:
        if isinstance(live.get(name), torch.Tensor) and fits(live[name], state[name]):
            live[name].copy_(state[name])
    live = module.state_dict()
    lost = [name for name in left if name not in live or not _same(live[name], state[name])]
    if lost:
        raise UnsupportedStateError(
            f"{len(lost)} values of a model's state_dict() are not loaded by anything",
            where=", ".join(f"{where}/{name}" for name in lost[:5]),
            why="state_dict() returns copies of them, the model's load_state_dict() does not "
            "take them, and they are not what was saved",
            remedy="make them buffers, or let _load_from_state_dict or a hook of "
            "register_load_state_dict_pre_hook take them; then load in a new process: "
            "the rest of the state may have been loaded here",
        )


def _overlaps(tensor: torch.Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_nested:
        return False
    strides = tensor.stride()
    return 0 in strides and any(
        stride == 0 and size > 1 for stride, size in zip(strides, tensor.shape, strict=True)
    )


def _same(live: Any, saved: Any) -> bool:
    """Whether two values are the same to the bit, wherever they are."""
    ours, theirs = (
        flatten(tree_map_only(torch.Tensor, lambda t: local(t).cpu(), value), "")
        for value in (live, saved)
    )
    return ours.value == theirs.value and all(
        torch.equal(_bytes(tensor), _bytes(theirs.tensors[name]))
        for name, tensor in ours.tensors.items()
    )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
