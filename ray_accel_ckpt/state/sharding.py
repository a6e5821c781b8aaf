"""Tensors that are cut over a mesh of ranks: what this rank holds of them, and who else does.

The one kind that is read is torch's `DTensor`, as FSDP2 (`fully_shard`), HSDP
and tensor parallel plans make it. Its module is imported by whoever makes one;
where nobody has, nothing is sharded.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import xxhash
from torch import nn

from ray_accel_ckpt.errors import UnsupportedStateError
from ray_accel_ckpt.state.box import Box

# A placement that shards, the length of its mesh dimension, and this rank's place in it.
_Cut: TypeAlias = tuple[Any, int, int]


@dataclass(frozen=True, kw_only=True)
class Held:
    """What this rank holds of a sharded tensor.

    Attributes:
        box: the indices of the whole tensor that the local one is.
        peers: the ranks that hold the very same, this one among them, in rank order.
        layout: mesh and placements as text, the same on all ranks.
    """

    box: Box
    peers: tuple[int, ...]
    layout: str


def is_sharded(tensor: Any) -> bool:
    """Whether `tensor` is a `DTensor`."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The memory that is this rank's: of a `DTensor` its local shard, else the tensor itself."""
    here: torch.Tensor = tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return here.detach()


def memory_of(tensor: torch.Tensor) -> int:
    """What tensors of one memory have in common; 0 for those that have none."""
    try:
        return local(tensor).untyped_storage().data_ptr()
    except RuntimeError:
        # Subclasses that only wrap others.
        return 0


def held(tensor: torch.Tensor, where: str) -> Held:
    """What this rank holds of a `DTensor`. Asks no other rank.

    A mesh over some of the ranks has to be a part of one over all of them, as
    ``mesh["dp"]`` is. Copies along the other dimensions are taken to be equal,
    which torch's own checkpoints do too: whoever trains so keeps them equal.

    Args:
        where: the tensor's name, for errors.

    Raises:
        UnsupportedStateError: its shards are not boxes of such a mesh.
    """
    sharded: Any = tensor
    mesh, placements = sharded.device_mesh, tuple(sharded.placements)
    coordinate = mesh.get_coordinate()
    world_size = torch.distributed.get_world_size()
    copies = tuple(placement.is_replicate() for placement in placements)
    peers = _peers(mesh, tuple(coordinate or ()), copies, world_size)
    if not peers:
        raise UnsupportedStateError(
            "a tensor is sharded over some of the workers only",
            where=where,
            why=f"its mesh has {mesh.size()} of {world_size} ranks; whether the others hold "
            "copies of it, the tensor does not say",
            remedy="make one mesh of all ranks with init_device_mesh, and use that or a part of "
            "it, mesh['dp'] say",
        )
    size = tuple(tensor.shape)
    cuts: list[list[_Cut]] = [[] for _ in size]
    for dim, placement in enumerate(placements):
        if placement.is_partial():
            raise UnsupportedStateError(
                "a tensor is not yet summed over the workers",
                where=where,
                why=f"its placement is {placement}",
                remedy="call redistribute() on it before it becomes part of a state",
            )
        if not placement.is_replicate():
            cuts[placement.dim].append((placement, mesh.size(dim), coordinate[dim]))
    ranges = [_range(n, tuple(each)) for n, each in zip(size, cuts, strict=True)]
    box = Box(start=tuple(start for start, _ in ranges), size=tuple(n for _, n in ranges))
    here = local(tensor)
    if tuple(here.shape) != box.size or type(here) not in (torch.Tensor, nn.Parameter):
        raise UnsupportedStateError(
            "a local shard is not the part that its placements say",
            where=where,
            why=f"it is a {type(here).__qualname__} of {list(here.shape)}, expected was "
            f"{list(box.size)} of {list(size)} for {placements}",
            remedy="make it with fully_shard, parallelize_module or distribute_tensor",
        )
    return Held(box=box, peers=peers, layout=f"{_text(mesh)} {placements}")


def empty_like(
    template: torch.Tensor, dtype: torch.dtype, device: torch.device | None = None
) -> torch.Tensor:
    """A fresh tensor of the shape, memory layout and sharding of `template`, not filled.

    Args:
        device: where it lies; None: where `template` does.
    """
    # Not DTensor.from_local: that moves what is offloaded to the host onto the mesh's device.
    return torch.empty_like(template.detach(), dtype=dtype, device=device)


def reshard(module: nn.Module) -> None:
    """Put FSDP2's sharded parameters back in place, as between two steps of training.

    After a forward without a backward the root keeps its gathered ones, which
    are other objects than those an optimizer knows.
    """
    for each in _fsdp_modules(module):
        each.reshard()


def has_unreduced_gradients(module: nn.Module) -> bool:
    """Whether FSDP2 keeps gradients that are not summed over the ranks yet.

    So it is after a backward under `set_requires_gradient_sync(False)`, and with
    HSDP under `set_requires_all_reduce(False)`.
    """
    for each in _fsdp_modules(module):
        state = each._get_fsdp_state()
        one = getattr(state, "_fsdp_param_group", None)
        for group in getattr(state, "_fsdp_param_groups", [one] if one else []):
            # HSDP's sum over the shards that waits for the one over the copies.
            if getattr(group, "_partial_reduce_output", None) is not None:
                return True
            for parameter in group.fsdp_params:
                gathered = getattr(parameter, "_unsharded_param", None)
                if parameter.unsharded_accumulated_grad is not None:
                    return True
                if gathered is not None and gathered.grad is not None:
                    return True
    return False


def _fsdp_modules(module: nn.Module) -> Iterator[Any]:
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        yield from (each for each in module.modules() if isinstance(each, fsdp.FSDPModule))


@functools.lru_cache(maxsize=65_536)
def _range(length: int, cuts: tuple[_Cut, ...]) -> tuple[int, int]:
    """First and number of the indices that are left of `length` after the cuts, one by one.

    Each placement is asked to split the indices itself, so that torch's own rule
    for uneven and strided shards is the one that counts. A number of -1 says
    that what is left is not consecutive.
    """
    left = torch.arange(length, device="cpu")
    for placement, parts, index in cuts:
        line = left.reshape([-1 if d == placement.dim else 1 for d in range(placement.dim + 1)])
        shards, _ = placement._split_tensor(line, parts, with_padding=False, contiguous=False)
        left = shards[index].flatten()
    if len(left) == 0:
        return 0, 0
    first = int(left[0])
    consecutive = torch.equal(left, torch.arange(first, first + len(left), device="cpu"))
    return first, len(left) if consecutive else -1


@functools.lru_cache(maxsize=256)
def _peers(
    mesh: Any, own: tuple[int, ...], copies: tuple[bool, ...], world_size: int
) -> tuple[int, ...]:
    """Ranks that hold what the one at `own` holds; none if the mesh does not tell.

    They differ from it in mesh dimensions that replicate, and in dimensions of
    the whole mesh that this one, a part of it, does not have.
    """
    whole = _root(mesh).mesh
    if not own or sorted(whole.flatten().tolist()) != list(range(world_size)):
        return ()
    at = {int(whole[i]): i for i in itertools.product(*map(range, whole.shape))}
    mine = at[int(mesh.mesh[own])]
    part = [at[rank] for rank in mesh.mesh.flatten().tolist()]
    outside = [dim for dim, i in enumerate(mine) if all(other[dim] == i for other in part)]
    if math.prod(n for dim, n in enumerate(whole.shape) if dim not in outside) != len(part):
        return ()
    alike = mesh.mesh[
        tuple(slice(None) if copy else i for i, copy in zip(own, copies, strict=True))
    ]
    found = []
    for rank in alike.flatten().tolist():
        free = (slice(None) if dim in outside else i for dim, i in enumerate(at[rank]))
        found += whole[tuple(free)].flatten().tolist()
    return tuple(sorted(found))


@functools.lru_cache(maxsize=256)
def _text(mesh: Any) -> str:
    """A digest of the whole mesh, and of which dimensions: a part's own ranks differ."""
    whole = f"{_root(mesh).mesh.tolist()} {mesh.mesh_dim_names} {tuple(mesh.shape)}"
    return xxhash.xxh3_128_hexdigest(whole.encode())


def _root(mesh: Any) -> Any:
    return getattr(mesh, "_root_mesh", None) or mesh
