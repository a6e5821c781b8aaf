"""Iterables of batches that start anew each time: entered by rows, which are compared."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_accel_ckpt.errors import ConfigurationError, ElasticDataError
from ray_accel_ckpt.state.loader import PreparedLoader
from ray_accel_ckpt.state.part import Differences, SavedPart
from ray_accel_ckpt.state.rows import Rows
from ray_accel_ckpt.state.tree import unflatten

ROWS = 23


class Batches:
    """As what `iter_torch_batches` returns: each `iter()` is a pass over all rows."""

    def __init__(self, batch_size: int, order: torch.Tensor | None = None) -> None:
        self.order = torch.arange(ROWS) if order is None else order
        self.batch_size = batch_size
        self.read = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, len(self.order), self.batch_size):
            self.read += 1
            rows = self.order[start : start + self.batch_size]
            yield {"id": rows, "x": rows.double().reshape(-1, 1) / 3 + torch.rand(())}


def _prepared(batches: Any, world_size: int = 2) -> PreparedLoader:
    return PreparedLoader(
        batches, name="loader", seed=1, rank=0, world_size=world_size, device=torch.device("cpu")
    )


def _saved(loader: PreparedLoader) -> SavedPart:
    captured = loader.capture()
    return SavedPart(kind=captured.kind, value=captured.value, tensors={})


def _resumed(saved: SavedPart, batches: Any, world_size: int = 2) -> PreparedLoader:
    loader = _prepared(batches, world_size)
    differences = Differences()
    loader.compare(saved, differences)
    assert not differences
    state = unflatten(saved.value, {})
    loader.check(state)
    loader.apply(state)
    return loader


def _after(batches: Any, taken: int) -> SavedPart:
    loader = _prepared(batches)
    inner = iter(loader)
    for _ in range(taken):
        next(inner)
    return _saved(loader)


def _rows(batches: list[dict[str, torch.Tensor]]) -> list[tuple[int, float]]:
    return [
        (int(i), float(x)) for b in batches for i, x in zip(b["id"], b["x"].flatten(), strict=True)
    ]


@pytest.mark.parametrize("taken", range(6))
def test_a_pass_goes_on_at_its_row(taken: int) -> None:
    """Its random draws too: they are the pass's own."""
    torch.manual_seed(0)
    whole = list(_prepared(Batches(5)))
    loader = _prepared(Batches(5))
    inner = iter(loader)
    for _ in range(taken):
        next(inner)
    saved = _saved(loader)
    torch.manual_seed(99)
    rest = list(_resumed(saved, Batches(5)))
    assert _rows(rest) == _rows(whole[taken:])


def test_the_next_pass_is_whole_and_not_compared() -> None:
    loader = _resumed(_after(Batches(5), 2), Batches(5))
    assert sum(len(b["id"]) for b in loader) == ROWS - 10
    assert sum(len(b["id"]) for b in loader) == ROWS


def test_saved_again_before_it_has_gone_on() -> None:
    saved = _after(Batches(5), 2)
    assert _saved(_resumed(saved, Batches(5))) == saved


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 100])
def test_other_batches_go_on_at_the_same_row(batch_size: int) -> None:
    plain = [{"id": torch.arange(i, i + 5)} for i in range(0, 20, 5)]
    other = [{"id": torch.arange(20)[i : i + batch_size]} for i in range(0, 20, batch_size)]
    loader = _resumed(_after(plain, 2), other)
    assert [int(i) for b in loader for i in b["id"]] == list(range(10, 20))


@pytest.mark.parametrize("rows", [[1, 0, *range(2, 23)], [*range(9), 22, *range(9, 22)]])
def test_another_order_is_not_gone_on_with(rows: list[int]) -> None:
    loader = _resumed(_after(Batches(5), 2), Batches(5, torch.tensor(rows)))
    with pytest.raises(ElasticDataError, match="are not those") as caught:
        next(iter(loader))
    assert "preserve_order" in caught.value.remedy


def test_less_data_is_not_gone_on_with() -> None:
    loader = _resumed(_after(Batches(5), 3), Batches(5, torch.arange(11)))
    with pytest.raises(ElasticDataError, match="has 11 rows, and 15"):
        next(iter(loader))


def test_another_number_of_workers_begins_between_passes_only() -> None:
    loader = _prepared(Batches(5), world_size=3)
    with pytest.raises(ElasticDataError, match="with 3 workers") as caught:
        loader.dealt_anew([_after(Batches(5), 2).value] * 2)
    assert "map-style" in caught.value.remedy
    between = _prepared(Batches(5))
    list(between)
    dealt = loader.dealt_anew([_saved(between).value] * 2)
    loader.apply(unflatten(dealt.value, {}))
    assert loader.cursor.epoch == 1
    assert sum(len(b["id"]) for b in loader) == ROWS


def test_skipping_batches_counts_batches() -> None:
    loader = _prepared(Batches(5))
    assert [len(b["id"]) for b in loader.skipped(3)] == [5, 3]


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ({"a": torch.zeros(2), "b": torch.zeros(3)}, r"\[2, 3\]"),
        ({"a": torch.zeros(())}, r"\[-1\]"),
        ({"a": torch.zeros(2), "name": "x"}, "a str"),
        ([[1, 2]], "a int"),
    ],
)
def test_rows_that_cannot_be_counted(batch: Any, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        next(iter(_prepared([batch])))


@pytest.mark.parametrize(
    "change",
    [{"rows": -1}, {"rows": None}, {"checksum": 2**63}, {"checksum": "0"}, {"rows": 1.0}],
    ids=repr,
)
def test_a_state_that_is_none_is_refused(change: dict[str, Any]) -> None:
    loader = _prepared(Batches(5))
    state = unflatten(_after(Batches(5), 2).value, {})
    assert loader._source.understands(state)
    assert not loader._source.understands({**state, **change})


def test_a_data_loader_is_another_thing() -> None:
    dataset = torch.utils.data.TensorDataset(torch.arange(ROWS))
    indexed = _prepared(torch.utils.data.DataLoader(dataset))
    rows = _prepared(Batches(5))
    for one, other in ((indexed, rows), (rows, indexed)):
        differences = Differences()
        one.compare(_saved(other), differences)
        assert differences.differing


_dtypes = st.sampled_from([torch.uint8, torch.int64, torch.bfloat16, torch.float64, torch.bool])


@given(st.lists(st.integers(0, 12), max_size=5), _dtypes, st.integers(0, 5))
def test_cuts_do_not_move_the_checksum(cuts: list[int], dtype: torch.dtype, width: int) -> None:
    values = torch.arange(12 * width).reshape(12, width).to(dtype)
    whole, cut = Rows(), Rows()
    whole.add((values, values[:, :1]))
    places = [0, *sorted(cuts), 12]
    for start, stop in itertools.pairwise(places):
        cut.add((values[start:stop], values[start:stop, :1]))
    assert (whole.count, whole.checksum()) == (cut.count, cut.checksum())


@given(st.permutations(range(9)), st.booleans())
def test_another_order_has_another_checksum(order: list[int], flipped: bool) -> None:
    values = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    other = values[order].flip(1) if flipped else values[order]
    one, two = Rows(), Rows()
    one.add({"x": values})
    two.add({"x": other})
    assert (one.checksum() == two.checksum()) == torch.equal(values, other)
