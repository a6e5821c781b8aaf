"""How one order is dealt out to the workers, and what each worker's loss then counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

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

    def padded(self, begin: int, end: int) -> bool:
        """Nothing is left for this rank: what it is handed is a copy and must not count."""
        return self.rank >= end - begin

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


def own_batch_sampler(loader: DataLoader[Any]) -> bool:
    """Batches are made by an object of the user's, not by cutting what a sampler yields."""
    given = loader.batch_sampler is not None and loader.batch_size is None
    return given and type(loader.batch_sampler) is not BatchSampler


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
    loaders = [obj for obj in objects if isinstance(obj, DataLoader)]
    if not loaders:
        raise ConfigurationError(
            "global_batch_size= is given, and no DataLoader that is not prepared yet",
            remedy="pass it in the call that prepares the loader",
        )
    for loader in loaders:
        _require_cuttable(loader)


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
