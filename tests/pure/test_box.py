"""Boxes: where two meet, what is copied, and whether some of them are a whole tensor."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_accel_ckpt.state.box import Box, copy_overlap, tile

_shapes = st.lists(st.integers(1, 6), min_size=1, max_size=3)


@st.composite
def _cut(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and boxes that it was cut into: along a dimension, then each piece again."""
    shape = tuple(draw(_shapes))
    boxes = [Box.whole(shape)]
    for dim in draw(st.lists(st.integers(0, len(shape) - 1), max_size=3)):
        pieces = []
        for box in boxes:
            at = draw(st.integers(0, box.size[dim]))
            for start, size in ((0, at), (at, box.size[dim] - at)):
                begin = (*box.start[:dim], box.start[dim] + start, *box.start[dim + 1 :])
                pieces.append(Box(start=begin, size=(*box.size[:dim], size, *box.size[dim + 1 :])))
        boxes = pieces
    return shape, draw(st.permutations(boxes))


@given(_cut())
def test_what_was_cut_is_whole(cut: tuple[tuple[int, ...], list[Box]]) -> None:
    assert tile(*cut)


@given(_cut(), st.randoms())
def test_one_piece_less_or_twice_is_noticed(cut: tuple[tuple[int, ...], list[Box]], random) -> None:  # type: ignore[no-untyped-def]
    shape, boxes = cut
    chosen = random.choice([box for box in boxes if box.numel])
    assert not tile(shape, [box for box in boxes if box is not chosen])
    assert not tile(shape, [*boxes, chosen])


@given(_shapes, st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=9))
def test_tiling_is_holding_every_index_once(
    shape: list[int], ranges: list[tuple[int, int]]
) -> None:
    """Against counting. What is found to tile does; what does is found, if cuts go through."""
    dims = len(shape)
    boxes = [
        Box(start=tuple(b for b, _ in each), size=tuple(n for _, n in each))
        for each in (ranges[i : i + dims] for i in range(0, len(ranges) - dims + 1, dims))
    ]
    count = torch.zeros([12] * dims, dtype=torch.int64)
    for box in boxes:
        count[box.within(Box.whole(count.shape))] += 1
    inside = count[Box.whole(shape).within(Box.whole(count.shape))]
    within = all(
        b + n <= limit
        for box in boxes
        for b, n, limit in zip(box.start, box.size, shape, strict=True)
    )
    once = within and bool((inside == 1).all())
    # Up to five boxes cannot be a pinwheel but for the one of test_a_pinwheel.
    assert tile(shape, boxes) == once


def test_a_pinwheel_is_not_taken() -> None:
    """It holds every index once; nothing here writes such, and looking for it would be slow."""
    parts = [
        ((0, 0), (1, 2)),
        ((0, 2), (2, 1)),
        ((2, 1), (1, 2)),
        ((1, 0), (2, 1)),
        ((1, 1), (1, 1)),
    ]
    boxes = [Box(start=start, size=size) for start, size in parts]
    assert sum(box.numel for box in boxes) == 9
    assert not tile((3, 3), boxes)


def test_many_boxes_are_judged_at_once() -> None:
    """A forged manifest may hold a million: neither a staircase nor copies may take for ever."""
    n = 100_000
    line = [Box(start=(i,), size=(1,)) for i in range(n)]
    assert tile((n,), line)
    assert not tile((n,), [*line[1:], line[1]])
    stairs = [Box(start=(i, i), size=(1, n - i)) for i in range(n)]
    assert not tile((n, n), stairs)
    assert not tile((n, n), [Box.whole((n, n))] * n)


def test_a_scalar_and_what_has_no_index() -> None:
    assert tile((), [Box.whole(())])
    assert not tile((), [])
    assert not tile((), [Box.whole(())] * 2)
    assert tile((0, 3), [])
    assert tile((0, 3), [Box.whole((0, 3))] * 2)
    assert tile((2, 3), [Box.whole((2, 3)), Box(start=(2, 0), size=(0, 3))])
    assert not tile((2, 3), [Box.whole((2, 3)), Box(start=(3, 0), size=(0, 3))])


_boxes = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=2).map(
    lambda ranges: Box(start=tuple(b for b, _ in ranges), size=tuple(n for _, n in ranges))
)


@given(_boxes, _boxes)
def test_what_two_hold_is_copied_and_nothing_else(a: Box, b: Box) -> None:
    whole = Box.whole((10, 10))
    expected = torch.zeros(10, 10)
    expected[b.within(whole)] = torch.arange(100.0).reshape(10, 10)[b.within(whole)] + 1
    target = torch.zeros(a.size)
    copy_overlap(target, a, (torch.arange(100.0).reshape(10, 10) + 1)[b.within(whole)], b)
    assert torch.equal(target, expected[a.within(whole)])


def test_a_scalar_is_copied() -> None:
    target = torch.zeros(())
    copy_overlap(target, Box.whole(()), torch.tensor(3.0), Box.whole(()))
    assert torch.equal(target, torch.tensor(3.0))
