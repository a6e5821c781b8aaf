"""Iterable data: entered where its state says, or read again, and never a sample too many."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from ray_accel_ckpt import Checkpointer, errors
from ray_accel_ckpt.state.part import Differences
from ray_accel_ckpt.state.tree import unflatten
from tests.pure.helpers import (
    OnStep,
    ShuffledStream,
    Stream,
    as_saved,
    assert_survives,
    seed_everything,
    streams,
)
from tests.pure.loaders import (
    Make,
    broken_off,
    flat,
    interrupted,
    moved_on,
    passes,
    prepared,
    restored,
)

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")


class Tracked(IterableDataset[Any]):
    """Has a position, and noise from python's, numpy's and torch's streams.

    Args:
        log: what is read is noted there, by loader workers too.
        forgets: at its end the state is that of the beginning.
    """

    def __init__(self, log: Path | None = None, *, size: int = 22, forgets: bool = False) -> None:
        self.log, self.size, self.forgets = log, size, forgets
        self.position, self.entered, self.epochs = 0, False, [-1]

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[Any]:
        self.position, self.entered = self.position if self.entered else 0, False
        shift = torch.randint(100, (1,))
        return self._from(int(shift))

    def _from(self, shift: int) -> Iterator[Any]:
        while self.position < self.size:
            self.position += 1
            if self.log is not None:
                with self.log.open("a") as log:
                    log.write(f"{self.position - 1}\n")
            noise = random.random() + float(np.random.rand()) + torch.rand(2)
            yield self.position - 1 + 0.1 * noise + shift, self.epochs[-1]
        if self.forgets:
            self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "tensor": torch.tensor(self.position)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["tensor"] == state["position"]
        self.position, self.entered = state["position"], True


class Shares(Tracked):
    """Each loader worker reads its share, without noise."""

    def __iter__(self) -> Iterator[Any]:
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        start, self.entered = self.position if self.entered else 0, False
        self.position = start
        for i in range(first + start * step, self.size, step):
            if self.log is not None:
                with self.log.open("a") as log:
                    log.write(f"{i}\n")
            self.position += 1
            yield i + 1000 * self.epochs[-1]


class OfEpoch(Stream):
    """Begins anew each time, with other samples in each epoch."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return (i + 1000 * self.epoch for i in super().__iter__())


@pytest.mark.parametrize("data", [OfEpoch, Shares])
def test_persistent_workers_hear_of_each_epoch(data: Any) -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(data(), batch_size=11, num_workers=1, persistent_workers=True)

    loader = prepared(make())
    assert [flat(loader)[0] for _ in range(2)] == [0, 1000]
    kept = iter(loader)
    assert next(kept)[0] == 2000
    again = moved_on(loader, make)
    assert flat(again) == list(range(2011, 2022))
    assert flat(again) == list(range(3000, 3022))


def numbers(shards: list[int]) -> Iterator[dict[str, int]]:
    for shard in shards:
        for i in range(7):
            yield {"x": 10 * shard + i}


def generated() -> Any:
    return datasets.IterableDataset.from_generator(numbers, gen_kwargs={"shards": [0, 1, 2, 3]})


def in_memory() -> Any:
    return datasets.Dataset.from_dict({"x": range(26)}).to_iterable_dataset(num_shards=4)


ENTERED: dict[str, Make] = {
    "state": lambda: DataLoader(Tracked(), batch_size=4),
    "state_even": lambda: DataLoader(Tracked(size=20), batch_size=4),
    "state_forgetting": lambda: DataLoader(Tracked(forgets=True), batch_size=4),
    "state_no_batches": lambda: DataLoader(Tracked(size=6), batch_size=None),
    "state_drop_last": lambda: DataLoader(Tracked(), batch_size=4, drop_last=True),
    "state_workers": lambda: DataLoader(Shares(), batch_size=4, num_workers=2),
    "stateful_loader": lambda: StatefulDataLoader(Tracked(), batch_size=4),
    "stateful_loader_workers": lambda: StatefulDataLoader(Shares(), batch_size=4, num_workers=2),
    "persistent_workers": lambda: DataLoader(
        in_memory(), batch_size=4, num_workers=2, persistent_workers=True
    ),
    "seldom_snapshots": lambda: StatefulDataLoader(
        in_memory(), batch_size=4, num_workers=2, snapshot_every_n_steps=3
    ),
    "generated": lambda: DataLoader(generated(), batch_size=4),
    "generated_shards": lambda: DataLoader(generated().shuffle(seed=3, buffer_size=1), 4),
    "in_memory": lambda: DataLoader(in_memory(), batch_size=4),
    "in_memory_shards": lambda: DataLoader(in_memory().shuffle(seed=3, buffer_size=1), 4),
    "in_memory_workers": lambda: DataLoader(
        in_memory().shuffle(seed=3, buffer_size=1, max_buffer_input_shards=1),
        batch_size=4,
        num_workers=2,
    ),
    "in_memory_stateful": lambda: StatefulDataLoader(in_memory(), batch_size=4, num_workers=2),
}
READ_AGAIN: dict[str, Make] = {
    "no_state": lambda: DataLoader(ShuffledStream(), batch_size=4),
    "no_state_stateful_loader": lambda: StatefulDataLoader(ShuffledStream(), batch_size=4),
    "buffer": lambda: DataLoader(in_memory().shuffle(seed=3, buffer_size=8), batch_size=4),
    "buffer_mapped": lambda: DataLoader(
        generated().shuffle(seed=3, buffer_size=8).map(lambda s: {"x": -s["x"]}), batch_size=4
    ),
    "interleaved_workers": lambda: DataLoader(
        in_memory().shuffle(seed=3, buffer_size=1), batch_size=4, num_workers=2
    ),
    "buffer_stateful_loader": lambda: StatefulDataLoader(
        generated().shuffle(seed=3, buffer_size=8), batch_size=4
    ),
}


@pytest.mark.parametrize("kind", [*ENTERED, *READ_AGAIN])
def test_interrupted_anywhere_the_batches_are_the_same(kind: str) -> None:
    make = {**ENTERED, **READ_AGAIN}[kind]
    seed_everything(0)
    whole = passes(prepared(make()), 3)
    length = len(whole[1])
    workers = make().num_workers
    for batches in {1, length // 2, length} if workers else range(1, length + 1):
        assert interrupted(make, epoch=1, batches=batches, then=2) == whole, batches


@pytest.mark.parametrize("kind", [*ENTERED, *READ_AGAIN])
def test_broken_off_by_an_error_the_batches_are_the_same(kind: str) -> None:
    make = {**ENTERED, **READ_AGAIN}[kind]
    seed_everything(0)
    whole = passes(prepared(make()), 3)
    assert broken_off(make, epoch=1, batches=2, then=2) == whole


@pytest.mark.parametrize("kind", ENTERED)
def test_what_has_a_state_is_not_read_again(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    loader = prepared(ENTERED[kind]())
    running = iter(loader)
    next(running)
    next(running)
    again = moved_on(loader, ENTERED[kind])
    next(iter(again))
    assert "again" not in caplog.text


@pytest.mark.parametrize("kind", READ_AGAIN)
def test_what_is_read_again_says_so(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    loader = prepared(READ_AGAIN[kind]())
    running = iter(loader)
    next(running)
    next(running)
    next(iter(moved_on(loader, READ_AGAIN[kind])))
    assert "reading 2 batches again" in caplog.text or "by 2 steps" in caplog.text


@pytest.mark.parametrize("loader_class", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("workers", [0, 2])
def test_no_sample_is_read_twice(tmp_path: Path, workers: int, loader_class: Any) -> None:
    log = tmp_path / "read"

    def make() -> Any:
        return loader_class(Shares(log), batch_size=4, num_workers=workers)

    loader = prepared(make())
    running = iter(loader)
    first = [i for _ in range(3) for i in next(running).tolist()]
    state = restored(loader.capture())
    running.close()  # type: ignore[attr-defined]
    del running, loader
    log.unlink()
    again = prepared(make())
    again.apply(state)
    rest = flat(again)
    assert sorted(first + rest) == list(range(22))
    assert sorted(map(int, log.read_text().split())) == sorted(rest)


@pytest.mark.parametrize("kind", ["buffer", "interleaved_workers"])
def test_a_state_that_will_not_be_used_is_told_of_once(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    for rank in range(2):
        prepared(READ_AGAIN[kind](), rank=rank, world_size=2)
    assert len([m for m in caplog.messages if "will be read again" in m]) == 1


def test_iterating_a_stream_leaves_the_global_streams_alone() -> None:
    before = streams()
    loader = prepared(ENTERED["state"]())
    running = iter(loader)
    next(running)
    passes(moved_on(loader, ENTERED["state"]), 2)
    assert streams() == before


def test_capturing_does_not_change_what_was_captured() -> None:
    loader = prepared(ENTERED["state"]())
    running = iter(loader)
    next(running)
    captured = loader.capture()
    kept = restored(captured)
    next(running)
    assert str(restored(captured)) == str(kept)


def test_a_dataset_is_told_each_epoch() -> None:
    data = Tracked()
    loader = prepared(DataLoader(data, batch_size=4))
    passes(loader, 3)
    assert data.epochs == [-1, 0, 1, 2]


def test_an_ended_pass_is_followed_by_a_whole_one() -> None:
    loader = prepared(ENTERED["state"]())
    whole = passes(loader, 2)
    again = moved_on(loader, ENTERED["state"])
    assert [len(served) for served in passes(again, 1)] == [len(whole[1])]


def test_saved_again_before_the_first_batch_the_place_is_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    make = ENTERED["state"]
    whole = passes(prepared(make()), 1)
    loader = prepared(make())
    running = iter(loader)
    next(running)
    again = moved_on(loader, make)
    entered = iter(moved_on(again, make))
    next(entered)
    again = moved_on(again, make)
    iter(again)
    assert passes(moved_on(again, make), 1) == [whole[0][1:]]
    assert not caplog.messages


def test_skipping_from_a_place_in_the_middle_reads_only_what_lies_between(tmp_path: Path) -> None:
    log = tmp_path / "read"
    loader = prepared(DataLoader(Shares(log), batch_size=4))
    running = iter(loader)
    next(running)
    next(running)
    log.unlink()
    again = moved_on(loader, lambda: DataLoader(Shares(log), batch_size=4))
    rest = Checkpointer().skip_first_batches(again, 3)
    assert flat(rest) == list(range(12, 22))  # type: ignore[arg-type]
    assert list(map(int, log.read_text().split())) == list(range(8, 22))


def test_skipping_to_before_the_place_reads_from_the_beginning() -> None:
    loader = prepared(DataLoader(Shares(), batch_size=4))
    running = iter(loader)
    next(running)
    next(running)
    again = moved_on(loader, lambda: DataLoader(Shares(), batch_size=4))
    assert flat(Checkpointer().skip_first_batches(again, 1)) == list(range(4, 22))  # type: ignore[arg-type]


def test_without_torchdata_loader_workers_read_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(Shares(), batch_size=4, num_workers=1)

    entered = prepared(make())
    running = iter(entered)
    next(running)
    monkeypatch.setitem(sys.modules, "torchdata.stateful_dataloader", None)
    whole = passes(prepared(make()), 1)
    assert "pip install torchdata" in caplog.text
    assert interrupted(make, epoch=0, batches=2, then=1) == whole
    assert passes(moved_on(entered, make), 1) == [whole[0][1:]]


def test_other_loader_workers_make_other_batches() -> None:
    loader = prepared(DataLoader(Tracked(), batch_size=4))
    running = iter(loader)
    next(running)
    saved = as_saved(loader.capture())
    differences = Differences()
    prepared(DataLoader(Tracked(), batch_size=4, num_workers=1)).compare(saved, differences)
    assert "num_workers=1" in differences.differing[0]


def test_a_stream_is_no_position_in_an_order() -> None:
    stream, indexed = prepared(DataLoader(Stream())), prepared(DataLoader(range(22)))  # type: ignore[arg-type]
    for saved, registered in ((stream, indexed), (indexed, stream)):
        differences = Differences()
        registered.compare(as_saved(saved.capture()), differences)
        assert len(differences.differing) == 1


class Unsaveable(Tracked):
    def state_dict(self) -> dict[str, Any]:
        return {"reader": object()}


def test_a_state_that_cannot_be_saved_is_named() -> None:
    loader = prepared(DataLoader(Unsaveable(), batch_size=4))
    running = iter(loader)
    next(running)
    with pytest.raises(errors.UnsupportedStateError, match="loader/entry/state/dataset/reader"):
        loader.capture()


def test_a_position_saved_without_a_place_in_the_stream_is_read_up_to() -> None:
    """As versions wrote it that did not save the dataset's state."""
    loader = prepared(DataLoader(Shares(), batch_size=4))
    old = {
        "seed": 3,
        "epoch": 0,
        "consumed": 2,
        "started": True,
        "spent": False,
        "units": None,
        "world_size": 1,
    }
    loader.check(old)
    loader.apply(old)
    assert flat(loader) == list(range(8, 22))


@pytest.mark.parametrize(
    "change",
    [
        {"entry": 7},
        {"entry": {}},
        {"at": -1},
        {"at": 3},
        {"at": "1"},
        {"state": None},
        {"state": {"dataset": {}}},
        {"streams": 7},
        {"streams": {}},
        {"more": 1},
    ],
    ids=repr,
)
def test_a_place_of_another_structure_is_refused(change: dict[str, Any]) -> None:
    loader = prepared(DataLoader(Tracked(), batch_size=4))
    running = iter(loader)
    next(running)
    state = restored(loader.capture())
    loader.check(state)
    if "entry" not in change:
        change = {"entry": {**state["entry"], **change}}
    with pytest.raises(errors.CorruptCheckpointError):
        loader.check({**state, **change})


# --- scripts ---------------------------------------------------------------------------


def training_on(make: Callable[[], DataLoader[Any]]) -> Any:
    def script(ckpt: Checkpointer, on_step: OnStep) -> Any:
        loader = ckpt.prepare(make())
        served: list[Any] = []
        ckpt.load_state()
        for _ in ckpt.epochs(2):
            for batch in loader:
                served.append(batch)
                ckpt.step()
                on_step()
        return served[-2:], ckpt.global_step

    return script


@pytest.mark.parametrize("kind", ["state", "in_memory_shards", "buffer"])
def test_a_killed_script_goes_on_in_its_stream(tmp_path: Path, kind: str) -> None:
    make = {**ENTERED, **READ_AGAIN}[kind]
    assert_survives(training_on(make), tmp_path, kills=(2, 5, 7, 9), every=1)


def test_a_killed_script_goes_on_in_the_streams_of_its_loader_workers(tmp_path: Path) -> None:
    make = ENTERED["in_memory_workers"]
    assert_survives(training_on(make), tmp_path, kills=(3, 8), every=1)


# --- another number of workers ---------------------------------------------------------


class Dealt(IterableDataset[int]):
    """Each rank reads the queue of numbers in its state; queues can be dealt out anew."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.queue = list(range(24))[rank::world_size]
        self.left: list[int] | None = None

    def __iter__(self) -> Iterator[int]:
        self.left = list(self.queue) if self.left is None else self.left
        while self.left:
            yield self.left.pop(0)
        self.left = None

    def state_dict(self) -> dict[str, Any]:
        return {"left": self.left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.left = list(state["left"])

    def reshard(self, states: list[dict[str, Any]], num_workers: int) -> list[dict[str, Any]]:
        left = sorted(i for state in states for i in state["left"])
        return [{"left": left[rank::num_workers]} for rank in range(num_workers)]


def stream_group(workers: int, kind: Any = Dealt, **options: Any) -> list[Any]:
    return [
        prepared(
            DataLoader(kind(rank, workers), batch_size=2, collate_fn=numbers_of, **options),
            rank=rank,
            world_size=workers,
        )
        for rank in range(workers)
    ]


def numbers_of(samples: list[Any]) -> torch.Tensor:
    return torch.tensor([s["x"] if isinstance(s, dict) else s for s in samples])


def served_by(loaders: list[Any], batches: int) -> tuple[list[int], list[Any]]:
    """What so many batches of each rank hold, and what each rank then saves."""
    running = [iter(loader) for loader in loaders]
    seen = [i for each in running for _ in range(batches) for i in next(each).tolist()]
    saved = [loader.capture().value for loader in loaders]
    return seen, saved


def load(loader: Any, saved: list[Any]) -> None:
    part = loader.dealt_anew(saved)
    state = restored(part)
    loader.compare(part, differences := Differences())
    loader.check(state)
    loader.apply(state)
    assert not differences


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (4, 1), (1, 4)])
def test_a_dataset_that_can_be_dealt_anew_goes_on_with_other_workers(
    before: int, after: int
) -> None:
    first, saved = served_by(stream_group(before), 2)
    loaders = stream_group(after)
    for loader in loaders:
        load(loader, saved)
    rest = [i for loader in loaders for i in flat(loader)]
    assert sorted(first + rest) == list(range(24))
    again = [i for loader in loaders for i in flat(loader)]
    assert sorted(again) == list(range(24))


def test_between_two_passes_any_number_of_workers_goes_on() -> None:
    loaders = stream_group(2, lambda rank, workers: Stream())
    for loader in loaders:
        list(loader)
    saved = [loader.capture().value for loader in loaders]
    new = stream_group(3, lambda rank, workers: Stream())[2]
    load(new, saved)
    assert (new.cursor.epoch, flat(new)) == (1, list(range(22)))


class Tensors(Dealt):
    def state_dict(self) -> dict[str, Any]:
        return {"left": torch.tensor(self.left)}


class TooFew(Dealt):
    def reshard(self, states: list[dict[str, Any]], num_workers: int) -> list[dict[str, Any]]:
        return super().reshard(states, num_workers)[1:]


def from_hub(rank: int, workers: int) -> Any:
    return split_dataset_by_node(in_memory(), rank, workers)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Tensors, "hold tensors"),
        (TooFew, "a list of 3 states"),
        (lambda rank, workers: Stream(), "its state was not saved"),
        (from_hub, "no reshard"),
    ],
)
def test_what_cannot_be_dealt_anew_says_why(kind: Any, why: str) -> None:
    _, saved = served_by(stream_group(2, kind), 1)
    (loader, *_) = stream_group(3, kind)
    with pytest.raises(errors.ElasticDataError, match=why):
        loader.dealt_anew(saved)


def test_ranks_of_different_passes_cannot_be_dealt_anew() -> None:
    loaders = stream_group(2)
    list(loaders[0])
    _, (late,) = served_by(loaders[1:], 1)
    with pytest.raises(errors.ElasticDataError, match="had ended their pass"):
        stream_group(3)[0].dealt_anew([loaders[0].capture().value, late])


def test_streams_read_to_their_end_are_at_their_end_for_all() -> None:
    _, saved = served_by(stream_group(2, size_of_four), 1)
    loaders = stream_group(3, size_of_four)
    running = [iter(loader) for loader in loaders]
    del running
    for value in saved:
        value["entry"]["state"]["ended"] = True
    for loader in loaders:
        load(loader, saved)
    assert [flat(loader) for loader in loaders] == [[], [], []]


def size_of_four(rank: int, workers: int) -> Dealt:
    data = Dealt(rank, workers)
    data.queue = data.queue[:2]
    return data


@pytest.mark.parametrize("value", [None, 7, [], {}, {"started": True, "consumed": 1}])
def test_what_is_no_position_is_not_dealt_anew(value: Any) -> None:
    loader = stream_group(2)[0]
    with pytest.raises((errors.CorruptCheckpointError, errors.ElasticDataError)):
        load(loader, [value])


class Parts(IterableDataset[int]):
    """Deals out anew what is left; to a state of its end it begins from the front."""

    def __init__(self, items: list[int]) -> None:
        self.items, self.at = items, 0
        self.dealt: list[Any] = []

    def __iter__(self) -> Iterator[int]:
        self.at %= max(1, len(self.items))
        while self.at < len(self.items):
            self.at += 1
            yield self.items[self.at - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"items": self.items, "at": self.at % len(self.items)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.items, self.at = state["items"], state["at"]

    def reshard(self, states: list[Any], num_workers: int) -> list[Any]:
        self.dealt = states
        left = [i for state in states for i in state["items"][state["at"] :]]
        return [{"items": left[i::num_workers], "at": 0} for i in range(num_workers)]


def test_streams_that_have_ended_are_not_dealt_out_again() -> None:
    """One rank has seen its end (a batch cut short), the other stands before more."""
    saved = []
    for rank, items in enumerate(([0, 1, 2], [3, 4, 5, 6, 7])):
        loader = prepared(DataLoader(Parts(items), batch_size=2), rank=rank, world_size=2)
        running = iter(loader)
        next(running)
        next(running)
        saved.append(loader.capture().value)
        del running
    served = []
    for rank in range(3):
        data = Parts([])
        loader = prepared(DataLoader(data, batch_size=2), rank=rank, world_size=3)
        loader.apply(unflatten(loader.dealt_anew(saved).value, {}))
        served += [int(i) for batch in loader for i in batch]
        assert len(data.dealt) == 1
    assert served == [7]


def test_an_error_of_reshard_says_where_it_is_from() -> None:
    class Broken(Parts):
        def reshard(self, states: list[Any], num_workers: int) -> list[Any]:
            raise KeyError("position")

    loader = prepared(DataLoader(Broken([1, 2, 3]), batch_size=1), world_size=2)
    running = iter(loader)
    next(running)
    value = loader.capture().value
    other = prepared(DataLoader(Broken([1, 2, 3])), world_size=3)
    with pytest.raises(errors.ElasticDataError, match="raised KeyError"):
        other.dealt_anew([value, value])
