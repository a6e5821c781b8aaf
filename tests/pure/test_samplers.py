"""Samplers of the user's: kept, listed the same everywhere, and resumed with their state."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from ray_accel_ckpt import Checkpointer, errors
from ray_accel_ckpt.state.loader import PreparedLoader
from ray_accel_ckpt.state.part import Differences
from tests.pure.helpers import OnStep, Plain, as_saved, assert_survives
from tests.pure.loaders import Make, flat, moved_on, passes, prepared, restored

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")


class Curriculum(Sampler[int]):
    """Serves the samples up to a level that the loop raises, in an order it draws itself."""

    def __init__(self, size: int = 22) -> None:
        self.size = size
        self.level = torch.tensor(12)
        self.draws = random.Random(5)

    def __len__(self) -> int:
        return int(self.level)

    def __iter__(self) -> Iterator[int]:
        order = list(range(int(self.level)))
        self.draws.shuffle(order)
        return iter(order)

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level, "draws": self.draws.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.level = state["level"].clone()
        self.draws.setstate(state["draws"])


class Counting(Sampler[int]):
    """As torchdata's: the state is a position, and loading it means to begin there once."""

    def __init__(self, size: int = 22) -> None:
        self.size, self.yielded = size, 0
        self.begin: int | None = None

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        self.yielded, self.begin = self.begin or 0, None
        for i in range(self.yielded, self.size):
            self.yielded += 1
            yield self.size - 1 - i

    def state_dict(self) -> dict[str, Any]:
        return {"yielded": self.yielded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin = state["yielded"]


class Pairs(Sampler[list[int]]):
    """A batch sampler around a sampler, with a state of its own beside that of the inner one."""

    def __init__(self, inner: Sampler[int]) -> None:
        self.sampler = inner
        self.size = 2

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.size)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        return (order[i : i + self.size] for i in range(0, len(order), self.size))

    def state_dict(self) -> dict[str, Any]:
        return {"size": self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.size = state["size"]


STATEFUL: dict[str, Make] = {
    "sampler": lambda: DataLoader(Plain(), batch_size=3, sampler=Curriculum()),
    "counting": lambda: DataLoader(Plain(), batch_size=3, sampler=Counting()),
    "batch_sampler": lambda: DataLoader(Plain(), batch_sampler=Pairs(Curriculum())),
    "torchs_batch_sampler": lambda: DataLoader(
        Plain(), batch_sampler=BatchSampler(Curriculum(), 3, False)
    ),
}


def harder(loader: PreparedLoader, served: int) -> None:
    """What the loop does after so many batches of a pass: the level rises in the middle of it."""
    if served == 2:
        inner = loader.batch_sampler.sampler
        if isinstance(inner, Curriculum):
            inner.level = inner.level + 3


def training(loader: PreparedLoader, passes: int, already: int = 0) -> Iterator[list[int]]:
    for _ in range(passes):
        for served, batch in enumerate(loader, start=already + 1):
            harder(loader, served)
            yield batch.tolist()
        already = 0
        yield []


@pytest.mark.parametrize("kind", STATEFUL)
def test_a_samplers_state_goes_on_wherever_the_run_is_killed(kind: str) -> None:
    """Before the level rises in a pass, after it, at the end of a pass, and between two."""
    make = STATEFUL[kind]
    whole = list(training(prepared(make()), 3))
    assert len({tuple(sorted(b)) for b in whole}) > 3
    for cut in range(len(whole)):
        loader = prepared(make())
        running = training(loader, 3)
        before = [next(running) for _ in range(cut)]
        done = before.count([])
        served = len(before) - (len(before) - before[::-1].index([]) if done else 0)
        again = moved_on(loader, make)
        after = list(training(again, 3 - done, already=served))
        assert before + after == whole, cut


def test_a_killed_script_goes_on_with_its_curriculum(tmp_path: Path) -> None:
    def script(ckpt: Checkpointer, on_step: OnStep) -> Any:
        loader = ckpt.prepare(DataLoader(Plain(), batch_size=3, sampler=Curriculum()))
        served: list[list[int]] = []
        ckpt.load_state()
        for _ in ckpt.epochs(3):
            for batch in loader:
                served.append(batch.tolist())
                if ckpt.global_step % 4 == 1:
                    loader.sampler.level = loader.sampler.level + 2
                ckpt.step()
                on_step()
        return served[-4:], loader.sampler.state_dict()

    assert_survives(script, tmp_path, kills=(3, 5, 11), every=1)


def test_the_length_is_asked_for_without_moving_the_sampler() -> None:
    loader = prepared(STATEFUL["sampler"]())
    before = restored(loader.capture())["sampler"]
    assert len(loader) == 4
    assert restored(loader.capture())["sampler"]["now"][0]["draws"] == before["now"][0]["draws"]


def test_every_rank_draws_what_rank_zero_had_drawn() -> None:
    make = STATEFUL["sampler"]
    loader = prepared(make())
    list(training(loader, 1))
    ranks = [moved_on(loader, make, rank=rank, world_size=3) for rank in range(3)]
    seen = [i for batches in zip(*ranks, strict=True) for batch in batches for i in batch.tolist()]
    assert seen == [i for batch in training(moved_on(loader, make), 1) for i in batch]


def test_a_state_that_the_sampler_does_not_take_any_more_is_a_difference() -> None:
    saved = as_saved(prepared(STATEFUL["sampler"]()).capture())
    differences = Differences()
    prepared(DataLoader(Plain())).compare(saved, differences)
    assert len(differences.differing) == 1


def test_a_position_saved_before_the_sampler_had_a_state_is_gone_on_with() -> None:
    loader = prepared(DataLoader(Plain(), batch_size=3))
    running = iter(loader)
    next(running)
    again = moved_on(loader, STATEFUL["counting"])
    assert flat(again) == list(range(18, -1, -1))


@pytest.mark.parametrize(
    "state",
    [
        7,
        {},
        {"epoch": 0, "length": 0, "before": None, "now": None},
        {"epoch": None, "length": 0, "before": None, "now": None},
        {"epoch": None, "length": 0, "before": None, "now": [{}, {}]},
        {"epoch": -1, "length": 0, "before": [{}], "now": None},
        {"epoch": "0", "length": 0, "before": [{}], "now": None},
        {"epoch": 0, "length": 0, "before": 7, "now": None},
        {"epoch": 0, "length": "0", "before": [{}], "now": None},
    ],
    ids=repr,
)
def test_a_samplers_state_of_another_structure_is_refused(state: Any) -> None:
    loader = prepared(STATEFUL["sampler"]())
    with pytest.raises(errors.CorruptCheckpointError):
        loader.check({**restored(loader.capture()), "sampler": state})


def test_going_on_lists_the_sampler_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(1, 22, 2))

    data = Plain()

    def make() -> DataLoader[int]:
        return DataLoader(data, batch_size=3, sampler=Odd())

    caplog.set_level("INFO")
    loader = prepared(make())
    running = iter(loader)
    next(running)
    assert not caplog.messages
    data.asked.clear()
    again = moved_on(loader, make)
    running = iter(again)
    next(running)
    assert data.asked == [7, 9, 11]
    flat(moved_on(again, make))
    assert len([m for m in caplog.messages if "the 11 indices of its sampler" in m]) == 2


# --- what a loader means ---------------------------------------------------------------


def test_torchs_batch_sampler_keeps_its_sampler_and_size() -> None:
    def make() -> DataLoader[int]:
        return DataLoader(Plain(), batch_sampler=BatchSampler(SequentialSampler(Plain()), 4, True))

    assert [batch.tolist() for batch in prepared(make())] == [
        list(range(n, n + 4)) for n in range(0, 20, 4)
    ]
    shuffled = BatchSampler(RandomSampler(Plain()), 4, False)
    order = flat(prepared(DataLoader(Plain(), batch_sampler=shuffled)))
    assert order == flat(prepared(DataLoader(Plain(), batch_size=4, shuffle=True)))


class Rows(Dataset[Any]):
    """Takes an index of any form."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: Any) -> Any:
        return index


@pytest.mark.parametrize("workers", [0, 1])
def test_an_index_of_any_form_reaches_the_dataset(workers: int) -> None:
    """Lists of indices with batch_size=None, and tuples: (sample, size) for instance."""
    whole = BatchSampler(SequentialSampler(range(6)), 2, False)
    loader = DataLoader(Rows(), batch_size=None, sampler=whole, num_workers=workers)
    assert list(prepared(loader)) == [[0, 1], [2, 3], [4, 5]]
    pairs = [(i, 32 * i) for i in range(6)]
    tuples = DataLoader(Rows(), batch_size=3, sampler=pairs, collate_fn=list, num_workers=workers)
    assert [*prepared(tuples)] == [pairs[:3], pairs[3:]]


class WithoutLength(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("workers", [0, 1])
def test_data_of_which_only_the_sampler_knows_how_much_there_is(workers: int) -> None:
    def make() -> DataLoader[Any]:
        sampler = [5, 3, 8, 1, 2]
        return DataLoader(WithoutLength(), sampler=sampler, batch_size=2, num_workers=workers)

    loader = prepared(make())
    assert len(loader) == 3
    kept = iter(loader)
    assert next(kept).tolist() == [5, 3]
    assert flat(moved_on(loader, make)) == [8, 1, 2]


def test_a_map_style_stateful_loader_is_prepared_like_any_other() -> None:
    def make() -> Any:
        return StatefulDataLoader(Plain(), batch_size=4, shuffle=True)

    loaders = [prepared(make(), rank=rank, world_size=2) for rank in range(2)]
    assert sorted(flat(loaders[0]) + flat(loaders[1])) == list(range(22))
    loader = prepared(make())
    whole = passes(loader, 2)
    again = prepared(make())
    running = iter(again)
    next(running)
    assert passes(moved_on(again, make), 2) == [whole[0][1:], whole[1]]
    assert len(prepared(make(), world_size=2, global_batch_size=10)) == 3


# --- samplers that deal out to ranks ---------------------------------------------------


class Mine(DistributedSampler[int]):
    """A subclass, which may do anything."""


class Share(Sampler[int]):
    def __init__(self) -> None:
        self.rank, self.num_replicas = 1, 2

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, 22, self.num_replicas))


SPLIT: dict[str, Callable[[], DataLoader[int]]] = {
    "subclass": lambda: DataLoader(Plain(), sampler=Mine(Plain(), num_replicas=2, rank=0)),
    "sampler": lambda: DataLoader(Plain(), sampler=Share()),
    "batch_sampler": lambda: DataLoader(Plain(), batch_sampler=Pairs(Share())),
    "within": lambda: DataLoader(Plain(), batch_sampler=BatchSampler(Share(), 2, False)),
    "torchs_within": lambda: DataLoader(
        Plain(),
        batch_sampler=Pairs(DistributedSampler(Plain(), num_replicas=2, rank=0)),
    ),
}


@pytest.mark.parametrize("kind", SPLIT)
def test_a_sampler_that_deals_out_to_ranks_is_refused(kind: str) -> None:
    with pytest.raises(errors.ConfigurationError, match="deals the data out to ranks itself"):
        prepared(SPLIT[kind](), world_size=2)


def test_a_sampler_for_one_rank_is_kept() -> None:
    loader = DataLoader(Plain(), sampler=Mine(Plain(), num_replicas=1, rank=0, shuffle=False))
    assert flat(prepared(loader)) == list(range(22))


# --- skipping --------------------------------------------------------------------------


class Remembers(Plain):
    """Notes what is read in a file, which loader workers write to as well."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self.log = log

    def __getitem__(self, index: int) -> int:
        with self.log.open("a") as log:
            log.write(f"{index}\n")
        return index


@pytest.mark.parametrize("workers", [0, 2])
def test_going_on_reads_nothing_that_was_skipped(tmp_path: Path, workers: int) -> None:
    log = tmp_path / "read"

    def make() -> DataLoader[int]:
        return DataLoader(Remembers(log), batch_size=4, shuffle=True, num_workers=workers)

    whole = flat(prepared(make()))
    loader = prepared(make())
    running = iter(loader)
    for _ in range(3):
        next(running)
    state = restored(loader.capture())
    running.close()  # type: ignore[attr-defined]
    log.unlink()
    again = prepared(make())
    again.apply(state)
    assert flat(again) == whole[12:]
    assert sorted(map(int, log.read_text().split())) == sorted(whole[12:])


class Split(Sampler[int]):
    """Deals out to ranks under another name than torch's."""

    def __init__(self, count: str, rank: str) -> None:
        setattr(self, count, 2)
        setattr(self, rank, 0)

    def __iter__(self) -> Iterator[int]:
        return iter(range(0, 10, 2))

    def __len__(self) -> int:
        return 5


class Around(Sampler[int]):
    def __init__(self, sampler: Sampler[int]) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)


@pytest.mark.parametrize(
    ("count", "rank"),
    [("world_size", "rank"), ("_world_size", "_rank"), ("num_shards", "shard_id")],
)
def test_a_sampler_that_deals_out_under_another_name_is_refused(count: str, rank: str) -> None:
    split = Split(count, rank)
    for sampler in (split, Around(split), Around(Around(split))):
        with pytest.raises(errors.ConfigurationError, match="deals the data out to ranks itself"):
            prepared(DataLoader(range(10), sampler=sampler))  # type: ignore[arg-type]


def test_another_sampler_is_a_difference_and_no_damage() -> None:
    class Stateful(Around):
        def state_dict(self) -> dict[str, int]:
            return {"n": 1}

        def load_state_dict(self, state: dict[str, int]) -> None:
            del state

    one = prepared(DataLoader(range(10), sampler=Stateful(SequentialSampler(range(10)))))  # type: ignore[arg-type]
    two = prepared(DataLoader(range(10), sampler=Stateful(Stateful(SequentialSampler(range(10))))))  # type: ignore[arg-type]
    none = prepared(DataLoader(range(10), sampler=Around(SequentialSampler(range(10)))))  # type: ignore[arg-type]
    batches = prepared(DataLoader(range(10), batch_sampler=[[i] for i in range(10)]))  # type: ignore[arg-type]
    for saved, registered in (
        (one, two),
        (two, one),
        (one, none),
        (none, batches),
        (batches, none),
    ):
        next(iter(saved))
        differences = Differences()
        registered.compare(as_saved(saved.capture()), differences)
        assert len(differences.differing) == 1


class Failing(Dataset[int]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        if index == 9:
            raise OSError("a disk that is gone for a while")
        return index


def test_an_error_in_the_data_is_not_the_end_of_it() -> None:
    loader = prepared(DataLoader(Failing(), batch_size=2))
    with pytest.raises(OSError, match="gone for a while"):
        list(loader)
    state = restored(loader.capture())
    assert (state["epoch"], state["consumed"], state["spent"]) == (0, 8, False)


def test_an_iterator_of_before_does_not_end_what_was_loaded() -> None:
    loader = prepared(DataLoader(range(20), batch_size=2))  # type: ignore[arg-type]
    held = iter(loader)
    next(held)
    state = restored(loader.capture())
    loader.apply(state)
    del held
    assert restored(loader.capture()) == state
