"""How one order is dealt out to the workers, and what each worker's loss then counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from ray_accel_ckpt.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Dealer:
    """Deals an order out to workers, a global batch at a time.

    Sizes within one batch differ by at most one. A tail too small to give each
    worker a sample joins the batch before it, so that no sample is dropped and
    none counts twice. Only if a pass is entered with so little left (by more
    workers than left it) there is no batch before: then workers without a
    sample are handed a copy of one that another worker has, as padding.

    Attributes:
        whole: units of one global batch.
    """

    rank: int
    world_size: int
    whole: int
    drop_last: bool

    follows_workers: ClassVar[bool] = True
    """The global batch is larger with more workers."""

    def __post_init__(self) -> None:
        if self.whole < self.world_size:
            raise ConfigurationError(
                f"a batch of {self.whole} samples cannot feed {self.world_size} workers",
                remedy="each worker needs at least one sample a step: batch_size must be at "
                "least 1, global_batch_size at least the number of workers",
            )

    @property
    def least(self) -> int:
        """A tail smaller than this joins the batch before it."""
        return self.world_size

    def cuts(self, units: int, start: int = 0) -> Iterator[tuple[int, int]]:
        """Global batches as [begin, end) from position `start` on."""
        begin = start
        while begin < units:
            end = begin + self.whole
            if self.drop_last and end > units:
                return
            if not self.drop_last and units - end < self.least:
                end = units
            yield begin, end
            begin = end

    def mine(self, begin: int, end: int) -> tuple[int, int]:
        """This rank's part of the global batch [begin, end): its own, or a copy of the first."""
        if self.padded(begin, end):
            return begin, begin + 1
        each, rest = divmod(end - begin, self.world_size)
        first = begin + self.rank * each + min(self.rank, rest)
        return first, first + each + (self.rank < rest)

    def deal(self, order: Any, begin: int, end: int) -> list[Any]:
        """This rank's units of the global batch [begin, end) of `order`."""
        first, last = self.mine(begin, end)
        return as_list(order[first:last])

    def padded(self, begin: int, end: int) -> bool:
        """Nothing is left for this rank: what it is handed is a copy and must not count."""
        return self.rank >= end - begin

    def copies(self, begin: int, end: int) -> int:
        """Workers that are handed a copy which must not count."""
        return max(0, self.world_size - (end - begin))

    def weight(self, begin: int, end: int) -> float:
        """What this rank's mean loss is multiplied by, before the mean over all ranks."""
        return 1.0 if end - begin >= self.world_size else self._share(begin, end)

    def length(self, units: int) -> int:
        """Global batches in a whole epoch of `units`."""
        full, tail = divmod(units, self.whole)
        joins = full > 0 and tail < self.least
        return full if self.drop_last or tail == 0 or joins else full + 1

    def _share(self, begin: int, end: int) -> float:
        if self.padded(begin, end):
            return 0.0
        first, last = self.mine(begin, end)
        return self.world_size * (last - first) / (end - begin)


class UnitDealer(Dealer):
    """Deals one unit a worker and step: a batch of the user's making, or a sample as it is.

    Units cannot be joined, so a tail is a step of its own, padded.
    """

    @property
    def least(self) -> int:
        return 1


class GlobalDealer(Dealer):
    """Deals the same global batches to any number of workers.

    Where they do not divide evenly, weights make the mean over ranks the mean
    over the samples. A tail stays a batch of its own, padded if it must be:
    otherwise an epoch's number of steps would depend on the number of workers.
    """

    follows_workers: ClassVar[bool] = False

    @property
    def least(self) -> int:
        return 1

    def weight(self, begin: int, end: int) -> float:
        return self._share(begin, end)


def as_list(items: Any) -> list[Any]:
    """Plain units: an order, or a stretch of one, may be a tensor or a range."""
    return items.tolist() if isinstance(items, torch.Tensor) else list(items)


def own_batch_sampler(loader: DataLoader[Any]) -> bool:
    """Batches are made by an object of the user's, not by cutting what a sampler yields."""
    given = loader.batch_sampler is not None and loader.batch_size is None
    return given and type(loader.batch_sampler) is not BatchSampler


def require_by_index(loader: Any) -> None:
    """Raise `ConfigurationError` unless the loader's data is dealt out by index."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise ConfigurationError(
            "data_mesh= is for map-style data",
            why="each worker reads a stream of its own, whatever mesh it is in",
            remedy="let the dataset itself give ranks of one group the same samples, "
            "or use a map-style dataset",
        )


def require_global_batch_size(size: Any, objects: Iterable[Any], *, world_size: int) -> None:
    """Raise `ConfigurationError` unless every loader of `objects` can be dealt out so."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ConfigurationError(
            f"global_batch_size= takes a number of samples, not {size!r}",
            remedy="pass a positive int, or leave it out: then each loader keeps its batch_size",
        )
    if size < world_size:
        raise ConfigurationError(
            f"global_batch_size={size} cannot feed {world_size} workers",
            why="each worker needs at least one sample a step",
            remedy="use a larger global batch or fewer workers",
        )
    objects = list(objects)
    loaders = [obj for obj in objects if isinstance(obj, DataLoader)]
    # Prepared loaders and Ray Data's iterables: neither modules nor optimizers nor schedulers.
    others = [obj for obj in objects if _is_iterated(obj)]
    if others:
        raise ConfigurationError(
            f"global_batch_size= cannot be kept for a {type(others[0]).__name__}",
            why="it is prepared already, or its batches are not made by this library",
            remedy="pass global_batch_size= in a call with DataLoaders that are not prepared yet",
        )
    if not loaders:
        raise ConfigurationError(
            "global_batch_size= is given, and no DataLoader that is not prepared yet",
            remedy="pass it in the call that prepares the loader",
        )
    for loader in loaders:
        _require_cuttable(loader)


def _is_iterated(obj: Any) -> bool:
    return isinstance(obj, Iterable) and not isinstance(obj, (nn.Module, DataLoader))


def _require_cuttable(loader: DataLoader[Any]) -> None:
    if isinstance(loader.dataset, IterableDataset):
        why, remedy = (
            "each worker reads an iterable dataset for itself, so there is no common batch to cut",
            "divide batch_size by the number of workers where the loader is made",
        )
    elif own_batch_sampler(loader):
        why, remedy = (
            f"its batches are made by a {type(loader.batch_sampler).__name__}",
            "give the loader a sampler instead, or let the batch sampler make batches of the size",
        )
    elif loader.batch_sampler is None:
        why, remedy = (
            "it has batch_size=None: it serves samples, not batches",
            "give it a batch_size",
        )
    else:
        return
    raise ConfigurationError(
        "global_batch_size= cannot be kept for this DataLoader", why=why, remedy=remedy
    )
