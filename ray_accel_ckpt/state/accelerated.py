"""What 🤗 Accelerate's prepared loaders serve, made resumable behind their own interface.

Accelerate's loader goes on doing what it does: it looks one batch ahead to know the
last one, tells the accelerator where it is, moves and dispatches batches. Only what it
reads from is replaced, by a source of ours. Nothing of Accelerate is imported: its
classes are known by their attributes.
"""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import IterableDataset

from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.state.cursor import Cursor
from ray_accel_ckpt.state.entrances import has_state
from ray_accel_ckpt.state.indexed import IndexedSource
from ray_accel_ckpt.state.loader import PreparedLoader
from ray_accel_ckpt.state.part import Differences
from ray_accel_ckpt.state.shards import ShardDealer, by_index
from ray_accel_ckpt.state.source import Served
from ray_accel_ckpt.state.streams import StreamSource
from ray_accel_ckpt.state.tree import Json


def adopt_loader(
    loader: Any,
    *,
    name: str,
    seed: int,
    rank: int,
    world_size: int,
    agree: Callable[[int], int],
) -> tuple[PreparedLoader, Callable[[], None]]:
    """A resumable loader behind an Accelerate loader, and what puts it there.

    Nothing is changed until then. The loader stays what it is; iterating it iterates the
    resumable one.

    Args:
        loader: a `DataLoaderShard` or a `DataLoaderDispatcher`.
        seed: what orders and augmentation are drawn from, unless the loader's
            sampler has a seed of its own (`use_seedable_sampler`).
        rank, world_size: of this process among all.
        agree: gives rank 0's number to all. Called once for map-style data.

    Raises:
        ConfigurationError: it is no such loader, or its position cannot be counted.
    """
    if not hasattr(loader, "base_dataloader") or not hasattr(loader, "skip_batches"):
        raise ConfigurationError(
            f"the accelerator holds a {type(loader).__name__}, whose position cannot be read",
            why="only DataLoaderShard and DataLoaderDispatcher are known",
            remedy="prepare the DataLoader itself with this accelerator; TPU loaders "
            "(MpDeviceLoader) cannot be adopted",
        )
    if hasattr(loader, "slice_fn"):
        # One process reads for all.
        rank, world_size = 0, 1
    source: IndexedSource | StreamSource
    dealer = None
    if isinstance(loader.base_dataloader.dataset, IterableDataset):
        source = StreamSource(loader.base_dataloader, name=name, rank=rank, world_size=world_size)
    else:
        source, dealer, own = by_index(loader.base_dataloader, name)
        seed = agree(seed if own is None else own)
        # Ranks that are to get the same batches are dealt to as one.
        rank, world_size = dealer.rank, dealer.world_size
    followed = _Followed(loader, source, dealer)
    prepared = PreparedLoader(
        loader,
        name=name,
        seed=seed,
        rank=rank,
        world_size=world_size,
        # Accelerate has moved the batches to wherever they are to be.
        device=torch.device("cpu"),
        source=followed,
    )
    return prepared, partial(followed.install, prepared)


class _Followed:
    """A source behind an Accelerate loader, and how far the loop has come in front of it.

    The loader reads ahead. So what has been read is noted with each batch, and counts
    when the loop is handed what it became part of.
    """

    def __init__(
        self,
        loader: Any,
        source: IndexedSource | StreamSource,
        dealer: ShardDealer | None,
    ) -> None:
        self.members = source.members
        self._dealer = dealer
        dispatcher = hasattr(loader, "slice_fn")
        # What one process reads for all, all are at the same place of.
        self.per_rank = source.per_rank and not dispatcher
        self._loader, self._source = loader, source
        self._serve = type(loader).__iter__
        self._base = _Base(loader.base_dataloader)
        processes = loader.state.num_processes if dispatcher else 1
        self._reads = not dispatcher or loader.state.process_index == 0
        whole_batches = dispatcher and (loader.split_batches or loader.submesh_tp)
        self._reads_a_step = 1 if whole_batches else processes
        # A dispatcher completes the last batch with samples of the first that it has seen,
        # and fails if it sees none. So it is shown the epoch's first when it enters inside.
        self._needs_first = dispatcher
        self._after: tuple[tuple[int, int], dict[str, Any]] | None = None

    def install(self, prepared: PreparedLoader) -> None:
        """Let the loader read from here, and ``iter(loader)`` be that of `prepared`."""
        self._loader.base_dataloader = self._base
        kind = type(self._loader)
        followed = type(kind.__name__, (kind,), {"__iter__": lambda _: iter(prepared)})
        # Assigning to `__class__` would reach the property by which it claims to be another.
        object.__dict__["__class__"].__set__(self._loader, followed)

    @property
    def units(self) -> int | None:
        return self._source.units

    def length(self, cursor: Cursor) -> int:
        return self._source.length(cursor)

    def position(self, cursor: Cursor, num_batches: int) -> int:
        return self._source.position(cursor, num_batches)

    def batches(self, cursor: Cursor) -> Iterator[Served]:
        loader, iteration = self._loader, self._loader.iteration
        noted: deque[tuple[int, Any]] = deque()
        self._base.batches = this = self._read(replace(cursor), noted)
        tail = self._odd_tail(cursor)
        try:
            with self._entering(inside=cursor.consumed > 0):
                for batch in self._serve(loader):
                    if tail is not None:
                        loader.remainder = tail
                    yield Served(batch=batch, consumed=self._consumed(cursor, noted))
        finally:
            # Accelerate takes a loader that was left by `break` for the active one ever after:
            # whether training is at its last batch would hang on what this process once left.
            if self._base.batches is this:
                loader.end()
        # Accelerate does not count a pass in which nothing was left.
        loader.iteration = iteration + 1

    def state(self, position: Mapping[str, Any]) -> dict[str, Any]:
        at = position["epoch"], position["consumed"]
        inside = position["started"] and not position["spent"]
        if inside and self._after is not None and self._after[0] == at:
            return self._after[1]
        return self._source.state(position)

    def compare(self, saved: Mapping[str, Json], differences: Differences) -> None:
        self._source.compare(saved, differences)

    def understands(self, state: Mapping[str, Any]) -> bool:
        return self._source.understands(state)

    def apply(self, state: Mapping[str, Any]) -> None:
        self._after = None
        self._source.apply(state)

    def dealt_anew(self, saved: Sequence[Json]) -> Json:
        return self._source.dealt_anew(saved)

    def _odd_tail(self, cursor: Cursor) -> int | None:
        """Samples in the last step of a pass that is entered between two steps of so many
        workers, as others left it. Accelerate counts steps from the beginning of an epoch."""
        source, dealer = self._source, self._dealer
        if dealer is None or isinstance(source, StreamSource) or source.unit != "sample":
            return None
        return source.left(cursor) % dealer.whole if cursor.consumed % dealer.whole else None

    def _read(self, cursor: Cursor, noted: deque[tuple[int, Any]]) -> Iterator[Any]:
        """What the loader reads: batches from the cursor on, each noted."""
        if self._needs_first and cursor.consumed:
            yield from self._first(cursor)
        for served in self._source.batches(cursor):
            state = None
            if isinstance(self._source, StreamSource):
                position = {"epoch": cursor.epoch, "consumed": served.consumed}
                state = self._source.state({**position, "started": True, "spent": False})
            # A copy: the dataset goes on before the loop does.
            noted.append((served.consumed, copy.deepcopy(state)))
            yield served.batch

    def _first(self, cursor: Cursor) -> Iterator[Any]:
        """The batches of the pass's first step. The dataset is left as it was."""
        dataset = self._loader.dataset
        stateful = isinstance(self._source, StreamSource) and has_state(dataset)
        before = copy.deepcopy(dataset.state_dict()) if stateful else None
        batches = self._source.batches(replace(cursor, consumed=0))
        for served in itertools.islice(batches, self._reads_a_step):
            yield served.batch
        del batches
        if stateful:
            dataset.load_state_dict(before)

    def _consumed(self, cursor: Cursor, noted: deque[tuple[int, Any]]) -> int:
        if not self._reads:
            # Told by the one that reads, when a state is loaded.
            return cursor.consumed + 1
        for _ in range(min(self._reads_a_step, len(noted))):
            consumed, state = noted.popleft()
        self._after = None if state is None else ((cursor.epoch, consumed), state)
        return consumed

    @contextmanager
    def _entering(self, *, inside: bool) -> Iterator[None]:
        """Begin a pass; one that is entered inside, without what was done at its beginning."""
        loader = self._loader
        changed: dict[str, Any] = {"skip_batches": int(self._needs_first)} if inside else {}
        if inside and hasattr(loader, "rng_types"):
            # The streams were synchronized then, and are as they had become since.
            changed["rng_types"] = None
        before = {name: getattr(loader, name) for name in changed}
        vars(loader).update(changed)
        try:
            yield
        finally:
            vars(loader).update(before)


class _Base:
    """Stands where a loader keeps the `DataLoader` that it reads from: the same but for batches."""

    def __init__(self, of: Any) -> None:
        self._of = of
        self.batches: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.batches

    def __len__(self) -> int:
        return len(self._of)

    def __getattr__(self, name: str) -> Any:
        # Without a state: Accelerate would take it before each batch, and nobody reads it.
        if name.startswith("_") or name in ("state_dict", "load_state_dict"):
            raise AttributeError(name)
        return getattr(self._of, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # Accelerate's loaders claim to be of the class of what they read from.
        return type(self._of)
