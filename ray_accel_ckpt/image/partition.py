"""Which rank writes which rows of which tensor.

What several ranks hold alike (all of a replicated tensor, or the same shard of a
sharded one) is laid end to end in name order, and the line of bytes is cut into
as many equal pieces as there are holders, each cut moved down to a row boundary.
So the largest piece exceeds the mean by less than one row, no rank asks another,
and every holder computes the same cuts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import xxhash

from ray_accel_ckpt.errors import UnsupportedStateError
from ray_accel_ckpt.image.dtypes import STORED, name_of
from ray_accel_ckpt.image.manifest import MAX_DIMENSIONS, MAX_NAME
from ray_accel_ckpt.state.box import Box
from ray_accel_ckpt.state.part import Captured, Scope
from ray_accel_ckpt.state.sharding import Held, held


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A whole tensor, and what one rank holds of it.

    Attributes:
        box: the indices that this rank holds.
        peers: the ranks that hold the very same and share the writing of it.
        layout: how a sharded tensor is cut, the same text on all ranks.
        frozen: it does not change from save to save, and lies in a file of its own.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    scope: Scope
    box: Box
    peers: tuple[int, ...]
    layout: str = ""
    frozen: bool = False

    def fits(self, tensor: torch.Tensor, scope: Scope, *, frozen: bool) -> bool:
        """Whether this is certainly what is held of a tensor: of a sharded one nobody knows."""
        return (
            scope is not Scope.SHARDED
            and self.scope is scope
            and self.dtype is tensor.dtype
            and self.shape == tensor.shape
            and self.frozen is frozen
        )

    @property
    def row_nbytes(self) -> int:
        """Bytes of one index of the first dimension of what is held."""
        return math.prod(self.box.size[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.box.numel * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Rows [start, stop) of what this rank holds of one tensor."""

    spec: TensorSpec
    start: int
    stop: int

    @property
    def box(self) -> Box:
        """Their place in the whole tensor."""
        return self.spec.box.between(self.start, self.stop)

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.spec.row_nbytes


def specs_of(
    captured: Mapping[str, Captured],
    *,
    rank: int,
    world_size: int,
    frozen: Collection[str] = (),
    known: Mapping[str, TensorSpec] = MappingProxyType({}),
) -> list[TensorSpec]:
    """Every tensor of a captured bundle as `rank` holds it, by name.

    Args:
        frozen: names of those that do not change from save to save.
        known: what came out for an earlier bundle of the same ranks; used where it fits.

    Raises:
        UnsupportedStateError: a dtype, a name, a shape or a way of sharding
            that the format does not have.
    """
    specs = []
    for part in captured.values():
        for name, tensor in part.tensors.items():
            scope, still = part.scopes[name], name in frozen
            spec = known.get(name)
            if spec is None or not spec.fits(tensor, scope, frozen=still):
                _refuse_unsupported(name, tensor)
                spec = spec_of(name, tensor, scope, rank, world_size, frozen=still)
            specs.append(spec)
    return sorted(specs, key=lambda spec: spec.name)


def spec_of(
    name: str,
    tensor: torch.Tensor,
    scope: Scope,
    rank: int,
    world_size: int,
    *,
    frozen: bool = False,
) -> TensorSpec:
    """One tensor as `rank` of `world_size` holds it."""
    shape = tuple(tensor.shape)
    everybody = tuple(range(world_size))
    if scope is Scope.SHARDED and tensor.numel():
        here = held(tensor, name)
    elif scope is Scope.SHARDED:
        # Nothing to cut, and yet it has to be somewhere.
        here = Held(box=Box.whole(shape), peers=everybody, layout="")
    else:
        peers = {Scope.REPLICATED: everybody, Scope.RANK_ZERO: (0,), Scope.PER_RANK: (rank,)}
        here = Held(box=Box.whole(shape), peers=peers[scope], layout="")
    return TensorSpec(
        name=name,
        dtype=tensor.dtype,
        shape=shape,
        scope=scope,
        box=here.box,
        peers=here.peers,
        layout=here.layout,
        frozen=frozen,
    )


def share(specs: Iterable[TensorSpec], *, rank: int) -> list[Slice]:
    """What `rank` writes: of each line of tensors that it holds, its piece.

    Tensors without bytes are written by the first of their holders.
    """
    # Frozen tensors are lines of their own: what is written at each save is shared out evenly.
    lines: dict[tuple[tuple[int, ...], bool], list[TensorSpec]] = {}
    for spec in specs:
        if rank in spec.peers:
            lines.setdefault((spec.peers, spec.frozen), []).append(spec)
    return [piece for (peers, _), line in lines.items() for piece in _piece(line, peers, rank)]


def _piece(line: list[TensorSpec], peers: tuple[int, ...], rank: int) -> Iterable[Slice]:
    index, count = peers.index(rank), len(peers)
    total = sum(spec.nbytes for spec in line)
    begin, end = total * index // count, total * (index + 1) // count
    base = 0
    for spec in line:
        if spec.nbytes:
            start, stop = _rows_before(begin - base, spec), _rows_before(end - base, spec)
            if start < stop:
                yield Slice(spec=spec, start=start, stop=stop)
        elif index == 0 and spec.box == Box.whole(spec.shape):
            yield Slice(spec=spec, start=0, stop=spec.box.rows)
        base += spec.nbytes


def plan_digest(specs: Iterable[TensorSpec], *, world_size: int) -> str:
    """xxh3-128 of what all ranks must agree on: the tensors they share, and the world size."""
    line = [
        [
            *(s.name, name_of(s.dtype), list(s.shape)),
            *([s.layout] if s.layout else []),
            *(["frozen"] if s.frozen else []),
        ]
        for s in specs
        if s.scope in (Scope.REPLICATED, Scope.SHARDED)
    ]
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
    return min(max(position, 0) // spec.row_nbytes, spec.box.rows)
