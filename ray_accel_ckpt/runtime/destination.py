"""Where stored rows go, and so which of them this rank needs.

A tensor that is whole on every rank is needed by all: its bytes are read once by
the group and broadcast. Of a sharded one each rank needs the rows that overlap
its own shard, and reads just these. What a worker has for itself only it reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import torch
import xxhash

from ray_accel_ckpt.image.pieces import Piece, dtype_of
from ray_accel_ckpt.image.reader import Located, Snapshot
from ray_accel_ckpt.state.box import Box, overlap
from ray_accel_ckpt.state.bundle import Plan
from ray_accel_ckpt.state.part import Scope
from ray_accel_ckpt.state.sharding import empty_like, held, is_sharded, local
from ray_accel_ckpt.state.tree import tensor_refs


class Destination:
    """The plan's live tensors, and fresh ones for the rest: of the right device, layout, sharding.

    Attributes:
        all: every tensor of the plan by stored name. What is not live yet has no values yet.

    Raises:
        UnsupportedStateError: a live tensor is sharded in a way that is not read.
    """

    def __init__(self, plan: Plan, snapshot: Snapshot, rank: int, device: torch.device) -> None:
        self._live = plan.targets
        self.all: dict[str, torch.Tensor] = dict(plan.targets)
        for _, saved in plan.parts:
            for name, where in tensor_refs(saved.value).items():
                if name in self.all:
                    continue
                info = snapshot.located(name, rank)[0].info
                template, dtype = plan.templates.get(name), dtype_of(info)
                target = device if where == "accelerator" else torch.device("cpu")
                if template is None:
                    self.all[name] = torch.empty(info.shape, dtype=dtype, device=target)
                else:
                    place = None if is_sharded(template) else target
                    self.all[name] = empty_like(template, dtype, place)
        self._boxes = {name: _box_of(name, tensor) for name, tensor in self.all.items()}

    def is_live(self, piece: Piece) -> bool:
        return piece.info.name in self._live

    def is_sharded(self, name: str) -> bool:
        return is_sharded(self.all[name])

    def box(self, name: str) -> Box:
        """What this rank holds of a tensor."""
        return self._boxes[name]

    def place(self, piece: Piece) -> torch.Tensor | None:
        """The memory (uint8) of a fresh tensor that is just the piece's bytes, if there is such."""
        name = piece.info.name
        here, box, rows = local(self.all[name]), self._boxes[name], piece.box
        # A scalar has no rows, and is not worth more.
        plain = here.device.type == "cpu" and here.is_contiguous() and bool(box.size)
        if name in self._live or not plain or piece.nbytes == 0:
            return None
        if (rows.start[1:], rows.size[1:]) != (box.start[1:], box.size[1:]):
            return None
        first = rows.start[0] - box.start[0]
        if first < 0 or first + rows.size[0] > box.size[0]:
            return None
        return here[first : first + rows.size[0]].view(-1).view(torch.uint8)

    def put(self, found: Iterable[tuple[Piece, torch.Tensor]]) -> None:
        """Copy what rows of pieces hold of this rank's part."""
        pairs = [
            overlap(local(self.all[piece.info.name]), self._boxes[piece.info.name], rows, piece.box)
            for piece, rows in found
        ]
        plain = []
        for target, found_rows in (pair for pair in pairs if pair is not None):
            if target.is_conj() or target.is_neg():
                # Views that have other values than their memory.
                target.copy_(found_rows)
            else:
                plain.append((target, found_rows))
        if plain:
            # One call: of many small tensors each costs little else than being called for.
            torch._foreach_copy_([target for target, _ in plain], [rows for _, rows in plain])


class Wanted:
    """Pieces to read, by the number of the shard that holds them.

    Attributes:
        common: needed by all ranks, and so the same on all of them.
        own: needed by this rank alone, or to be read by it whoever else needs it.

    Args:
        together: whether anything is common.
    """

    def __init__(
        self,
        plan: Plan,
        snapshot: Snapshot,
        tensors: Destination,
        rank: int,
        *,
        together: bool,
    ) -> None:
        common: dict[int, dict[str, Piece]] = {}
        own: dict[int, dict[str, Piece]] = {}
        for name in [name for _, saved in plan.parts for name in saved.tensors]:
            whole = tensors.is_sharded(name) or name in plan.replicated
            for located in self._located(snapshot, name, rank, whole=whole):
                alone = not together or _is_own(located) or tensors.is_sharded(name)
                piece = Piece.whole(located.info)
                if tensors.is_sharded(name):
                    overlap = Piece.overlapping(located.info, tensors.box(name))
                    if overlap is None:
                        continue
                    piece = overlap
                (own if alone else common).setdefault(located.shard, {})[name] = piece
        self.common = _in_order(common)
        self.own = _in_order(own)

    def digest(self) -> str:
        """Of what is common: ranks that differed in it would wait for each other for ever."""
        line = [
            [stored, piece.info.name, piece.first, piece.stop]
            for stored, pieces in self.common.items()
            for piece in pieces
        ]
        return xxhash.xxh3_128_hexdigest(json.dumps(line).encode())

    @staticmethod
    def _located(snapshot: Snapshot, name: str, rank: int, *, whole: bool) -> list[Located]:
        """Pieces of a tensor that, if `whole`, ranks hold together or as equal copies."""
        found = snapshot.located(name, rank)
        if whole and any(_is_own(each) for each in found):
            # Saved for each rank: of several copies a tensor would be made that nobody had.
            return snapshot.located(name, 0)
        return found


def _is_own(located: Located) -> bool:
    return located.info.scope == Scope.PER_RANK.value


def _box_of(name: str, tensor: torch.Tensor) -> Box:
    return held(tensor, name).box if is_sharded(tensor) else Box.whole(tensor.shape)


def _in_order(found: Mapping[int, Mapping[str, Piece]]) -> dict[int, list[Piece]]:
    return {stored: list(found[stored].values()) for stored in sorted(found)}
