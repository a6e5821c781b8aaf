"""One order an epoch, dealt out from the front, by any number of workers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from ray_accel_ckpt import Checkpointer
from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.state.dealing import Dealer, GlobalDealer
from tests.pure.loaders import prepared

SIZES = st.integers(1, 120)
WORKERS = st.integers(1, 9)
BATCHES = st.integers(1, 12)


def dealers(workers: int, batch_size: int, drop_last: bool) -> list[Dealer]:
    return [
        Dealer(rank=rank, world_size=workers, whole=batch_size * workers, drop_last=drop_last)
        for rank in range(workers)
    ]


def steps(n: int, all_ranks: list[Dealer], start: int = 0) -> list[list[list[int]]]:
    """For each step, what each rank is handed of the order 0, 1, 2, ..."""
    return [
        [list(range(*dealer.mine(*cut))) for dealer in all_ranks]
        for cut in all_ranks[0].cuts(n, start)
    ]


def joined(all_steps: list[list[list[int]]]) -> list[int]:
    return [sample for step in all_steps for batch in step for sample in batch]


@given(SIZES, WORKERS, BATCHES)
def test_each_sample_comes_once_an_epoch(n: int, workers: int, batch_size: int) -> None:
    assume(n >= workers)
    assert joined(steps(n, dealers(workers, batch_size, False))) == list(range(n))


@given(SIZES, WORKERS, BATCHES)
def test_drop_last_drops_less_than_a_global_batch(n: int, workers: int, batch_size: int) -> None:
    whole = workers * batch_size
    dealt = steps(n, dealers(workers, batch_size, True))
    assert joined(dealt) == list(range(n - n % whole))
    assert all(len(batch) == batch_size for step in dealt for batch in step)


@given(SIZES, WORKERS, BATCHES, st.booleans())
def test_after_any_step_a_prefix_is_consumed(
    n: int, workers: int, batch_size: int, drop_last: bool
) -> None:
    assume(n >= workers)
    ranks = dealers(workers, batch_size, drop_last)
    dealt = steps(n, ranks)
    for k, (_, end) in enumerate(ranks[0].cuts(n), start=1):
        assert joined(dealt[:k]) == list(range(end))


@given(SIZES, WORKERS, BATCHES, st.booleans())
def test_batches_of_one_step_differ_by_at_most_one_and_none_is_empty(
    n: int, workers: int, batch_size: int, drop_last: bool
) -> None:
    assume(n >= workers)
    for step in steps(n, dealers(workers, batch_size, drop_last)):
        sizes = [len(batch) for batch in step]
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1


@given(SIZES, WORKERS, BATCHES, st.booleans())
def test_length_is_the_number_of_steps(
    n: int, workers: int, batch_size: int, drop_last: bool
) -> None:
    assume(n >= workers)
    ranks = dealers(workers, batch_size, drop_last)
    assert {dealer.length(n) for dealer in ranks} == {len(steps(n, ranks))}


@given(SIZES, WORKERS, WORKERS, BATCHES, st.data())
def test_another_number_of_workers_goes_on_with_the_same_order(
    n: int, before: int, after: int, batch_size: int, data: st.DataObject
) -> None:
    assume(n >= before)
    first = dealers(before, batch_size, False)
    ends = [0, *(end for _, end in first[0].cuts(n))]
    k = data.draw(st.integers(0, len(ends) - 1))
    assume(ends[k] == n or n - ends[k] >= after)
    rest = steps(n, dealers(after, batch_size, False), start=ends[k])
    assert joined(steps(n, first)[:k]) + joined(rest) == list(range(n))


def test_a_tail_too_small_for_all_joins_the_batch_before() -> None:
    (last,) = steps(9, dealers(4, 2, False))
    assert [len(batch) for batch in last] == [3, 2, 2, 2]


def test_workers_without_a_sample_are_handed_a_copy_that_does_not_count() -> None:
    ranks = dealers(5, 2, False)
    assert steps(12, ranks, start=10) == [[[10], [11], [10], [10], [10]]]
    assert [dealer.padded(10, 12) for dealer in ranks] == [False, False, True, True, True]
    assert [dealer.weight(10, 12) for dealer in ranks] == [2.5, 2.5, 0.0, 0.0, 0.0]


def test_less_than_a_sample_a_worker_is_dropped_with_drop_last() -> None:
    assert steps(10, dealers(3, 2, True), start=8) == []


@given(SIZES, WORKERS, BATCHES)
def test_workers_with_samples_all_count_the_same(n: int, workers: int, batch_size: int) -> None:
    assume(n >= workers)
    ranks = dealers(workers, batch_size, False)
    assert all(dealer.weight(*cut) == 1.0 for dealer in ranks for cut in ranks[0].cuts(n))


# --- a batch of the same size for any number of workers ---------------------------------


def global_dealers(workers: int, whole: int, drop_last: bool = False) -> list[Dealer]:
    return [
        GlobalDealer(rank=rank, world_size=workers, whole=whole, drop_last=drop_last)
        for rank in range(workers)
    ]


@given(SIZES, WORKERS, WORKERS, BATCHES, st.booleans())
def test_a_global_batch_does_not_depend_on_the_number_of_workers(
    n: int, workers: int, others: int, whole: int, drop_last: bool
) -> None:
    assume(whole >= max(workers, others))
    some, more = (global_dealers(w, whole, drop_last) for w in (workers, others))
    assert list(some[0].cuts(n)) == list(more[-1].cuts(n))
    assert some[0].length(n) == more[-1].length(n) == len(list(some[0].cuts(n)))


@given(SIZES, WORKERS, BATCHES)
def test_weights_make_every_sample_count_the_same(n: int, workers: int, whole: int) -> None:
    """Rank's mean x weight / ranks is the sum of its samples / all samples, to a rounding."""
    assume(whole >= workers)
    ranks = global_dealers(workers, whole)
    for begin, end in ranks[0].cuts(n):
        for dealer in ranks:
            first, last = dealer.mine(begin, end)
            own = 0 if dealer.padded(begin, end) else last - first
            assert dealer.weight(begin, end) == workers * own / (end - begin)


def test_an_even_share_weighs_exactly_one() -> None:
    assert [dealer.weight(0, 6) for dealer in global_dealers(3, 6)] == [1.0, 1.0, 1.0]


def test_a_global_batch_smaller_than_the_workers_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="2 samples cannot feed 3 workers"):
        global_dealers(3, 2)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_has_at_least_one_sample(batch_size: int) -> None:
    with pytest.raises(ConfigurationError):
        dealers(1, batch_size, False)


class Mesh:
    """One dimension of a device mesh, as seen from one rank."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def size(self) -> int:
        return 2

    def get_local_rank(self) -> int:
        return self._rank


def test_ranks_of_a_tensor_parallel_group_get_the_same() -> None:
    """Dealt out over ``mesh["dp"]`` of two, whatever the number of workers."""
    served = []
    for dp_rank in (0, 0, 1, 1):
        ckpt = Checkpointer(seed=5)
        loader = ckpt.prepare(
            DataLoader(range(20), shuffle=True),  # type: ignore[arg-type]
            global_batch_size=6,
            data_mesh=Mesh(dp_rank),  # type: ignore[arg-type]
        )
        served.append([batch.tolist() for batch in loader])
    assert served[0] == served[1]
    assert served[2] == served[3]
    both = [a + b for a, b in zip(served[0], served[2], strict=True)]
    assert sorted(i for batch in both for i in batch) == list(range(20))
    assert [len(batch) for batch in both] == [6, 6, 6, 2]


def test_a_stream_has_no_data_mesh() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    with pytest.raises(ConfigurationError, match="for map-style data"):
        Checkpointer().prepare(DataLoader(Stream()), data_mesh=Mesh(0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("units", "world_size"), [(n, w) for w in (1, 2, 3, 4) for n in range(w, 14)]
)
def test_units_that_cannot_be_joined_are_all_served(units: int, world_size: int) -> None:
    """A tail smaller than the workers is a step of its own, padded, and counts right."""
    for options in ({"batch_size": None}, {"batch_sampler": [[i] for i in range(units)]}):
        loaders = [
            prepared(DataLoader(range(units), **options), rank=rank, world_size=world_size)  # type: ignore[arg-type]
            for rank in range(world_size)
        ]
        steps = [
            [(batch, loader.padding, loader.loss_weight) for batch in loader] for loader in loaders
        ]
        assert len({len(each) for each in steps}) == 1
        served = [
            int(batch)
            for step in zip(*steps, strict=True)
            for batch, padding, _ in step
            if not padding
        ]
        assert served == list(range(units))
        for step in zip(*steps, strict=True):
            counted = sum(not padding for _, padding, _ in step)
            expected = [0.0 if padding else world_size / counted for _, padding, _ in step]
            assert [weight for *_, weight in step] == expected
