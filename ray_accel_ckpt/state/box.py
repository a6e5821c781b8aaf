"""Boxes of a tensor's index space: what a rank holds, a slice stores, a reader wants.

A box is the product of one range a dimension. Whatever way a tensor is cut, by
rows or columns, over one mesh dimension or several, each piece is a box, and
moving data from one cutting to another is copying where two boxes meet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

_DEPTH = 8
"""Cuts within cuts: one for each tensor dimension that a mesh cuts, and one for rows."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """Indices from `start` on, `size` of them, in each dimension. That of a scalar has none."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """All of a tensor of `shape`."""
        return cls(start=(0,) * len(shape), size=tuple(shape))

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def rows(self) -> int:
        """Indices of the first dimension; a scalar is one row."""
        return self.size[0] if self.size else 1

    def between(self, first: int, stop: int) -> Box:
        """Rows [first, stop), counted from the box's own first row."""
        if not self.size or (first, stop) == (0, self.size[0]):
            return self
        return Box(
            start=(self.start[0] + first, *self.start[1:]), size=(stop - first, *self.size[1:])
        )

    def meet(self, other: Box) -> Box | None:
        """What lies in both; None if nothing does."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(
            min(a + n, b + m)
            for a, n, b, m in zip(self.start, self.size, other.start, other.size, strict=True)
        )
        size = tuple(end - begin for begin, end in zip(start, stop, strict=True))
        return Box(start=start, size=size) if min(size, default=1) > 0 else None

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Where this box lies in a tensor that holds `outer`, as an index."""
        return tuple(
            slice(begin - base, begin - base + n)
            for begin, base, n in zip(self.start, outer.start, self.size, strict=True)
        )


def overlap(
    target: torch.Tensor, target_box: Box, source: torch.Tensor, box: Box
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Of `target` (holds `target_box`) and `source` (holds `box`), what both hold; as views."""
    if box == target_box:
        return target, source
    common = target_box.meet(box)
    if common is None:
        return None
    return target[common.within(target_box)], source[common.within(box)]


@torch.no_grad()
def copy_overlap(target: torch.Tensor, target_box: Box, source: torch.Tensor, box: Box) -> None:
    """Copy what both hold from `source` to `target`."""
    common = overlap(target, target_box, source, box)
    if common is not None:
        common[0].copy_(common[1])


def tile(shape: Sequence[int], boxes: Iterable[Box]) -> bool:
    """Whether the boxes hold every index of a tensor of `shape` exactly once.

    Cuts that no box crosses are looked for, dimension by dimension. Meshes and
    row cuts are made of such cuts, a few levels deep; a pinwheel of boxes, which
    nothing here writes, is not found to tile.

    Boxes without an index may lie anywhere inside.
    """
    whole = Box.whole(shape)
    found = list(boxes)
    if not all(_inside(box, whole) for box in found):
        return False
    found = [box for box in found if box.numel > 0]
    if sum(box.numel for box in found) != whole.numel:
        return False
    return not found or _tiles(found, whole, depth=_DEPTH)


def _inside(box: Box, whole: Box) -> bool:
    return len(box.start) == len(whole.size) and all(
        begin >= 0 and n >= 0 and begin + n <= limit
        for begin, n, limit in zip(box.start, box.size, whole.size, strict=True)
    )


def _tiles(boxes: list[Box], whole: Box, *, depth: int) -> bool:
    if len(boxes) <= 1:
        return boxes == [whole]
    if depth == 0:
        return False
    for dim in range(len(whole.size)):
        groups = _split(boxes, dim)
        if len(groups) > 1:
            return _follow(groups, dim, whole) and all(
                _tiles(group, part, depth=depth - 1) for group, part in _parts(groups, dim, whole)
            )
    return False


def _split(boxes: list[Box], dim: int) -> list[list[Box]]:
    """Groups between which a cut across `dim` crosses no box, in order."""
    groups: list[list[Box]] = []
    end = -1
    for box in sorted(boxes, key=lambda b: b.start[dim]):
        if box.start[dim] >= end:
            groups.append([])
        groups[-1].append(box)
        end = max(end, box.start[dim] + box.size[dim])
    return groups


def _span(group: list[Box], dim: int) -> tuple[int, int]:
    return group[0].start[dim], max(box.start[dim] + box.size[dim] for box in group)


def _follow(groups: list[list[Box]], dim: int, whole: Box) -> bool:
    """Whether the groups go from the beginning of `whole` to its end without a gap."""
    spans = [_span(group, dim) for group in groups]
    begin, end = whole.start[dim], whole.start[dim] + whole.size[dim]
    joined = all(a[1] == b[0] for a, b in pairwise(spans))
    return joined and spans[0][0] == begin and spans[-1][1] == end


def _parts(groups: list[list[Box]], dim: int, whole: Box) -> Iterable[tuple[list[Box], Box]]:
    for group in groups:
        begin, end = _span(group, dim)
        start = (*whole.start[:dim], begin, *whole.start[dim + 1 :])
        size = (*whole.size[:dim], end - begin, *whole.size[dim + 1 :])
        yield group, Box(start=start, size=size)
