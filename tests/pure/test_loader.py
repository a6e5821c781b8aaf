"""The prepared loader: the same batches, from anywhere, without touching anybody's streams."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)
from transformers import BatchEncoding

from ray_accel_ckpt import Checkpointer, errors
from ray_accel_ckpt.state.loader import PreparedLoader
from ray_accel_ckpt.state.part import Differences
from ray_accel_ckpt.state.tree import unflatten
from tests.pure.helpers import (
    Noisy,
    Plain,
    ShuffledStream,
    Stream,
    as_saved,
    digest,
    seed_everything,
    streams,
)
from tests.pure.loaders import Make, broken_off, flat, interrupted, moved_on, passes, prepared

# --- any kind of loader, resumed anywhere ----------------------------------------------


class Backwards(Sampler[int]):
    """A user's own sampler, which draws."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.size))
        random.shuffle(order)
        return iter(order[::-1])


class Buckets(Sampler[list[int]]):
    """A user's own batch sampler: batches of many sizes, in random order."""

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[list[int]]:
        batches = [list(range(n * (n + 1) // 2, (n + 1) * (n + 2) // 2)) for n in range(6)]
        return iter([batches[i] for i in np.random.permutation(6)])


class Noted(Noisy):
    """Reads a whole batch at once, and draws for it."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        noise = torch.rand(len(indices))
        return [(self[i][0] + n, i) for i, n in zip(indices, noise, strict=True)]


def mixed_up(samples: list[Any]) -> Any:
    """A collate function that draws, as mixup does."""
    x, y = default_collate(samples)
    return x * torch.rand(1) + x.flip(0) * random.random(), y[torch.randperm(len(y))]


LOADERS: dict[str, Make] = {
    "sequential": lambda: DataLoader(Noisy(), batch_size=4),
    "shuffle": lambda: DataLoader(Noisy(), batch_size=4, shuffle=True),
    "drop_last": lambda: DataLoader(Noisy(), batch_size=4, shuffle=True, drop_last=True),
    "sampler": lambda: DataLoader(Noisy(), batch_size=4, sampler=Backwards(22)),
    "batch_sampler": lambda: DataLoader(Noisy(), batch_sampler=Buckets()),
    "weighted": lambda: DataLoader(
        Noisy(), batch_size=4, sampler=WeightedRandomSampler([1.0, 5.0] * 11, 22)
    ),
    "replacement": lambda: DataLoader(
        Noisy(), batch_size=4, sampler=RandomSampler(range(22), replacement=True, num_samples=22)
    ),
    "generator": lambda: DataLoader(
        Noisy(), batch_size=4, sampler=RandomSampler(range(22), generator=torch.Generator())
    ),
    "distributed": lambda: DataLoader(
        Noisy(), batch_size=4, sampler=DistributedSampler(Noisy(), num_replicas=1, rank=0)
    ),
    "no_batches": lambda: DataLoader(Noisy(6), batch_size=None, shuffle=True),
    "collate": lambda: DataLoader(Noisy(), batch_size=4, shuffle=True, collate_fn=mixed_up),
    "getitems": lambda: DataLoader(Noted(), batch_size=4, shuffle=True),
    "iterable": lambda: DataLoader(ShuffledStream(), batch_size=4),
}


@pytest.mark.parametrize("batches", [0, 1, 5, 6])
@pytest.mark.parametrize("kind", LOADERS)
def test_resumed_anywhere_the_batches_are_the_same(kind: str, batches: int) -> None:
    """At the first batch, in the middle, before and after the last one of the second pass."""
    make = LOADERS[kind]
    seed_everything(0)
    whole = passes(prepared(make()), 3)
    if batches > len(whole[1]):
        batches = len(whole[1])
    if batches == 0:
        # Nothing of the pass has been handed out: the position is still before it.
        loader = prepared(make())
        passes(loader, 1)
        assert passes(moved_on(loader, make), 2) == whole[1:]
        return
    assert interrupted(make, epoch=1, batches=batches, then=2) == whole


@pytest.mark.parametrize("kind", LOADERS)
def test_each_pass_has_its_own_order_and_noise(kind: str) -> None:
    first, second = passes(prepared(LOADERS[kind]()), 2)
    assert len(first) == len(second)
    assert first != second


@pytest.mark.parametrize("kind", LOADERS)
def test_iterating_leaves_the_global_streams_alone(kind: str) -> None:
    seed_everything(5)
    before = streams()
    loader = prepared(LOADERS[kind]())
    len(loader)
    passes(loader, 2)
    assert streams() == before


@pytest.mark.parametrize("kind", LOADERS)
def test_length_is_the_number_of_batches(kind: str) -> None:
    loader = prepared(LOADERS[kind]())
    assert len(loader) == len(list(loader))


def test_making_an_iterator_does_not_draw_the_base_seed() -> None:
    """`iter(DataLoader)` draws `_base_seed` from the global stream: one draw a restart too many."""
    seed_everything(5)
    expected = torch.rand(1)
    seed_everything(5)
    next(iter(prepared(DataLoader(Plain(), batch_size=4, shuffle=True))))
    assert torch.equal(torch.rand(1), expected)


def test_a_collate_function_draws_anew_for_each_batch() -> None:
    loader = prepared(DataLoader(Plain(), batch_size=4, collate_fn=lambda _: random.random()))
    drawn = [*loader, *loader]
    assert len(set(drawn)) == len(drawn)


def test_random_draws_between_batches_do_not_change_them() -> None:
    """The loader's seed decides, not how often the loop itself draws."""
    whole = passes(prepared(LOADERS["shuffle"]()), 1)
    loader = prepared(LOADERS["shuffle"]())
    assert [[(digest(batch), torch.rand(3))[0] for batch in loader]] == whole


def test_nothing_that_is_skipped_is_read() -> None:
    data = Plain()
    loader = prepared(DataLoader(Plain(), batch_size=4))
    running = iter(loader)
    for _ in range(3):
        next(running)
    flat(moved_on(loader, lambda: DataLoader(data, batch_size=4)))
    assert data.asked == list(range(12, 22))


# --- loader workers --------------------------------------------------------------------


@pytest.mark.parametrize("persistent", [False, True])
def test_loader_workers_produce_the_same_samples(persistent: bool) -> None:
    def make(workers: int) -> DataLoader[Any]:
        return DataLoader(
            Noisy(),
            batch_size=4,
            shuffle=True,
            collate_fn=mixed_up,
            num_workers=workers,
            persistent_workers=persistent and workers > 0,
        )

    whole = passes(prepared(make(0)), 2)
    assert passes(prepared(make(2)), 2) == whole


def test_persistent_workers_go_on_after_loading() -> None:
    """They hold a copy of the dataset with the seed of before, so loading must replace them."""

    def make() -> DataLoader[Any]:
        return DataLoader(Noisy(), batch_size=6, num_workers=1, persistent_workers=True)

    whole = passes(prepared(make()), 2)
    loader = prepared(make())
    next(iter(loader))
    used = prepared(make(), seed=8)
    next(iter(used))
    state = {**unflatten(loader.capture().value, {}), "epoch": 0, "consumed": 6, "started": True}
    used.apply({**state, "spent": False})
    first, second = passes(used, 2)
    assert (first, second) == (whole[0][1:], whole[1])


# --- several ranks ---------------------------------------------------------------------


def test_ranks_share_one_order() -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(Plain(), batch_size=3, shuffle=True)

    loaders = [prepared(make(), rank=rank, world_size=2) for rank in range(2)]
    assert [len(loader) for loader in loaders] == [4, 4]
    assert sorted(flat(loaders[0]) + flat(loaders[1])) == list(range(22))


def test_another_number_of_ranks_goes_on_in_the_same_order() -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(Plain(), batch_size=3, shuffle=True)

    order = flat(prepared(make()))
    two = [iter(prepared(make(), rank=rank, world_size=2)) for rank in range(2)]
    first = [int(i) for running in two for i in next(running)]
    loader = prepared(make(), world_size=2)
    next(iter_kept := iter(loader))
    three = [moved_on(loader, make, rank=rank, world_size=3) for rank in range(3)]
    steps = zip(*three, strict=True)
    rest = [int(i) for step in steps for batch in step for i in batch]
    assert first + rest == order
    iter_kept.close()  # type: ignore[attr-defined]


def test_a_batch_sampler_deals_whole_batches_to_ranks() -> None:
    loaders = [prepared(LOADERS["batch_sampler"](), rank=r, world_size=2) for r in range(2)]
    assert [len(list(loader)) for loader in loaders] == [3, 3]


def test_fewer_samples_than_ranks_are_refused() -> None:
    with pytest.raises(errors.ConfigurationError, match="2 samples cannot feed 3 workers"):
        prepared(DataLoader(Plain(2)), world_size=3)


@pytest.mark.parametrize("data", [Plain, Stream])
def test_loader_workers_that_do_not_keep_the_order_are_refused(data: Any) -> None:
    with pytest.raises(errors.ConfigurationError, match="in_order=False"):
        prepared(DataLoader(data(), batch_size=2, num_workers=2, in_order=False))
    assert len(list(prepared(DataLoader(data(), batch_size=2, in_order=False)))) == 11


class Resumable(Stream):
    """Knows where it stands."""

    def state_dict(self) -> dict[str, int]:
        return {"read": self.read}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.read = state["read"]


class Doubling(DataLoader[Any]):
    def __iter__(self) -> Any:
        return (batch * 2 for batch in super().__iter__())


def test_a_loader_that_makes_its_batches_itself_is_refused() -> None:
    with pytest.raises(errors.ConfigurationError, match="a Doubling with an __iter__ of its own"):
        prepared(Doubling(Plain(), batch_size=4))


@pytest.mark.parametrize("data", [Stream, Resumable])
def test_a_loader_that_makes_its_batches_itself_is_read_again_if_it_is_a_stream(data: Any) -> None:
    def make() -> DataLoader[Any]:
        return Doubling(data(), batch_size=4)

    loader = prepared(make())
    kept = iter(loader)
    assert next(kept).tolist() == [0, 2, 4, 6]
    assert flat(moved_on(loader, make)) == list(range(8, 44, 2))


class OneByOne(Plain):
    __getitems__ = None


def test_data_that_takes_back_getting_several_samples_at_once() -> None:
    assert flat(prepared(DataLoader(OneByOne(), batch_size=4))) == list(range(22))


class OpenedInWorker(Dataset[int]):
    """Data whose files each loader worker opens for itself."""

    path, opened = 100, -1

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        info: Any = get_worker_info()
        return index + info.dataset.opened


def open_it(worker: int) -> None:
    info: Any = get_worker_info()
    info.dataset.opened = info.dataset.path


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_loader_worker_knows_the_dataset_it_has(context: str) -> None:
    loader = prepared(
        DataLoader(
            OpenedInWorker(),
            batch_size=4,
            num_workers=1,
            worker_init_fn=open_it,
            multiprocessing_context=context,
        )
    )
    assert flat(loader) == list(range(100, 108))


@pytest.mark.parametrize("loader_workers", [0, 1])
@pytest.mark.parametrize("data", [Plain, Stream])
def test_a_pass_is_not_gone_on_with_after_another_has_begun(data: Any, loader_workers: int) -> None:
    loader = prepared(DataLoader(data(), batch_size=4, num_workers=loader_workers))
    outer = iter(loader)
    first = next(outer)
    assert next(iter(loader)).tolist() == first.tolist()
    with pytest.raises(errors.ConfigurationError, match="after another has begun"):
        next(outer)
    with pytest.raises(errors.ConfigurationError, match="after another has begun"):
        next(zip(loader, loader, strict=True))
    assert flat(loader) == list(range(22))


# --- passes ----------------------------------------------------------------------------


def test_an_abandoned_pass_is_over() -> None:
    whole = passes(prepared(LOADERS["shuffle"]()), 2)
    loader = prepared(LOADERS["shuffle"]())
    for _ in loader:
        break
    assert passes(loader, 1) == whole[1:]


def test_a_pass_abandoned_before_a_save_is_not_resumed() -> None:
    whole = passes(prepared(LOADERS["shuffle"]()), 2)
    loader = prepared(LOADERS["shuffle"]())
    for _ in loader:
        break
    assert passes(moved_on(loader, LOADERS["shuffle"]), 1) == whole[1:]


@pytest.mark.parametrize("kind", LOADERS)
def test_a_pass_that_an_error_left_is_resumed_if_it_is_saved_in_its_handler(kind: str) -> None:
    make = LOADERS[kind]
    seed_everything(0)
    whole = passes(prepared(make()), 3)
    for batches in (1, 2, len(whole[1])):
        assert broken_off(make, epoch=1, batches=batches, then=2) == whole, batches


def test_an_iterator_dropped_for_the_next_one_does_not_end_its_pass() -> None:
    """As in loops of so many steps an epoch: `batches = iter(loader)` again and again."""
    whole = passes(prepared(LOADERS["shuffle"]()), 2)
    loader = prepared(LOADERS["shuffle"]())
    running = iter(loader)
    next(running)
    running = iter(loader)
    next(running)
    assert passes(moved_on(loader, LOADERS["shuffle"]), 1) == [whole[1][1:]]


def test_a_pass_resumed_into_after_its_end_is_empty_once() -> None:
    """Another loader's pass of the same epoch was under way: the epoch is entered again."""
    make = LOADERS["shuffle"]
    whole = passes(prepared(make()), 2)
    loader = prepared(make())
    passes(loader, 1)
    again = prepared(make())
    again.apply(unflatten(loader.capture(replay=True).value, {}))
    assert passes(again, 2) == [[], whole[1]]


def test_a_pass_to_be_found_empty_stays_so_when_saved_again_at_once() -> None:
    make = LOADERS["shuffle"]
    loader = prepared(make())
    for _ in loader:
        break
    again = prepared(make())
    again.apply(unflatten(loader.capture(replay=True).value, {}))
    assert passes(moved_on(again, make), 1) == [[]]


def test_attributes_are_those_of_the_loader() -> None:
    inner = DataLoader(Plain(), batch_size=4, drop_last=True)
    loader = prepared(inner)
    assert (loader.batch_size, loader.drop_last) == (4, True)
    assert loader.dataset is inner.dataset
    with pytest.raises(AttributeError):
        _ = loader.nothing


def test_another_number_of_samples_is_a_difference() -> None:
    saved = as_saved(prepared(DataLoader(Plain(22))).capture())
    differences = Differences()
    prepared(DataLoader(Plain(23))).compare(saved, differences)
    assert differences.differing == ["loader (checkpoint: 22 samples, dataset: 23)"]


def test_an_empty_dataset_has_no_batches() -> None:
    with pytest.raises(errors.ConfigurationError):
        prepared(DataLoader(Plain(0)))


# --- skip_first_batches ----------------------------------------------------------------


def test_skipping_serves_the_rest_of_one_epoch() -> None:
    data = Plain()
    loader = prepared(DataLoader(data, batch_size=4))
    rest = Checkpointer().skip_first_batches(loader, 2)
    assert len(rest) == 4
    assert flat(rest) == list(range(8, 22))
    assert data.asked == list(range(8, 22))
    assert len(loader) == 6
    assert flat(loader) == list(range(22))


def test_skipping_serves_one_epoch_only() -> None:
    rest = Checkpointer().skip_first_batches(prepared(DataLoader(Plain())), 2)
    list(rest)
    with pytest.raises(errors.ConfigurationError, match="one epoch"):
        iter(rest)


@pytest.mark.parametrize("count", [6, 100])
def test_skipping_everything_leaves_nothing(count: int) -> None:
    rest = Checkpointer().skip_first_batches(prepared(DataLoader(Plain(), batch_size=4)), count)
    assert (len(rest), list(rest)) == (0, [])


def test_skipping_nothing_is_the_whole_epoch() -> None:
    whole = passes(prepared(LOADERS["shuffle"]()), 1)
    rest = Checkpointer().skip_first_batches(prepared(LOADERS["shuffle"]()))
    assert [[digest(batch) for batch in rest]] == whole


def test_skipped_batches_are_those_the_epoch_would_begin_with() -> None:
    (whole,) = passes(prepared(LOADERS["collate"]()), 1)
    rest = Checkpointer().skip_first_batches(prepared(LOADERS["collate"]()), 2)
    assert [digest(batch) for batch in rest] == whole[2:]


def test_skipping_in_a_resumed_pass_counts_from_its_beginning() -> None:
    loader = prepared(DataLoader(Plain(), batch_size=4))
    running = iter(loader)
    next(running)
    again = moved_on(loader, lambda: DataLoader(Plain(), batch_size=4))
    assert flat(Checkpointer().skip_first_batches(again, 3)) == list(range(12, 22))


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Plain(), batch_size=4),
        lambda: DataLoader(Stream(), batch_size=4),
        lambda: DataLoader(Plain(), batch_sampler=Fours()),
        lambda: [torch.arange(4 * n, min(4 * n + 4, 22)) for n in range(6)],
    ],
    ids=["map", "iterable", "batch_sampler", "any"],
)
def test_skipping_in_a_loader_that_is_not_prepared(make: Any) -> None:
    rest = Checkpointer().skip_first_batches(make(), 2)
    assert flat(rest) == list(range(8, 22))  # type: ignore[arg-type]


class Fours(Sampler[list[int]]):
    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(n, min(n + 4, 22))) for n in range(0, 22, 4))


class Dicts(Dataset[dict[str, int]]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"x": index}


def test_batches_of_any_structure_pass_through() -> None:
    (batch,) = prepared(DataLoader(Dicts(), batch_size=2))
    assert batch["x"].tolist() == [0, 1]


class Moving:
    """Moves itself, as tokenizers' batches and graphs do."""

    def __init__(self, samples: list[int]) -> None:
        self.x = torch.tensor(samples)

    def to(self, device: torch.device) -> Moving:
        self.x = self.x.to(device)
        return self


def test_batches_go_to_the_device_whatever_they_are_made_of() -> None:
    def collate(samples: list[int]) -> Any:
        x = torch.tensor(samples)
        packed = nn.utils.rnn.pack_sequence([x.float()])
        encoding = BatchEncoding({"input_ids": x})
        return {"x": [x], "encoding": encoding, "packed": packed, "own": Moving(samples), "n": 2}

    meta = torch.device("meta")
    loader = DataLoader(Plain(2), batch_size=2, collate_fn=collate)
    (batch,) = PreparedLoader(loader, name="a", seed=0, rank=0, world_size=1, device=meta)
    found = [batch["x"][0], batch["encoding"]["input_ids"], batch["packed"].data, batch["own"].x]
    assert [tensor.device for tensor in found] == [meta] * 4
    assert batch["n"] == 2
