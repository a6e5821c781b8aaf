"""What a part is: a named, scoped piece of the state. The adapters are in `parts`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import torch

from ray_accel_ckpt.errors import CorruptCheckpointError
from ray_accel_ckpt.state.sharding import is_sharded
from ray_accel_ckpt.state.tree import Json, flatten


class Scope(StrEnum):
    """Who holds a tensor, and so who writes it."""

    REPLICATED = "replicated"
    """The same bits on each rank by construction: written once, shared out over the ranks."""
    RANK_ZERO = "rank_zero"
    """Need not be equal; what rank 0 holds is the truth."""
    PER_RANK = "per_rank"
    """Belongs to one worker: each rank writes its own."""
    SHARDED = "sharded"
    """Cut over a mesh of ranks, a `DTensor`: each rank writes what it holds, copies once."""


@dataclass(frozen=True, kw_only=True)
class Captured:
    """One part at one moment. Tensors are references, not copies.

    Attributes:
        kind: the adapter that made it (``"model"``, ``"optimizer"``, ...).
        per_rank: whether `value` belongs to one rank, or is taken from rank 0.
        value: everything but the tensors, as tagged JSON.
        tensors: by full name, which begins with the part's name.
        scopes: the scope of each tensor.
        omitted: names a save hook took out; loading does not miss them.
    """

    kind: str
    per_rank: bool
    value: Json
    tensors: Mapping[str, torch.Tensor]
    scopes: Mapping[str, Scope]
    omitted: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SavedTensor:
    """What a checkpoint says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    sharded: bool = False


@dataclass(frozen=True, kw_only=True)
class SavedPart:
    """One part as a checkpoint holds it, before any tensor has been read."""

    kind: str
    value: Json
    tensors: Mapping[str, SavedTensor]
    omitted: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Differences:
    """What does not fit between registered objects and a checkpoint."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.differing)


class Part(Protocol):
    """One registered object."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    def capture(self) -> Captured:
        """Reference the state. Changes nothing in the object, at step 0 either."""
        ...

    def compare(self, saved: SavedPart, differences: Differences) -> None:
        """Add to `differences` whatever keeps `saved` from being applied."""
        ...

    def targets(self, saved: SavedPart) -> Mapping[str, torch.Tensor]:
        """Live tensors to copy stored ones into, by name; the others are allocated anew."""
        ...

    def templates(self, saved: SavedPart) -> Mapping[str, torch.Tensor]:
        """Tensors whose memory layout, mesh and placements such that are allocated anew get.

        By name. What neither this nor `targets` names is contiguous, and whole on each rank.
        """
        ...

    def check(self, state: Any) -> None:
        """Raise `CorruptCheckpointError` if `state` is no tree that this part writes.

        A manifest may come from anyone: what would fail half-way through
        `apply` has to be known before any part is applied.
        """
        ...

    def apply(self, state: Any) -> None:
        """Set the object's state to the saved tree, with tensors of `targets` already filled."""
        ...


def require(holds: bool, name: str, why: str) -> None:
    """Raise `CorruptCheckpointError` unless the state of part `name` holds what it must."""
    if not holds:
        raise CorruptCheckpointError(
            f"the state of part {name!r} is not one that this part writes",
            why=why,
            remedy="use another checkpoint",
        )


def captured_tree(
    value: Any, *, name: str, kind: str, scope: Scope, per_rank: bool = False
) -> Captured:
    """A part whose tensors all have one scope, but for those that are sharded."""
    flat = flatten(value, name)
    return Captured(
        kind=kind,
        per_rank=per_rank,
        value=flat.value,
        tensors=flat.tensors,
        scopes={n: Scope.SHARDED if is_sharded(t) else scope for n, t in flat.tensors.items()},
    )
