"""The prepared loader: same batches, resumable anywhere, on any number of workers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils.data import DataLoader, IterableDataset

from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.state.cursor import Cursor
from ray_accel_ckpt.state.indexed import IndexedSource
from ray_accel_ckpt.state.part import (
    Captured,
    Differences,
    SavedPart,
    Scope,
    captured_tree,
    require,
)
from ray_accel_ckpt.state.rows import RowSource
from ray_accel_ckpt.state.source import Source
from ray_accel_ckpt.state.streams import StreamSource
from ray_accel_ckpt.state.tree import Json, encoded_items

# One count for all loaders of the process: tells which passes were nested in which.
_ticks = itertools.count(1)


def next_tick() -> int:
    """A number later than all before it."""
    return next(_ticks)


class PreparedLoader:
    """Serves one rank's batches of a `DataLoader` or of an iterable of batches that
    starts anew each time; the position is part of the state.

    Everything else (`dataset`, `batch_size`, ...) is the wrapped loader's.
    Iterating draws nothing from the global random streams: the order, the
    loader workers' base seed and each sample's augmentation come from seeds of
    their own. Batches are moved to `device`: their tensors, and whatever in them
    has a `to` method.

    Args:
        loader: as the user made it.
        seed: what orders and augmentation are drawn from.
        rank, world_size: this worker among those that share the data.
        device: where batches go.
        global_batch_size: samples of a batch over all workers. None: each
            worker keeps the loader's own batch size.
        source: where batches come from. None: what the loader's data calls for.

    Attributes:
        loss_weight: what the loss of the latest batch counts in the mean over ranks.
        padding: the latest batch is a copy of what another worker has.
        began, handed_out, over: ticks at which the latest pass began, handed out a batch,
            and ended.
        trains: steps have been counted in its passes, or it was loaded inside of one.
        empty: the latest pass had ended before the state was saved that was loaded.
        left: the loop went out of the latest pass before its end: by `break`, or by an
            exception.

    Raises:
        ConfigurationError: if the dataset has fewer samples than there are
            workers, the sampler deals out to ranks itself, loader workers do not
            keep the order, or the loader has an `__iter__` of its own.
    """

    kind = "loader"

    def __init__(
        self,
        loader: DataLoader[Any] | Iterable[Any],
        *,
        name: str,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device,
        global_batch_size: int | None = None,
        source: Source | None = None,
    ) -> None:
        self.name = name
        self.cursor = Cursor(seed=seed)
        self.loss_weight, self.padding = 1.0, False
        self.began = self.handed_out = self.over = self._passes = self._loaded_at = 0
        self.left = self.empty = self.trains = False
        self._loaded: dict[str, Any] = {}
        self._loader = loader
        self._device = device
        self._world_size = world_size
        self._source: Source
        if source is not None:
            self._source = source
        elif not isinstance(loader, DataLoader):
            self._source = RowSource(loader, name=name, world_size=world_size)
        elif isinstance(loader.dataset, IterableDataset):
            self._source = StreamSource(loader, name=name, rank=rank, world_size=world_size)
        else:
            self._source = IndexedSource(
                loader,
                name=name,
                rank=rank,
                world_size=world_size,
                global_batch_size=global_batch_size,
            )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __len__(self) -> int:
        """Batches of a whole epoch; for map-style data the same on every rank."""
        return self._source.length(self.cursor)

    def __iter__(self) -> Iterator[Any]:
        self.cursor.begin()
        return self._pass()

    def skipped(self, num_batches: int) -> Iterator[Any]:
        """The pass that `iter()` would serve, from batch `num_batches` of its epoch on."""
        self.cursor.begin()
        self.cursor.consumed = self._source.position(self.cursor, num_batches)
        return self._pass()

    def reenter(self) -> None:
        """The next pass is the one that was loaded, whatever was looked at since."""
        self.cursor.load(self._loaded)

    def in_flight(self, since: int = 0) -> bool:
        """A pass has begun after `since` (or was resumed into) and not ended."""
        return self.under_way(since) or self.cursor.resumed

    def under_way(self, since: int = 0) -> bool:
        """A pass has begun after `since` in this process and not ended."""
        cursor = self.cursor
        return cursor.started and not (cursor.ended or cursor.resumed) and self.began >= since

    def ended_since(self, tick: int) -> bool:
        """A pass ended after `tick`."""
        return self.cursor.ended and self.over > tick

    def around(self, other: PreparedLoader, since: int) -> bool:
        """This loader's pass, begun after `since`, is under way around `other`'s last one."""
        return self.in_flight(since) and self.began < other.over

    def _pass(self) -> Iterator[Any]:
        self._passes += 1
        self.began, self.left, self.empty = next_tick(), False, self.cursor.spent
        return self._batches(self._passes)

    def _batches(self, this: int) -> Iterator[Any]:
        try:
            if self._goes_on(this) and not self.cursor.spent:
                for served in self._source.batches(self.cursor):
                    self.cursor.consumed = served.consumed
                    self.loss_weight, self.padding = served.weight, served.padding
                    self.handed_out = next_tick()
                    yield _moved(served.batch, self._device)
                    if not self._goes_on(this):
                        break
        except GeneratorExit:
            self._end(this)
            # Whether by an exception cannot be seen in here: see `EpochWatch.as_left`.
            self.left = this == self._passes
            raise
        # Not after an error: what is left of the pass is still to come.
        self._end(this)

    def _end(self, this: int) -> None:
        # An iterator that is dropped when the next pass has begun ends nothing any more.
        if this == self._passes:
            self.cursor.spent, self.cursor.ended = False, True
            self.over = next_tick()

    def _goes_on(self, this: int) -> bool:
        """Whether a pass has more to serve: after a load the next one goes on from its position.

        Raises:
            ConfigurationError: a loader stands at one place, and another pass has moved it.
        """
        if this < self._loaded_at:
            return False
        if this != self._passes:
            raise another_has_begun(self.name)
        return True

    # --- as a part of the bundle -------------------------------------------------------

    def capture(self, *, replay: bool = False) -> Captured:
        position = self.cursor.state(replay=replay)
        more = {"units": self._source.units, "world_size": self._world_size}
        return captured_tree(
            {**position, **more, **self._source.state(position)},
            name=self.name,
            kind=self.kind,
            scope=Scope.PER_RANK if self._source.per_rank else Scope.RANK_ZERO,
            per_rank=self._source.per_rank,
        )

    def compare(self, saved: SavedPart, differences: Differences) -> None:
        self._source.compare(encoded_items(saved.value), differences)

    def targets(self, saved: SavedPart) -> Mapping[str, torch.Tensor]:
        return {}

    def templates(self, saved: SavedPart) -> Mapping[str, torch.Tensor]:
        return {}

    def check(self, state: Any) -> None:
        wanted = {*self.cursor.state(replay=False), "units", "world_size"}
        known = isinstance(state, dict) and wanted <= set(state) <= wanted | self._source.members
        counts = known and all(
            type(state[n]) is int and 0 <= state[n] < 2**63
            for n in ("epoch", "consumed", "world_size")
        )
        sound = counts and type(state["seed"]) is int and -(2**63) <= state["seed"] < 2**64
        require(
            sound and self._source.understands(state), self.name, "expected a position in the data"
        )

    def apply(self, state: Any) -> None:
        self.cursor.load(state)
        self._loaded = state
        self.trains |= self.cursor.started and not self.cursor.spent
        self.loss_weight, self.padding = 1.0, False
        # What passes of before were doing is over, iterators that somebody still holds too.
        self.began = self.handed_out = self.over = 0
        self.left = False
        self._passes += 1
        self._loaded_at = self._passes
        self._source.apply(state)

    def dealt_anew(self, saved: Sequence[Json]) -> SavedPart:
        """What this rank loads of what another number of ranks has saved: one value a rank.

        Raises:
            ElasticDataError: the data cannot be dealt out to another number of workers.
        """
        return SavedPart(kind=self.kind, value=self._source.dealt_anew(saved), tensors={})


def another_has_begun(name: str) -> ConfigurationError:
    """What a pass that another over the same loader has replaced raises when it is gone on with."""
    return ConfigurationError(
        f"a pass over loader {name!r} is gone on with after another has begun",
        why="iter() was called on the loader while this pass was under way; which samples "
        "it had handed out is no longer known",
        remedy="prepare a second DataLoader of the same dataset for what looks at batches "
        "beside the loop (next(iter(loader)), zip(loader, loader), an evaluation on the "
        "training data)",
    )


def _moved(batch: Any, device: torch.device) -> Any:
    if device.type == "cpu":
        return batch
    return _pytree.tree_map(partial(_leaf_moved, device=device), batch, is_leaf=_moves)


def _moves(value: Any) -> bool:
    """A tensor, or what moves its tensors itself: a `BatchEncoding`, a packed sequence, a graph."""
    return callable(getattr(value, "to", None))


def _leaf_moved(leaf: Any, device: torch.device) -> Any:
    if not _moves(leaf):
        return leaf
    try:
        return leaf.to(device, non_blocking=True)
    except TypeError:
        # Not all that move know how to without waiting.
        return leaf.to(device)
