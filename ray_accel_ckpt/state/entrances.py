"""How an iterable dataset can be entered in the middle, if it can be at all."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset

from ray_accel_ckpt.state.indexed import worker_options
from ray_accel_ckpt.state.source import iterates_itself


class Entrance(Protocol):
    """One way to begin a pass. Its state is taken after a batch, and loaded before a pass."""

    kind: str
    """Names the states that can be loaded; "" if there are none."""

    why_not: str
    """Why reading again is what remains, if it is."""

    def begin(self, state: Any) -> Iterator[Any]:
        """A pass over the batches, from `state` on; None: from the beginning."""
        ...

    def state(self) -> Any:
        """Where the pass under way stands."""
        ...


class FromTheFront:
    """The dataset has no state: what was read before is read again."""

    kind = ""

    def __init__(self, loader: DataLoader[Any], why_not: str) -> None:
        self.why_not = why_not
        self._loader = loader

    def begin(self, state: Any) -> Iterator[Any]:
        del state
        return _iterated(self._loader)

    def state(self) -> None:
        return None


class ByDataset:
    """The dataset's own state, read in this process: nothing is fetched ahead of the loop."""

    kind = "dataset"
    why_not = "the checkpoint has no state of the dataset"

    def __init__(self, loader: DataLoader[Any], generator: torch.Generator) -> None:
        self._dataset = _Watched(loader.dataset)
        self._loader = DataLoader(
            self._dataset,
            batch_size=loader.batch_size,
            drop_last=loader.drop_last,
            collate_fn=loader.collate_fn,
            generator=generator,
            **worker_options(loader),
        )

    def begin(self, state: Any) -> Iterator[Any]:
        if state is not None and state["ended"]:
            return iter(())
        if state is not None:
            self._dataset.of.load_state_dict(state["dataset"])
        return iter(self._loader)

    def state(self) -> Any:
        return {"dataset": self._dataset.of.state_dict(), "ended": self._dataset.ended}


class ByLoader:
    """The state of a torchdata `StatefulDataLoader`, which keeps one for each of its workers."""

    kind = "loader"
    why_not = ByDataset.why_not

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def begin(self, state: Any) -> Iterator[Any]:
        if state is not None:
            self._loader.load_state_dict(state)
        return _iterated(self._loader)

    def state(self) -> Any:
        return self._loader.state_dict()


class _Watched(IterableDataset[Any]):
    """A dataset, and whether it has been read to its end.

    What a dataset's state says after its end is up to the dataset: some begin anew.
    """

    def __init__(self, of: Any) -> None:
        self.of = of
        self.ended = False

    def __iter__(self) -> Iterator[Any]:
        self.ended = False
        # Not inside the generator: a dataset may draw its order when it is asked for an iterator.
        return self._to_the_end(iter(self.of))

    def _to_the_end(self, samples: Iterator[Any]) -> Iterator[Any]:
        yield from samples
        self.ended = True


def entrance_of(loader: DataLoader[Any], generator: torch.Generator) -> Entrance:
    """The best way that dataset, loader and installed packages allow.

    Args:
        generator: what the base seed of loader workers is drawn from.
    """
    loader.generator = generator
    fault = fault_of_datasets(loader.dataset, loader.num_workers)
    if fault:
        return FromTheFront(loader, fault)
    if has_state(loader):
        return ByLoader(loader)
    if not has_state(loader.dataset):
        return FromTheFront(
            loader,
            "an iterable dataset cannot be entered in the middle unless it has state_dict() and "
            "load_state_dict()",
        )
    if iterates_itself(loader):
        return FromTheFront(
            loader,
            f"a {type(loader).__qualname__} has an __iter__ of its own, and begins it at the front",
        )
    if loader.num_workers == 0:
        return ByDataset(loader, generator)
    try:
        torchdata = importlib.import_module("torchdata.stateful_dataloader")
    except ImportError:
        return FromTheFront(
            loader,
            "the dataset's state lies in the loader's worker processes, and torchdata, which gets "
            "it from there, is not installed: pip install torchdata",
        )
    return ByLoader(
        torchdata.StatefulDataLoader(
            loader.dataset,
            batch_size=loader.batch_size,
            drop_last=loader.drop_last,
            collate_fn=loader.collate_fn,
            generator=generator,
            **worker_options(loader),
        )
    )


def _iterated(loader: Any) -> Iterator[Any]:
    """``iter(loader)``, by new processes if those there are have not heard of the epoch.

    Persistent workers keep a copy of the dataset: what `set_epoch` sets reaches them only in
    memory that they share, as that of 🤗 datasets. A resumed run would begin with another epoch.
    """
    shared = isinstance(getattr(loader.dataset, "_epoch", None), torch.Tensor)
    if loader.persistent_workers and hasattr(loader.dataset, "set_epoch") and not shared:
        loader._iterator = None
    return iter(loader)


def has_state(obj: Any) -> bool:
    return hasattr(obj, "state_dict") and hasattr(obj, "load_state_dict")


def fault_of_datasets(dataset: Any, num_workers: int) -> str:
    """Why the state that a 🤗 dataset has would not bring back what it was saved at, if so."""
    pending = [getattr(dataset, "_ex_iterable", None)]
    while pending:
        stage = pending.pop()
        kind = type(stage).__name__
        if kind == "BufferShuffledExamplesIterable" and getattr(stage, "buffer_size", 0) > 1:
            return (
                "the shuffle buffer of a datasets.IterableDataset is not part of its state, and "
                "the samples in it would be lost; shuffle(buffer_size=1), which shuffles shards, "
                "can be entered"
            )
        if kind == "InterleavedShardsExamplesIterable" and num_workers:
            return (
                "a datasets.IterableDataset that interleaves shards does not load the state it "
                "had in a loader worker; with shuffle(max_buffer_input_shards=1, buffer_size=1) "
                "or num_workers=0 it can be entered"
            )
        below = [getattr(stage, "ex_iterable", None), *getattr(stage, "ex_iterables", ())]
        pending += [each for each in below if each is not None]
    return ""
