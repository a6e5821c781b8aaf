"""Map-style data behind a loader of 🤗 Accelerate, and how Accelerate deals it out.

Nothing of Accelerate is imported: its classes are known by their attributes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.state.dealing import Dealer, as_list
from ray_accel_ckpt.state.indexed import IndexedSource, worker_options


@dataclass(frozen=True, kw_only=True)
class ShardDealer(Dealer):
    """Deals as Accelerate's `BatchSamplerShard` does.

    A tail that does not fill a global batch is completed from the beginning of the
    epoch's order if the shard says `even_batches`, as often as needed. Otherwise ranks
    get what there is, and the last ones may get nothing.

    Attributes:
        shard: the `BatchSamplerShard`; None if nothing is dealt out.
    """

    shard: Any

    def cuts(self, units: int, start: int = 0) -> Iterator[tuple[int, int]]:
        for begin in range(start, units, self.whole):
            end = min(begin + self.whole, units)
            if end - begin == self.whole or not (self.drop_last or self._left_out(begin, end)):
                yield begin, end

    def deal(self, order: Any, begin: int, end: int) -> list[Any]:
        units = len(order)
        first = begin + self.rank * self._each
        own = as_list(order[first : min(first + self._each, units)])
        if len(own) == self._each or not self._even:
            return own
        listed = as_list(order)
        return [listed[i if i < units else (i - units) % units] for i in self._range(first)]

    def copies(self, begin: int, end: int) -> int:
        # What completes a batch is a sample like others to Accelerate: it counts.
        return 0

    def length(self, units: int) -> int:
        return sum(1 for _ in self.cuts(units))

    @property
    def _each(self) -> int:
        return self.whole // self.world_size

    @property
    def _even(self) -> bool:
        # Asked each time: `join_uneven_inputs` changes it for a while.
        return self.shard is not None and bool(self.shard.even_batches)

    def _range(self, first: int) -> range:
        return range(first, first + self._each)

    def _left_out(self, begin: int, end: int) -> bool:
        return not self._even and self.rank * self._each >= end - begin


class SplitDealer(ShardDealer):
    """With `split_batches` a global batch is the loader's own, however many workers there are."""

    follows_workers: ClassVar[bool] = False


def by_index(base: Any, name: str) -> tuple[IndexedSource, ShardDealer, int | None]:
    """The source of map-style data behind a loader, its dealer, and its sampler's own seed."""
    nested = isinstance(base.sampler, BatchSampler)
    holder = base.sampler if nested else base.batch_sampler
    shard = holder if hasattr(holder, "num_processes") else None
    whole = holder if shard is None else shard.batch_sampler
    # Otherwise the units of the order are batches, of somebody else's making.
    cut = type(whole) is BatchSampler and not nested
    split = shard is not None and bool(shard.split_batches)
    if split and not cut:
        raise ConfigurationError(
            f"split_batches cannot be kept for the batches of a {type(whole).__name__}",
            why="only batches that are cut from a sampler's order can be split at a known place",
            remedy="give the DataLoader sampler= and batch_size=, or leave split_batches out",
        )
    world_size = 1 if shard is None else shard.num_processes
    options: dict[str, Any] = {}
    if cut:
        again = BatchSampler(_without_seed(whole.sampler), whole.batch_size, whole.drop_last)
        options = {"batch_sampler": again}
    elif nested:
        options = {"sampler": whole, "batch_size": None}
    elif whole is not None:
        options = {"batch_sampler": whole}
    else:
        options = {"sampler": base.sampler, "batch_size": None}
    size = whole.batch_size if cut else 1
    dealer = (SplitDealer if split else ShardDealer)(
        rank=0 if shard is None else shard.process_index,
        world_size=world_size,
        whole=size if split else size * world_size,
        drop_last=cut and whole.drop_last,
        shard=shard,
    )
    source = IndexedSource(
        DataLoader(base.dataset, **options, collate_fn=base.collate_fn, **worker_options(base)),
        name=name,
        rank=dealer.rank,
        world_size=world_size,
        dealer=dealer,
    )
    return source, dealer, getattr(whole.sampler, "initial_seed", None) if cut else None


def _without_seed(sampler: Any) -> Any:
    """A `SeedableRandomSampler` is a random one whose seed the loader's position carries."""
    if isinstance(sampler, RandomSampler) and hasattr(sampler, "initial_seed"):
        return RandomSampler(
            sampler.data_source,
            replacement=sampler.replacement,
            num_samples=sampler._num_samples,
        )
    return sampler
