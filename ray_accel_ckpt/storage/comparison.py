"""Two checkpoints compared, bit for bit, a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ray_accel_ckpt.image.difference import Difference, difference
from ray_accel_ckpt.image.reader import Snapshot
from ray_accel_ckpt.state.leaves import (
    Form,
    Leaf,
    form_of,
    kind_of,
    leaves,
    members,
    same,
    text_of,
    texts_of_both,
)
from ray_accel_ckpt.state.part import SavedPart
from ray_accel_ckpt.state.tree import TAG, Json, unflatten
from ray_accel_ckpt.storage.catalog import ShardFetch
from ray_accel_ckpt.storage.opened import StoredTensors


@dataclass(frozen=True, kw_only=True)
class ReshapedTensor:
    """A tensor that is in both, with another shape or dtype."""

    path: str
    left: Form
    right: Form


@dataclass(frozen=True, kw_only=True)
class ChangedTensor:
    """A tensor that is in both and is not the same bits.

    Attributes:
        difference: None if its elements are no numbers: texts and dates of numpy.
    """

    path: str
    form: Form
    difference: Difference | None


@dataclass(frozen=True, kw_only=True)
class ChangedValue:
    """A value that is no tensor; both as text, long ones shortened."""

    path: str
    left: str
    right: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What two checkpoints have and have not in common.

    Paths begin with the part's name; those of what a worker has for itself end with
    ``(rank 1)``, unless it is rank 0. All come in the order of the left checkpoint.
    A tensor that several names are tied to counts once, under the first of them.

    Attributes:
        only_left, only_right: paths that the other one has not.
        equal: how many tensors are the same bits.
        tensors: how many are in both with one shape and dtype.
    """

    left: str
    right: str
    only_left: tuple[str, ...]
    only_right: tuple[str, ...]
    reshaped: tuple[ReshapedTensor, ...]
    changed: tuple[ChangedTensor, ...]
    values: tuple[ChangedValue, ...]
    equal: int
    tensors: int

    @property
    def same(self) -> bool:
        return not (
            self.only_left or self.only_right or self.reshaped or self.changed or self.values
        )


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two."""

    snapshot: Snapshot
    fetch: ShardFetch

    def tensors(self, rank: int) -> StoredTensors:
        return StoredTensors(self.snapshot, self.fetch, rank)


def compare(left: Side, right: Side) -> Comparison:
    """Compare all that both hold. In memory are two tensors at a time, of either the same one.

    What tells saves apart and is no state (run, attempt, time, who wrote which rows) is
    not compared; nor are the files: the same state saved by another number of workers
    is the same.

    Raises:
        CorruptCheckpointError: damage.
        StorageError: what storage refused.
    """
    found = _Found(left, right)
    for rank in range(max(left.snapshot.world_size, right.snapshot.world_size)):
        found.compare(rank)
    return found.comparison()


class _Found:
    def __init__(self, left: Side, right: Side) -> None:
        self._left, self._right = left, right
        self._only_left: list[str] = []
        self._only_right: list[str] = []
        self._reshaped: list[ReshapedTensor] = []
        self._changed: list[ChangedTensor] = []
        self._values: list[ChangedValue] = []
        self._equal = self._tensors = 0
        self._seen: set[tuple[str, str]] = set()

    def compare(self, rank: int) -> None:
        """All that rank 0 would load; of another rank what is its own."""
        self._seen.clear()
        ours, theirs = (side.snapshot.parts(rank) for side in (self._left, self._right))
        place = f" (rank {rank})" if rank else ""
        own = set(ours) | set(theirs)
        if rank:
            own = set().union(*(s.snapshot.per_rank_parts() for s in (self._left, self._right)))
        self._only_left += [f"{n}{place}" for n in ours if n in own and n not in theirs]
        self._only_right += [f"{n}{place}" for n in theirs if n in own and n not in ours]
        for name in ours:
            if name not in theirs:
                continue
            if name in own:
                self._compare_part(name, ours[name], theirs[name], rank, place)
            else:
                self._compare_own_tensors(name, ours[name], theirs[name], rank, place)

    def comparison(self) -> Comparison:
        return Comparison(
            left=self._left.snapshot.where,
            right=self._right.snapshot.where,
            only_left=tuple(self._only_left),
            only_right=tuple(self._only_right),
            reshaped=tuple(self._reshaped),
            changed=tuple(self._changed),
            values=tuple(self._values),
            equal=self._equal,
            tensors=self._tensors,
        )

    def _compare_part(
        self, name: str, ours: SavedPart, theirs: SavedPart, rank: int, place: str
    ) -> None:
        if ours.kind != theirs.kind:
            self._value(f"{name}{place}", ours.kind, theirs.kind)
        for path, mine, other in _paired(ours.value, theirs.value, name):
            where = f"{path}{place}"
            if other is None:
                self._only_left.append(where)
            elif mine is None:
                self._only_right.append(where)
            elif mine.stored and other.stored:
                self._tensor(where, (mine, ours), (other, theirs), rank)
            elif mine.stored or other.stored or not same(mine.value, other.value):
                self._value(where, *_texts((mine, ours), (other, theirs)))

    def _compare_own_tensors(
        self, name: str, ours: SavedPart, theirs: SavedPart, rank: int, place: str
    ) -> None:
        """Tensors that the rank has for itself in a part whose values are for all: buffers, say."""
        for path, mine, other in _paired(ours.value, theirs.value, name):
            here = mine is not None and _is_own(self._left, mine, rank)
            there = other is not None and _is_own(self._right, other, rank)
            if mine is not None and other is not None and here and there:
                self._tensor(f"{path}{place}", (mine, ours), (other, theirs), rank)
            elif here:
                self._only_left.append(f"{path}{place}")
            elif there:
                self._only_right.append(f"{path}{place}")

    def _tensor(
        self, path: str, ours: tuple[Leaf, SavedPart], theirs: tuple[Leaf, SavedPart], rank: int
    ) -> None:
        stored = ours[0].stored, theirs[0].stored
        if stored in self._seen:
            return
        self._seen.add(stored)
        form, other = form_of(*ours), form_of(*theirs)
        if form != other:
            self._reshaped.append(ReshapedTensor(path=path, left=form, right=other))
            return
        self._tensors += 1
        mine = self._left.tensors(rank)[stored[0]]
        yours = self._right.tensors(rank)[stored[1]]
        a, b = _numbers(ours[0], mine), _numbers(theirs[0], yours)
        gap = difference(_bytes(mine) if a is None else a, _bytes(yours) if b is None else b)
        if gap is None:
            self._equal += 1
            return
        known = None if a is None else gap
        self._changed.append(ChangedTensor(path=path, form=form, difference=known))

    def _value(self, path: str, left: str, right: str) -> None:
        self._values.append(ChangedValue(path=path, left=left, right=right))


def _is_own(side: Side, leaf: Leaf, rank: int) -> bool:
    own = side.snapshot.own
    return rank < len(own) and leaf.stored in own[rank]


def _paired(left: Json, right: Json, path: str) -> Iterator[tuple[str, Leaf | None, Leaf | None]]:
    """Leaves of both by path, in the order of the left; a leaf for what is of different kinds."""
    stack = [(path, left, right)]
    while stack:
        where, mine, other = stack.pop()
        ours, theirs = members(mine), members(other)
        alike = kind_of(mine) == kind_of(other)
        if ours is None or theirs is None or not alike:
            yield where, Leaf(path=where, value=mine), Leaf(path=where, value=other)
            continue
        below = [(f"{where}/{n}", ours[n], theirs[n]) for n in ours if n in theirs]
        for name in ours:
            if name not in theirs:
                for leaf in leaves(ours[name], f"{where}/{name}"):
                    yield leaf.path, leaf, None
        for name in theirs:
            if name not in ours:
                for leaf in leaves(theirs[name], f"{where}/{name}"):
                    yield leaf.path, None, leaf
        stack.extend(reversed(below))


def _texts(left: tuple[Leaf, SavedPart], right: tuple[Leaf, SavedPart]) -> tuple[str, str]:
    """Both as text, so that they can be told apart."""
    both = _text(*left), _text(*right)
    return both if both[0] != both[1] else texts_of_both(left[0].value, right[0].value)


def _text(leaf: Leaf, part: SavedPart) -> str:
    if leaf.stored:
        form = form_of(leaf, part)
        return f"tensor of {form.dtype} {list(form.shape)}"
    opened = members(leaf.value)
    return text_of(leaf.value) if opened is None else f"{kind_of(leaf.value)} of {len(opened)}"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _numbers(leaf: Leaf, tensor: torch.Tensor) -> torch.Tensor | None:
    """What is stored, as a tensor of numbers; None for texts, dates and wider floats of numpy."""
    if leaf.value[TAG] == "tensor":
        return tensor
    array: Any = unflatten(leaf.value, {leaf.stored: tensor})
    widest = {"c": 16}.get(array.dtype.kind, 8)
    if array.dtype.kind not in "biufc" or array.dtype.itemsize > widest:
        return None
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
