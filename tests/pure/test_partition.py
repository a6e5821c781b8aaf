"""Who writes which rows: all of them once, about as many on each rank."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_accel_ckpt.errors import UnsupportedStateError
from ray_accel_ckpt.image.dtypes import STORED
from ray_accel_ckpt.image.partition import Slice, TensorSpec, plan_digest, share, spec_of, specs_of
from ray_accel_ckpt.state.part import Scope
from tests.helpers_image import Small, part_of

_specs = st.lists(
    st.builds(
        lambda shape, dtype, scope: (tuple(shape), dtype, scope),
        st.lists(st.integers(0, 12), max_size=3),
        st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.complex128]),
        st.sampled_from([Scope.REPLICATED, Scope.RANK_ZERO, Scope.PER_RANK]),
    ),
    max_size=8,
).map(
    lambda found: [
        (f"part/{i}", torch.empty(shape, dtype=dtype, device="meta"), scope)
        for i, (shape, dtype, scope) in enumerate(found)
    ]
)
_worlds = st.integers(1, 8)
Tensors = list[tuple[str, torch.Tensor, Scope]]


def _specs_on(tensors: Tensors, rank: int, world_size: int) -> list[TensorSpec]:
    return [spec_of(*each, rank, world_size) for each in tensors]


def _shares(tensors: Tensors, world_size: int) -> list[list[Slice]]:
    ranks = range(world_size)
    return [share(_specs_on(tensors, rank, world_size), rank=rank) for rank in ranks]


def _nbytes(slices: list[Slice], scope: Scope) -> int:
    return sum(piece.nbytes for piece in slices if piece.spec.scope is scope)


@given(_specs, _worlds)
def test_every_replicated_row_is_written_once(tensors: Tensors, world_size: int) -> None:
    written = Counter(
        (piece.spec.name, row)
        for slices in _shares(tensors, world_size)
        for piece in slices
        if piece.spec.scope is Scope.REPLICATED
        for row in range(piece.start, piece.stop)
    )
    rows = {
        (spec.name, row)
        for spec in _specs_on(tensors, 0, world_size)
        if spec.scope is Scope.REPLICATED
        for row in range(spec.box.rows)
    }
    assert written == dict.fromkeys(rows, 1)


@given(_specs, _worlds)
def test_all_shares_together_are_the_state_once(tensors: Tensors, world_size: int) -> None:
    total = sum(_nbytes(slices, Scope.REPLICATED) for slices in _shares(tensors, world_size))
    assert total == sum(t.nbytes for _, t, scope in tensors if scope is Scope.REPLICATED)


@given(_specs, _worlds)
def test_the_largest_share_is_within_a_row_of_the_mean(tensors: Tensors, world_size: int) -> None:
    shares = [_nbytes(slices, Scope.REPLICATED) for slices in _shares(tensors, world_size)]
    specs = _specs_on(tensors, 0, world_size)
    row = max((s.row_nbytes for s in specs if s.scope is Scope.REPLICATED), default=0)
    assert max(shares) <= math.ceil(sum(shares) / world_size) + row


@given(_specs, _worlds)
def test_every_tensor_is_somewhere(tensors: Tensors, world_size: int) -> None:
    """Also those without a byte."""
    first, *_ = shares = _shares(tensors, world_size)
    specs = _specs_on(tensors, 0, world_size)
    assert {s.name for s in specs} == {p.spec.name for slices in shares for p in slices}
    assert {s.name for s in specs if s.nbytes == 0} <= {piece.spec.name for piece in first}


@given(_specs, _worlds)
def test_what_is_not_replicated_is_never_cut(tensors: Tensors, world_size: int) -> None:
    for rank, slices in enumerate(_shares(tensors, world_size)):
        whole = [p for p in slices if p.spec.scope is not Scope.REPLICATED]
        assert all((p.start, p.stop) == (0, p.spec.box.rows) for p in whole)
        expected = {Scope.PER_RANK} if rank else {Scope.PER_RANK, Scope.RANK_ZERO}
        wanted = [name for name, _, scope in tensors if scope in expected]
        assert sorted(p.spec.name for p in whole) == sorted(wanted)


def test_a_single_row_larger_than_a_share_is_not_cut() -> None:
    shares = _shares([("a", torch.zeros(1, 100), Scope.REPLICATED)], 4)
    assert [len(slices) for slices in shares] == [0, 0, 0, 1]


def test_specs_come_in_name_order_whatever_the_order_of_registration() -> None:
    names = [spec.name for spec in specs_of(Small(1).captured(), rank=0, world_size=1)]
    assert names == sorted(names)
    assert len(names) == 9


def test_the_plans_digest_tells_models_and_worlds_apart() -> None:
    def digest(value: object, world_size: int = 2, scope: Scope = Scope.REPLICATED) -> str:
        specs = specs_of(part_of(value, scope=scope), rank=0, world_size=world_size)
        return plan_digest(specs, world_size=world_size)

    a = digest({"x": torch.zeros(2, 3)})
    assert a == digest({"x": torch.ones(2, 3)})
    others = [
        digest({"x": torch.zeros(3, 2)}),
        digest({"y": torch.zeros(2, 3)}),
        digest({"x": torch.zeros(2, 3, dtype=torch.float64)}),
        digest({"x": torch.zeros(2, 3)}, world_size=3),
        digest({}),
    ]
    assert len({a, *others}) == 6
    # What each rank has of its own may differ.
    own = digest({"x": torch.zeros(2, 3)}, scope=Scope.PER_RANK)
    assert own == digest({"x": torch.zeros(5)}, scope=Scope.PER_RANK)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"x" * 5000: torch.zeros(1)}, "of this name"),
        ({"\ud800": torch.zeros(1)}, "of this name"),
        ({"x": torch.zeros([1] * 65)}, "65 dimensions"),
    ],
    ids=range(3),
)
def test_what_the_format_cannot_hold_is_refused(value: object, message: str) -> None:
    with pytest.raises(UnsupportedStateError, match=message) as caught:
        specs_of(part_of(value), rank=0, world_size=1)
    assert caught.value.where.strip("'").startswith("part/")
    assert caught.value.remedy


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_every_dtype_of_torch_is_stored_or_refused_by_name() -> None:
    dtypes = {d for d in vars(torch).values() if isinstance(d, torch.dtype)}
    for dtype in dtypes - set(STORED):
        try:
            tensor = torch.empty(2, dtype=dtype)
        except (RuntimeError, NotImplementedError, TypeError):
            continue
        with pytest.raises(UnsupportedStateError):
            specs_of(part_of({"x": tensor}), rank=0, world_size=1)
