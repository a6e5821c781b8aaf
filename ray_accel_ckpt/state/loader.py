"""The prepared `DataLoader`: same batches, resumable anywhere, on any number of workers."""

from __future__ import annotations

import collections
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from ray_accel_ckpt.errors import ConfigurationError, ElasticDataError
from ray_accel_ckpt.state.cursor import Cursor, Dealer, FromSampler, Order, Sequential, Shuffled
from ray_accel_ckpt.state.part import (
    Captured,
    Differences,
    SavedPart,
    Scope,
    captured_tree,
    require,
)
from ray_accel_ckpt.state.rng import OwnStreams, derived_seed
from ray_accel_ckpt.state.seeding import SeededDataset, identity
from ray_accel_ckpt.state.tree import unflatten

logger = logging.getLogger(__name__)

# One count for all loaders of the process: tells which passes were nested in which.
_ticks = itertools.count(1)
_END = object()


def next_tick() -> int:
    """A number later than all before it."""
    return next(_ticks)


class PreparedLoader:
    """Serves one rank's batches of a `DataLoader`; the position is part of the state.

    Everything else (`dataset`, `batch_size`, ...) is the wrapped loader's.
    Iterating draws nothing from the global random streams: the order, the
    loader workers' base seed and each sample's augmentation come from seeds of
    their own. Batches are moved to `device`.

    Args:
        loader: the loader as the user made it.
        seed: what orders and augmentation are drawn from.
        rank, world_size: this worker among those that share the data.
        device: where batches go.

    Raises:
        ConfigurationError: if the dataset has fewer samples than there are workers.
    """

    kind = "loader"

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        name: str,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.name = name
        self.cursor = Cursor(seed=seed)
        self._loader = loader
        self._device = device
        self._world_size = world_size
        self._iterable = isinstance(loader.dataset, IterableDataset)
        self.began = self._over = 0
        self._inner: DataLoader[Any] | None = None
        if self._iterable:
            self._generator = torch.Generator()
            loader.generator = self._generator
            return
        self._order, self._dealer = _order_of(loader, rank=rank, world_size=world_size)
        if self._order.units is not None and self._order.units < world_size:
            raise ConfigurationError(
                f"a dataset of {self._order.units} samples cannot feed {world_size} workers",
                remedy="use fewer workers or more data",
            )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __len__(self) -> int:
        """Batches of a whole epoch, the same on every rank."""
        if self._iterable:
            return len(self._loader)
        units = self._order.units
        if units is None:
            units = len(self._order.draw(self.cursor.seed, self.cursor.epoch))
        return self._dealer.length(units)

    def __iter__(self) -> Iterator[Any]:
        self.cursor.begin()
        return self._pass()

    def skipped(self, num_batches: int) -> Iterator[Any]:
        """The pass that `iter()` would serve, from batch `num_batches` of its epoch on."""
        self.cursor.begin()
        if self._iterable:
            self.cursor.consumed = num_batches
        else:
            order = self._order.draw(self.cursor.seed, self.cursor.epoch)
            ends = [end for _, end in self._dealer.cuts(len(order))][:num_batches]
            self.cursor.consumed = ends[-1] if ends else 0
        return self._pass()

    @property
    def in_flight(self) -> bool:
        """A pass has begun (or was resumed into) and not ended."""
        return (self.cursor.started and not self.cursor.ended) or self.cursor.resumed

    def ended_since(self, tick: int) -> bool:
        """A pass ended after `tick`."""
        return self.cursor.ended and self._over > tick

    def around(self, other: PreparedLoader) -> bool:
        """This loader's pass is under way and began before `other`'s last one ended."""
        return self.in_flight and self.began < other._over

    def _pass(self) -> Iterator[Any]:
        self.began = next_tick()
        batches = self._iterable_batches() if self._iterable else self._map_batches()
        try:
            for consumed, batch in batches:
                self.cursor.consumed = consumed
                yield _moved(batch, self._device)
        finally:
            self.cursor.ended = True
            self._over = next_tick()

    def _map_batches(self) -> Iterator[tuple[int, Any]]:
        cursor = self.cursor
        if cursor.spent:
            cursor.spent = False
            return
        order = self._order.draw(cursor.seed, cursor.epoch)
        cuts = self._dealer.cuts(len(order), cursor.consumed)
        if self._inner is None:
            self._inner = _rebuilt(self._loader, cursor.seed)
        _plan_of(self._inner).begin(cursor.epoch, order, self._dealer, cursor.consumed)
        generator = self._inner.generator
        generator.manual_seed(derived_seed(cursor.seed, cursor.epoch, "workers"))
        for batch in self._inner:
            yield next(cuts)[1], batch

    def _iterable_batches(self) -> Iterator[tuple[int, Any]]:
        cursor = self.cursor
        if cursor.spent:
            cursor.spent = False
            return
        seed = derived_seed(cursor.seed, cursor.epoch, "workers")
        self._generator.manual_seed(seed)
        own = OwnStreams(seed)
        with own.scope():
            batches = iter(self._loader)
        skip = cursor.consumed
        if skip:
            logger.warning(
                "loader %r: reading %d batches again to get back to the position of the "
                "checkpoint, because an iterable dataset cannot be entered in the middle",
                self.name,
                skip,
            )
            with own.scope():
                collections.deque(itertools.islice(batches, skip), maxlen=0)
        for consumed in itertools.count(skip + 1):
            with own.scope():
                batch = next(batches, _END)
            if batch is _END:
                return
            yield consumed, batch

    # --- as a part of the bundle -------------------------------------------------------

    def capture(self, *, replay: bool = False) -> Captured:
        state = self.cursor.state(replay=replay)
        state["units"] = None if self._iterable else self._order.units
        state["world_size"] = self._world_size
        return captured_tree(
            state,
            name=self.name,
            kind=self.kind,
            scope=Scope.PER_RANK if self._iterable else Scope.RANK_ZERO,
            per_rank=self._iterable,
        )

    def compare(self, saved: SavedPart, differences: Differences) -> None:
        state = unflatten(saved.value, {})
        state = state if isinstance(state, dict) else {}
        units = None if self._iterable else self._order.units
        if state.get("units") != units:
            differences.differing.append(
                f"{self.name} (checkpoint: {state.get('units')} samples, dataset: {units})"
            )
        if self._iterable and state.get("world_size") != self._world_size:
            raise ElasticDataError(
                f"loader {self.name!r} cannot go on with {self._world_size} workers",
                why=f"its position was saved by {state.get('world_size')}, and an iterable "
                "dataset has no global order to deal out anew",
                remedy="use a map-style dataset, or load_state(parts=...) without the loader",
            )

    def targets(self, saved: SavedPart) -> Mapping[str, torch.Tensor]:
        return {}

    def templates(self, saved: SavedPart) -> Mapping[str, torch.Tensor]:
        return {}

    def check(self, state: Any) -> None:
        wanted = {*self.cursor.state(replay=False), "units", "world_size"}
        known = isinstance(state, dict) and set(state) == wanted
        counts = known and all(
            type(state[n]) is int for n in ("seed", "epoch", "consumed", "world_size")
        )
        sound = counts and state["consumed"] >= 0 and state["epoch"] >= 0
        require(sound, self.name, "expected a position in the data")

    def apply(self, state: Any) -> None:
        self.cursor.load(state)
        if state["world_size"] != self._world_size:
            logger.warning(
                "loader %r goes on with %d workers instead of %d: each keeps its batch size, so "
                "a step now takes %s samples over all workers",
                self.name,
                self._world_size,
                state["world_size"],
                self._dealer.batch_size * self._world_size,
            )
        # Persistent loader workers hold a copy of the dataset with the seed of before.
        self._inner = None


class _Plan:
    """The batches of one pass, as keys (epoch, index) that `SeededDataset` understands."""

    def __init__(self, batched: bool) -> None:
        self._batched = batched
        self._epoch = self._start = 0
        self._order: Any = ()
        self._dealer: Dealer | None = None

    def begin(self, epoch: int, order: Any, dealer: Dealer, start: int) -> None:
        self._epoch, self._order, self._dealer, self._start = epoch, order, dealer, start

    def __iter__(self) -> Iterator[Any]:
        if self._dealer is None:
            return
        for cut in self._dealer.cuts(len(self._order), self._start):
            begin, end = self._dealer.mine(*cut)
            keys = [(self._epoch, index) for index in _flat(self._order[begin:end])]
            yield keys if self._batched else keys[0]


def _flat(batch: Any) -> Iterator[Any]:
    """Indices of a slice of an order; of a batch sampler's, each item is a list of them."""
    for item in batch.tolist() if isinstance(batch, torch.Tensor) else batch:
        if isinstance(item, (list, tuple)):
            yield from item
        else:
            yield item


def _plan_of(loader: DataLoader[Any]) -> _Plan:
    plan = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    assert isinstance(plan, _Plan)  # noqa: S101 - narrows the type
    return plan


def _order_of(loader: DataLoader[Any], *, rank: int, world_size: int) -> tuple[Order, Dealer]:
    size = len(loader.dataset)  # type: ignore[arg-type]
    batch_sampler, sampler = loader.batch_sampler, loader.sampler
    if batch_sampler is not None and type(batch_sampler) is not BatchSampler:
        dealer = Dealer(rank=rank, world_size=world_size, batch_size=1, drop_last=False)
        return FromSampler(batch_sampler), dealer
    dealer = Dealer(
        rank=rank,
        world_size=world_size,
        batch_size=loader.batch_size or 1,
        drop_last=loader.drop_last,
    )
    if type(sampler) is SequentialSampler:
        return Sequential(size), dealer
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == size:
        return Shuffled(size), dealer
    if type(sampler) is DistributedSampler:
        return (Shuffled(size) if sampler.shuffle else Sequential(size)), dealer
    return FromSampler(sampler), dealer


def _rebuilt(loader: DataLoader[Any], seed: int) -> DataLoader[Any]:
    batched = loader.batch_sampler is not None
    options: dict[str, Any] = {
        "batch_sampler" if batched else "sampler": _Plan(batched),
        "batch_size": 1 if batched else None,
    }
    collate: Callable[[Any], Any] = loader.collate_fn
    return DataLoader(
        SeededDataset(loader.dataset, collate, seed=seed, in_worker=loader.num_workers > 0),
        **options,
        collate_fn=identity,
        generator=torch.Generator(),
        **worker_options(loader),
    )


def worker_options(loader: DataLoader[Any]) -> dict[str, Any]:
    """How a loader's processes are run, to make another one that runs them the same."""
    return {
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
        "in_order": loader.in_order,
    }


def _moved(batch: Any, device: torch.device) -> Any:
    if device.type == "cpu":
        return batch
    return _pytree.tree_map_only(torch.Tensor, lambda t: t.to(device, non_blocking=True), batch)
