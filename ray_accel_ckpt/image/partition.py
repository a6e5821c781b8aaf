"""Which rank writes which rows of which tensor.

All replicated tensors are laid end to end in name order, and the line of bytes
is cut into `world_size` equal pieces, each cut moved down to a row boundary. So
the largest share exceeds the mean by less than one row, no rank asks another,
and every rank computes the same cuts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import xxhash

from ray_accel_ckpt.errors import UnsupportedStateError
from ray_accel_ckpt.image.dtypes import STORED, name_of
from ray_accel_ckpt.image.manifest import MAX_DIMENSIONS, MAX_NAME
from ray_accel_ckpt.state.part import Captured, Scope


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A whole tensor, wherever its rows end up. A scalar has one row."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    scope: Scope

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_nbytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_nbytes


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Rows [start, stop) of one tensor."""

    spec: TensorSpec
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.spec.shape[1:]) if self.spec.shape else ()

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.spec.row_nbytes


def specs_of(captured: Mapping[str, Captured]) -> list[TensorSpec]:
    """Every tensor of a captured bundle, by name.

    Raises:
        UnsupportedStateError: a dtype, a name or a shape that the format does not have.
    """
    specs = []
    for part in captured.values():
        for name, tensor in part.tensors.items():
            _refuse_unsupported(name, tensor)
            shape = tuple(tensor.shape)
            specs.append(
                TensorSpec(name=name, dtype=tensor.dtype, shape=shape, scope=part.scopes[name])
            )
    return sorted(specs, key=lambda spec: spec.name)


def share(specs: Iterable[TensorSpec], *, rank: int, world_size: int) -> list[Slice]:
    """What `rank` writes: its piece of the replicated line and all that is its own.

    Tensors without bytes are rank 0's.
    """
    specs = list(specs)
    replicated = [s for s in specs if s.scope is Scope.REPLICATED]
    total = sum(spec.nbytes for spec in replicated)
    begin, end = total * rank // world_size, total * (rank + 1) // world_size
    slices = []
    base = 0
    for spec in replicated:
        if spec.nbytes == 0:
            start, stop = (0, spec.rows) if rank == 0 else (0, 0)
            belongs = rank == 0
        else:
            start = _rows_before(begin - base, spec)
            stop = _rows_before(end - base, spec)
            belongs = start < stop
        if belongs:
            slices.append(Slice(spec=spec, start=start, stop=stop))
        base += spec.nbytes
    for spec in specs:
        if spec.scope is Scope.PER_RANK or (spec.scope is Scope.RANK_ZERO and rank == 0):
            slices.append(Slice(spec=spec, start=0, stop=spec.rows))
    return slices


def plan_digest(specs: Iterable[TensorSpec], *, world_size: int) -> str:
    """xxh3-128 of what all ranks must agree on: the replicated tensors and the world size."""
    line = [[s.name, name_of(s.dtype), list(s.shape)] for s in specs if s.scope is Scope.REPLICATED]
    text = json.dumps([world_size, line], separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def _refuse_unsupported(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in STORED:
        raise UnsupportedStateError(
            f"cannot save a tensor of {tensor.dtype}",
            where=name,
            why="the format has no such dtype",
            remedy="save it as one of: " + ", ".join(name_of(d) for d in STORED),
        )
    if len(name) > MAX_NAME or not _is_text(name):
        raise UnsupportedStateError(
            "cannot save a tensor of this name",
            where=ascii(name[:200]),
            why=f"a name has at most {MAX_NAME} characters, all of them Unicode text",
            remedy="shorten the keys of the state_dict() it is in",
        )
    if tensor.dim() > MAX_DIMENSIONS:
        raise UnsupportedStateError(
            f"cannot save a tensor of {tensor.dim()} dimensions",
            where=name,
            why=f"the format has at most {MAX_DIMENSIONS}",
            remedy="save it reshaped",
        )


def _is_text(name: str) -> bool:
    """Whether UTF-8 can spell it: a lone surrogate is in no safetensors file and no manifest."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _rows_before(position: int, spec: TensorSpec) -> int:
    return min(max(position, 0) // spec.row_nbytes, spec.rows)
