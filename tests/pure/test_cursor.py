"""One order an epoch, dealt out from the front, by any number of workers."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import Sampler

from ray_accel_ckpt.errors import ConfigurationError, ElasticDataError
from ray_accel_ckpt.state.cursor import Cursor, Dealer, FromSampler, Sequential, Shuffled
from tests.pure.helpers import seed_everything, streams

SIZES = st.integers(1, 120)
WORKERS = st.integers(1, 9)
BATCHES = st.integers(1, 12)


def dealers(workers: int, batch_size: int, drop_last: bool) -> list[Dealer]:
    return [
        Dealer(rank=rank, world_size=workers, batch_size=batch_size, drop_last=drop_last)
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


def test_less_than_a_sample_a_worker_is_refused_when_it_comes_to_that() -> None:
    with pytest.raises(ElasticDataError, match="2 samples are left for 3 workers"):
        steps(10, dealers(3, 2, False), start=8)


def test_less_than_a_sample_a_worker_is_dropped_with_drop_last() -> None:
    assert steps(10, dealers(3, 2, True), start=8) == []


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_has_at_least_one_sample(batch_size: int) -> None:
    with pytest.raises(ConfigurationError):
        dealers(1, batch_size, False)


# --- orders ----------------------------------------------------------------------------


@given(SIZES, st.integers(0, 2**64 - 1), st.integers(0, 5))
def test_an_order_holds_each_sample_once(size: int, seed: int, epoch: int) -> None:
    assert sorted(Shuffled(size).draw(seed, epoch).tolist()) == list(range(size))
    assert list(Sequential(size).draw(seed, epoch)) == list(range(size))


def test_an_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    orders = [Shuffled(50).draw(seed, epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert not any(torch.equal(orders[0], other) for other in orders[1:])
    torch.manual_seed(99)
    assert torch.equal(Shuffled(50).draw(1, 0), orders[0])


class Drawing(Sampler[int]):
    """Draws from each source there is, and one of its own."""

    def __init__(self, *, generator: torch.Generator | None = None) -> None:
        self.generator = generator
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 30

    def __iter__(self) -> Iterator[int]:
        order = list(range(30))
        random.shuffle(order)
        np.random.shuffle(order)
        own = torch.randperm(30, generator=self.generator)
        return iter([order[i] + 100 * self.epoch for i in own])


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_a_sampler_is_listed_the_same_everywhere(generator: torch.Generator | None) -> None:
    listed = FromSampler(Drawing(generator=generator)).draw(1, 2)
    seed_everything(77)
    before = streams()
    assert FromSampler(Drawing(generator=generator)).draw(1, 2) == listed
    assert streams() == before
    assert FromSampler(Drawing(generator=generator)).draw(1, 3) != listed


def test_a_sampler_is_told_the_epoch() -> None:
    assert min(FromSampler(Drawing()).draw(1, 4)) == 400


# --- the position ----------------------------------------------------------------------


def saved(cursor: Cursor, *, replay: bool = False) -> Cursor:
    """As another process has it after loading."""
    loaded = Cursor(seed=0)
    loaded.load(cursor.state(replay=replay))
    return loaded


def test_passes_are_counted() -> None:
    cursor = Cursor(seed=1)
    cursor.begin()
    assert cursor.epoch == 0
    cursor.ended = True
    cursor.begin()
    assert (cursor.epoch, cursor.consumed) == (1, 0)


def test_a_pass_under_way_is_gone_on_with() -> None:
    cursor = Cursor(seed=1)
    cursor.begin()
    cursor.consumed = 12
    loaded = saved(cursor)
    loaded.begin()
    assert (loaded.seed, loaded.epoch, loaded.consumed) == (1, 0, 12)
    loaded.begin()
    assert (loaded.epoch, loaded.consumed) == (1, 0)


def test_an_ended_pass_is_followed_by_the_next() -> None:
    cursor = Cursor(seed=1)
    cursor.begin()
    cursor.consumed, cursor.ended = 22, True
    loaded = saved(cursor)
    loaded.begin()
    assert (loaded.epoch, loaded.consumed, loaded.spent) == (1, 0, False)


def test_an_ended_pass_of_an_epoch_entered_again_is_empty() -> None:
    cursor = Cursor(seed=1)
    cursor.begin()
    cursor.consumed, cursor.ended = 22, True
    loaded = saved(saved(cursor, replay=True))
    loaded.begin()
    assert (loaded.epoch, loaded.spent) == (0, True)


def test_a_loader_not_used_yet_stays_so() -> None:
    loaded = saved(Cursor(seed=1))
    loaded.begin()
    assert (loaded.epoch, loaded.consumed) == (0, 0)
