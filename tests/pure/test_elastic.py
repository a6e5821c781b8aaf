"""Map-style data on any number of workers: one order an epoch, each sample once in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from ray_accel_ckpt import Checkpointer, errors
from ray_accel_ckpt.state.loader import PreparedLoader
from tests.pure.helpers import Plain, Stream
from tests.pure.loaders import flat, moved_on, prepared, restored

WORKERS = st.integers(1, 8)
BATCHES = st.integers(1, 6)
LIVES = st.lists(st.tuples(WORKERS, st.integers(0, 4)), min_size=1, max_size=4)


def group(
    workers: int, state: Any, make: Any, global_batch_size: int | None = None
) -> list[PreparedLoader]:
    """The loaders of all ranks, gone on with from `state`."""
    loaders = [
        prepared(make(), rank=rank, world_size=workers, global_batch_size=global_batch_size)
        for rank in range(workers)
    ]
    for loader in loaders if state is not None else []:
        loader.apply(state)
    return loaders


def steps(loaders: list[PreparedLoader]) -> Iterator[list[list[int]]]:
    """What each rank is handed at each step, padding left out; all have equally many."""
    for batches in zip(*loaders, strict=True):
        assert all(len(batch) for batch in batches)
        pairs = zip(batches, loaders, strict=True)
        yield [[] if loader.padding else batch.tolist() for batch, loader in pairs]


def gone_through(lives: list[tuple[int, int]], make: Any, whole: int | None = None) -> list[int]:
    """The samples of one epoch, by groups of `workers` that die after so many steps."""
    state, seen = None, []
    for life, (workers, until) in enumerate(lives):
        loaders = group(workers, state, make, whole)
        taken = steps(loaders)
        last = life == len(lives) - 1
        for _, step in zip(range(10**9 if last else until), taken, strict=False):
            seen += [i for batch in step for i in batch]
        if not last:
            state = restored(loaders[0].capture())
            if state["epoch"]:
                break
    return seen


@settings(deadline=None)
@given(st.integers(8, 70), LIVES, BATCHES, st.booleans())
def test_each_sample_comes_once_whoever_goes_on(
    size: int, lives: list[tuple[int, int]], batch_size: int, shuffle: bool
) -> None:
    def make() -> DataLoader[int]:
        return DataLoader(Plain(size), batch_size=batch_size, shuffle=shuffle)

    assert gone_through(lives, make) == flat(prepared(make()))


@settings(deadline=None)
@given(st.integers(8, 70), LIVES, BATCHES)
def test_with_drop_last_what_is_dropped_is_a_tail(
    size: int, lives: list[tuple[int, int]], batch_size: int
) -> None:
    def make(drop_last: bool = True) -> DataLoader[int]:
        return DataLoader(Plain(size), batch_size=batch_size, shuffle=True, drop_last=drop_last)

    seen = gone_through(lives, make)
    order = flat(prepared(make(drop_last=False)))
    assert seen == order[: len(seen)]
    assert size - len(seen) < batch_size * max(workers for workers, _ in lives)


@settings(deadline=None)
@given(st.integers(8, 70), LIVES, st.integers(8, 20), st.booleans())
def test_with_a_global_batch_size_each_sample_comes_once_too(
    size: int, lives: list[tuple[int, int]], whole: int, drop_last: bool
) -> None:
    def make() -> DataLoader[int]:
        return DataLoader(Plain(size), shuffle=True, drop_last=drop_last)

    seen = gone_through(lives, make, whole)
    assert seen == gone_through([(1, 0)], make, whole)
    assert len(seen) == (size - size % whole if drop_last else size)


@settings(deadline=None)
@given(st.integers(8, 70), WORKERS, WORKERS, st.integers(8, 20))
def test_with_a_global_batch_size_the_steps_are_the_same_steps(
    size: int, some: int, others: int, whole: int
) -> None:
    def make() -> DataLoader[int]:
        return DataLoader(Plain(size), shuffle=True)

    one, two = (
        [sorted(i for batch in step for i in batch) for step in steps(group(w, None, make, whole))]
        for w in (some, others)
    )
    assert one == two
    assert len(one) == len(group(some, None, make, whole)[0])


# --- workers without a sample ----------------------------------------------------------


def left_over(caplog: pytest.LogCaptureFixture) -> list[PreparedLoader]:
    """Five workers in an epoch of which two samples are left."""

    def make() -> DataLoader[int]:
        return DataLoader(Plain(10), batch_size=4, shuffle=True)

    before = group(2, None, make)
    taken = steps(before)
    next(taken)
    state = restored(before[0].capture())
    assert state["consumed"] == 8
    caplog.clear()
    return group(5, state, make)


def test_workers_without_a_sample_get_a_copy_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    loaders = left_over(caplog)
    (batches,) = list(zip(*loaders, strict=True))
    assert [loader.padding for loader in loaders] == [False, False, True, True, True]
    first, second, *copies = [batch.tolist() for batch in batches]
    assert first != second
    assert copies == [first] * 3
    assert restored(loaders[4].capture())["epoch"] == 1


def test_the_weights_of_padded_workers_leave_the_mean_to_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loaders = left_over(caplog)
    list(zip(*loaders, strict=True))
    assert [loader.loss_weight for loader in loaders] == [2.5, 2.5, 0.0, 0.0, 0.0]


def test_padding_is_told_once_with_the_numbers(caplog: pytest.LogCaptureFixture) -> None:
    """Here every epoch ends with a batch of one."""

    def make() -> DataLoader[int]:
        return DataLoader(Plain(17))

    loaders = group(3, None, make, 8)
    for _ in range(2):
        assert len(list(steps(loaders))) == 3
    (message,) = caplog.messages
    assert "1 samples are left for 3 workers, so 2 of them" in message


def test_the_position_of_a_padded_step_counts_samples_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loaders = left_over(caplog)
    running = [iter(loader) for loader in loaders]
    for each in running:
        next(each)
    assert {loader.cursor.consumed for loader in loaders} == {10}


# --- the gradient of a global batch ----------------------------------------------------


def regression(size: int) -> TensorDataset:
    """Whole numbers: every sum of them is exact."""
    x = torch.arange(2.0 * size, dtype=torch.float64).reshape(size, 2) - size
    return TensorDataset(x, (x.sum(1, keepdim=True) % 5))


def gradients_of(loaders: list[PreparedLoader]) -> list[torch.Tensor]:
    """At each step, the mean over ranks of the gradients of weighed mean losses."""
    model = nn.Linear(2, 1, dtype=torch.float64)
    nn.init.constant_(model.weight, 3.0)
    nn.init.constant_(model.bias, -1.0)
    found = []
    for batches in zip(*loaders, strict=True):
        total = torch.zeros(1, 2, dtype=torch.float64)
        for (x, y), loader in zip(batches, loaders, strict=True):
            model.zero_grad()
            loss = (model(x) - y).square().mean() * loader.loss_weight
            loss.backward()  # type: ignore[no-untyped-call]
            assert model.weight.grad is not None
            total += model.weight.grad
        found.append(total / len(loaders))
    return found


@pytest.mark.parametrize("workers", range(2, 9))
@pytest.mark.parametrize("size", [16, 17, 18, 20])
def test_the_gradient_is_that_of_the_whole_batch(workers: int, size: int) -> None:
    """Batches of 8 and tails of 1, 2 and 4 divide exactly in binary, so nothing is rounded."""

    def make() -> DataLoader[Any]:
        return DataLoader(regression(size), shuffle=True)

    whole = gradients_of(group(1, None, make, 8))
    shared = gradients_of(group(workers, None, make, 8))
    assert len(whole) == len(shared)
    assert all(torch.equal(a, b) for a, b in zip(whole, shared, strict=True))
    assert not torch.equal(whole[0], whole[1])


def test_the_weights_are_needed_for_it() -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(regression(16), shuffle=True)

    loaders = group(3, None, make, 8)
    next(zip(*loaders, strict=True))
    assert [loader.loss_weight for loader in loaders] == [1.125, 1.125, 0.75]


def test_a_resumed_run_may_change_the_global_batch_size() -> None:
    def make() -> DataLoader[int]:
        return DataLoader(Plain(30), shuffle=True)

    before = group(2, None, make, 8)
    first = next(taken := steps(before))
    after = group(3, restored(before[0].capture()), make, 5)
    rest = [i for step in steps(after) for batch in step for i in batch]
    assert [i for batch in first for i in batch] + rest == flat(prepared(make()))
    taken.close()  # type: ignore[attr-defined]


def test_the_new_global_batch_is_told_of_unless_it_is_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def make() -> DataLoader[int]:
        return DataLoader(Plain(30), batch_size=4)

    state = restored(prepared(make()).capture())
    group(3, state, make, 8)
    assert not caplog.messages
    prepared(make(), rank=1, world_size=3).apply(state)
    assert "a step now takes 12 samples over all workers" in caplog.text


# --- as arguments of a Checkpointer ----------------------------------------------------


class NoSampler:
    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0, 1]])


@pytest.mark.parametrize("size", [0, -8, 2.0, "8", True])
def test_a_size_that_is_none_is_refused(size: Any) -> None:
    with pytest.raises(errors.ConfigurationError, match="takes a number of samples"):
        Checkpointer().prepare(DataLoader(Plain()), global_batch_size=size)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.Linear(2, 2), "no DataLoader"),
        (lambda: DataLoader(Stream()), "iterable dataset"),
        (lambda: DataLoader(Plain(), batch_size=None), "batch_size=None"),
        (lambda: DataLoader(Plain(), batch_sampler=NoSampler()), "made by a NoSampler"),
    ],
)
def test_what_cannot_be_dealt_out_in_global_batches_is_refused(make: Any, why: str) -> None:
    ckpt = Checkpointer()
    with pytest.raises(errors.ConfigurationError, match=why):
        ckpt.prepare(
            DataLoader(Plain()) if why != "no DataLoader" else make(), make(), global_batch_size=8
        )
    assert [part.name for part in ckpt._bundle] == ["progress"]


def test_a_global_batch_smaller_than_the_workers_is_refused() -> None:
    with pytest.raises(errors.ConfigurationError, match="cannot feed 3 workers"):
        prepared(DataLoader(Plain()), world_size=3, global_batch_size=2)


class Once:
    """A loss that notices being touched."""

    def __init__(self) -> None:
        self.backwards = 0

    def backward(self) -> None:
        self.backwards += 1


def test_a_weight_of_one_does_not_touch_the_loss() -> None:
    ckpt, loss = Checkpointer(), Once()
    for _ in ckpt.prepare(DataLoader(Plain(8)), global_batch_size=3):
        ckpt.backward(loss)  # type: ignore[arg-type]
    assert loss.backwards == 3


def weighed(loader: PreparedLoader, weight: float) -> Iterator[Any]:
    """As if the loader's batches were an uneven share."""
    for batch in loader:
        loader.loss_weight = weight
        yield batch


def test_backward_multiplies_the_loss_by_the_weight() -> None:
    ckpt = Checkpointer()
    loader = ckpt.prepare(DataLoader(Plain(2)), global_batch_size=1)
    for _ in weighed(loader, 0.75):
        value = torch.tensor(2.0, requires_grad=True)
        ckpt.backward(value * 4)
        assert ckpt.loss_weight == 0.75
        assert value.grad == 3.0


def test_the_weight_is_that_of_the_batch_in_hand() -> None:
    """An evaluation inside a step does not change what the training batch counts."""
    ckpt = Checkpointer()
    assert ckpt.loss_weight == 1.0
    train, evaluate = ckpt.prepare(DataLoader(Plain(2)), DataLoader(Plain(2)))
    for _ in weighed(train, 0.5):
        for _ in weighed(evaluate, 0.25):
            assert ckpt.loss_weight == 0.25
        assert ckpt.loss_weight == 0.5


@pytest.mark.parametrize("shuffle", [False, True])
def test_torchs_distributed_sampler_is_replaced(shuffle: bool) -> None:
    def make() -> DataLoader[int]:
        sampler = DistributedSampler(Plain(), num_replicas=2, rank=1, shuffle=shuffle)
        return DataLoader(Plain(), batch_size=3, sampler=sampler)

    seen = [i for step in steps(group(2, None, make)) for batch in step for i in batch]
    assert sorted(seen) == list(range(22))


def test_going_on_twice_from_one_position_is_the_same() -> None:
    loader = prepared(DataLoader(Plain(), batch_size=4, shuffle=True))
    next(iter(loader))

    def make() -> DataLoader[int]:
        return DataLoader(Plain(), batch_size=4, shuffle=True)

    assert flat(moved_on(loader, make)) == flat(moved_on(loader, make))


def test_a_global_batch_size_is_refused_for_a_loader_that_is_prepared() -> None:
    """It would be passed over without a word."""
    ckpt = Checkpointer()
    loader = ckpt.prepare(DataLoader(Plain(8)))
    for objects in ((loader,), (loader, DataLoader(Plain(8)))):
        with pytest.raises(errors.ConfigurationError, match="cannot be kept for a PreparedLoader"):
            ckpt.prepare(*objects, global_batch_size=4)
