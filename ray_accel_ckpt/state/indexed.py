"""Map-style data: one global order, dealt out by index. What is skipped is never read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader

from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.state.cursor import Cursor
from ray_accel_ckpt.state.dealing import Dealer, GlobalDealer, UnitDealer, own_batch_sampler
from ray_accel_ckpt.state.orders import order_of
from ray_accel_ckpt.state.part import Differences
from ray_accel_ckpt.state.rng import derived_seed
from ray_accel_ckpt.state.seeding import InWorker, SeededDataset, identity
from ray_accel_ckpt.state.source import Served, require_in_order, require_plain
from ray_accel_ckpt.state.tree import Json

logger = logging.getLogger(__name__)


class IndexedSource:
    """Deals the order of each epoch out to the ranks.

    Args:
        name: of the loader, for messages.
        global_batch_size: samples of one batch over all workers, or None: as
            many as the loader's own batch size gives to so many workers.
        dealer: deals the order out instead, for so many workers.

    Raises:
        ConfigurationError: the dataset has fewer samples than there are workers,
            loader workers do not keep the order, or the loader has an `__iter__` of its own.
    """

    per_rank = False
    members = frozenset({"unit", "sampler"})

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        name: str,
        rank: int,
        world_size: int,
        global_batch_size: int | None = None,
        dealer: Dealer | None = None,
    ) -> None:
        require_in_order(loader, name)
        require_plain(loader, name)
        self._loader = loader
        self._name = name
        self._order = order_of(loader)
        self.unit = "batch" if own_batch_sampler(loader) else "sample"
        self._dealer = dealer or _dealer_of(loader, rank, world_size, global_batch_size)
        self._inner: DataLoader[Any] | None = None
        self._told_of_padding = False
        if self.units is not None and self.units < world_size:
            raise ConfigurationError(
                f"a dataset of {self.units} samples cannot feed {world_size} workers",
                remedy="use fewer workers or more data",
            )

    @property
    def units(self) -> int | None:
        return self._order.units

    def length(self, cursor: Cursor) -> int:
        return self._dealer.length(self._order.count(cursor.seed, cursor.epoch))

    def left(self, cursor: Cursor) -> int:
        """Units of the cursor's pass that are still to come."""
        return self._order.count(cursor.seed, cursor.epoch) - cursor.consumed

    def position(self, cursor: Cursor, num_batches: int) -> int:
        units = len(self._order.draw(cursor.seed, cursor.epoch))
        ends = [end for _, end in self._dealer.cuts(units)][:num_batches]
        return ends[-1] if ends else 0

    def batches(self, cursor: Cursor) -> Iterator[Served]:
        order = self._order.draw(cursor.seed, cursor.epoch)
        if cursor.consumed:
            self._tell_of_listing(len(order))
        if self._inner is None:
            self._inner = _rebuilt(self._loader, cursor.seed)
        _plan_of(self._inner).begin(cursor.epoch, order, self._dealer, cursor.consumed)
        generator = self._inner.generator
        generator.manual_seed(derived_seed(cursor.seed, cursor.epoch, "workers"))
        cuts = self._dealer.cuts(len(order), cursor.consumed)
        # Its base seed is drawn on the default device, and the generator is one of the host.
        with torch.device("cpu"):
            inner = iter(self._inner)
        for batch, (begin, end) in zip(inner, cuts, strict=True):
            self._tell_of_padding(begin, end)
            yield Served(
                batch=batch,
                consumed=end,
                weight=self._dealer.weight(begin, end),
                padding=self._dealer.padded(begin, end),
            )

    def state(self, position: Mapping[str, Any]) -> dict[str, Any]:
        del position
        sampler = {"sampler": self._order.state()} if self._order.stateful else {}
        return {"unit": self.unit, **sampler}

    def compare(self, saved: Mapping[str, Json], differences: Differences) -> None:
        if "rows" in saved or "loader_workers" in saved:
            differences.differing.append(f"{self._name} (checkpoint: iterable, dataset: by index)")
        elif saved.get("unit", self.unit) != self.unit:
            differences.differing.append(
                f"{self._name} (checkpoint: counted in units of a {saved['unit']}, "
                f"loader: of a {self.unit})"
            )
        elif saved.get("units") != self.units:
            differences.differing.append(
                f"{self._name} (checkpoint: {saved.get('units')} samples, dataset: {self.units})"
            )
        elif "sampler" in saved and not self._order.alike(saved["sampler"]):
            differences.differing.append(
                f"{self._name} (checkpoint: the state of another sampler than the loader's)"
            )

    def understands(self, state: Mapping[str, Any]) -> bool:
        known = state.get("unit", self.unit) == self.unit
        return known and ("sampler" not in state or self._order.understands(state["sampler"]))

    def apply(self, state: Mapping[str, Any]) -> None:
        workers, before = self._dealer.world_size, state["world_size"]
        if workers != before and self._dealer.follows_workers:
            logger.warning(
                "loader %r goes on with %d workers instead of %d: each keeps its batch size, so "
                "a step now takes %d samples over all workers; prepare(..., global_batch_size=) "
                "keeps that number",
                self._name,
                workers,
                before,
                self._dealer.whole,
            )
        self._order.load(state.get("sampler"), state["seed"])
        # Persistent loader workers hold a copy of the dataset with the seed of before.
        self._inner = None

    def dealt_anew(self, saved: Sequence[Json]) -> Json:
        """Nothing has to be dealt anew: a position in the order means the same to all."""
        return saved[0]

    def _tell_of_padding(self, begin: int, end: int) -> None:
        copies = self._dealer.copies(begin, end)
        if copies and not self._told_of_padding and self._dealer.rank == 0:
            self._told_of_padding = True
            logger.warning(
                "loader %r: %d %ss are left for %d workers, so %d of them are handed a copy "
                "of one that another has; its loss counts nothing "
                "(backward() and loss_weight see to that)",
                self._name,
                end - begin,
                self.unit,
                self._dealer.world_size,
                copies,
            )

    def _tell_of_listing(self, indices: int) -> None:
        if self._order.units is None:
            logger.info(
                "loader %r: the %d indices of its sampler were listed to go on in the middle of "
                "them; no sample is read for it",
                self._name,
                indices,
            )


class _Plan:
    """The batches of one pass, as keys (epoch, index) that `SeededDataset` understands.

    Args:
        batched: whether the loader puts samples together to batches.
        nested: whether each item of the order is a batch itself.
    """

    def __init__(self, *, batched: bool, nested: bool) -> None:
        self._batched, self._nested = batched, nested
        self._epoch = self._start = 0
        self._order: Any = ()
        self._dealer: Dealer | None = None

    def begin(self, epoch: int, order: Any, dealer: Dealer, start: int) -> None:
        self._epoch, self._order, self._dealer, self._start = epoch, order, dealer, start

    def __iter__(self) -> Iterator[Any]:
        if self._dealer is None:
            return
        for cut in self._dealer.cuts(len(self._order), self._start):
            items = self._dealer.deal(self._order, *cut)
            if self._nested:
                items = [index for item in items for index in item]
            keys = [(self._epoch, index) for index in items]
            yield keys if self._batched else keys[0]


def _plan_of(loader: DataLoader[Any]) -> _Plan:
    plan = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    assert isinstance(plan, _Plan)  # noqa: S101 - narrows the type
    return plan


def _dealer_of(
    loader: DataLoader[Any], rank: int, world_size: int, global_batch_size: int | None
) -> Dealer:
    batches = loader.batch_sampler
    size, drop_last = 1, False
    if isinstance(batches, BatchSampler) and not own_batch_sampler(loader):
        size, drop_last = batches.batch_size, batches.drop_last
    if global_batch_size is not None:
        return GlobalDealer(
            rank=rank, world_size=world_size, whole=global_batch_size, drop_last=drop_last
        )
    units = batches is None or own_batch_sampler(loader)
    kind = UnitDealer if units else Dealer
    return kind(rank=rank, world_size=world_size, whole=size * world_size, drop_last=drop_last)


def _rebuilt(loader: DataLoader[Any], seed: int) -> DataLoader[Any]:
    batched = loader.batch_sampler is not None
    plan = _Plan(batched=batched, nested=own_batch_sampler(loader))
    options: dict[str, Any] = {
        "batch_sampler" if batched else "sampler": plan,
        "batch_size": 1 if batched else None,
    }
    collate: Callable[[Any], Any] = loader.collate_fn
    return DataLoader(
        SeededDataset(loader.dataset, collate, seed=seed, in_worker=loader.num_workers > 0),
        **options,
        collate_fn=identity,
        generator=torch.Generator(),
        **{**worker_options(loader), "worker_init_fn": InWorker(loader.worker_init_fn)},
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
