"""The position in the data, counted in samples of one global order.

An epoch has one order of all samples, drawn from (seed, epoch) and the same on
every rank. The workers together take it from the front, one global batch a
step, so that what has been consumed after any step is a prefix of the order.
A position is therefore one number, and means the same to any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ray_accel_ckpt.errors import ConfigurationError, ElasticDataError
from ray_accel_ckpt.state.rng import derived_seed, seed_host, untouched


@dataclass(kw_only=True)
class Cursor:
    """Where one loader stands.

    Attributes:
        seed: what the orders are drawn from.
        epoch: passes over the data begun before this one.
        consumed: samples of this epoch's order (batches, for a user's batch
            sampler) that all workers together have been handed.
        ended: this pass is over; the next one begins with the next `iter()`.
        resumed: the next `iter()` goes on with this pass instead of beginning one.
        spent: the pass resumed into had ended: it is gone through once more, empty.
    """

    seed: int
    epoch: int = 0
    consumed: int = 0
    ended: bool = False
    resumed: bool = False
    started: bool = False
    spent: bool = False

    def begin(self) -> None:
        """Called by every `iter()`: go on if resumed, else begin the next pass."""
        if self.started and not self.resumed:
            self.epoch, self.consumed = self.epoch + 1, 0
        self.started, self.resumed, self.ended = True, False, False

    def state(self, *, replay: bool) -> dict[str, Any]:
        """As saved. With `replay`, an ended pass is gone through again, empty."""
        if self.ended and not replay:
            return {
                "seed": self.seed,
                "epoch": self.epoch + 1,
                "consumed": 0,
                "started": False,
                "spent": False,
            }
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "consumed": self.consumed,
            "started": self.started,
            "spent": self.ended or self.spent,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.seed, self.epoch = int(state["seed"]), int(state["epoch"])
        self.consumed = int(state["consumed"])
        self.started = self.resumed = bool(state["started"])
        self.spent, self.ended = bool(state["spent"]), False


class Order(Protocol):
    """The global order of one epoch: `units` items, samples or a sampler's batches."""

    @property
    def units(self) -> int | None:
        """How many there are, or None if only drawing an epoch's order tells."""
        ...

    def draw(self, seed: int, epoch: int) -> Sequence[Any] | torch.Tensor:
        """The epoch's order: has `len` and is sliced."""
        ...


class Shuffled:
    """A random permutation of `size` samples: torch's `randperm` from (seed, epoch)."""

    def __init__(self, size: int) -> None:
        self.units: int = size

    def draw(self, seed: int, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derived_seed(seed, epoch, "order"))
        return torch.randperm(self.units, generator=generator)


class Sequential:
    """The samples as they lie."""

    def __init__(self, size: int) -> None:
        self.units: int = size

    def draw(self, seed: int, epoch: int) -> Sequence[int]:
        return range(self.units)


class FromSampler:
    """Whatever a user's sampler or batch sampler yields, listed once an epoch.

    It is listed with python, numpy, torch and its own torch `generator` seeded
    from (seed, epoch), so each rank and each restart lists the same; a sampler
    with a source of randomness of another kind must bring `set_epoch`.
    """

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self.units: int | None = None

    def draw(self, seed: int, epoch: int) -> Sequence[Any]:
        sampler = self._sampler
        with untouched():
            seed_host(derived_seed(seed, epoch, "order"))
            holders: list[Any] = [sampler, getattr(sampler, "sampler", None)]
            for holder in holders:
                if hasattr(holder, "set_epoch"):
                    holder.set_epoch(epoch)
                if isinstance(getattr(holder, "generator", None), torch.Generator):
                    holder.generator.manual_seed(derived_seed(seed, epoch, "order"))
            return list(sampler)


@dataclass(frozen=True, kw_only=True)
class Dealer:
    """Deals an order out to workers, a global batch at a time.

    Sizes within one batch differ by at most one. A tail too small to give each
    worker a sample joins the batch before it, so no sample is dropped, none
    comes twice and no worker is handed an empty batch.
    """

    rank: int
    world_size: int
    batch_size: int
    drop_last: bool

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigurationError(f"batch_size must be at least 1, not {self.batch_size}")

    def cuts(self, units: int, start: int = 0) -> Iterator[tuple[int, int]]:
        """Global batches as [begin, end) from position `start` on."""
        whole = self.batch_size * self.world_size
        begin = start
        while begin < units:
            end = begin + whole
            if end > units:
                if self.drop_last:
                    return
                end = units
            elif 0 < units - end < self.world_size and not self.drop_last:
                end = units
            if end - begin < self.world_size:
                raise ElasticDataError(
                    f"{end - begin} samples are left for {self.world_size} workers",
                    why="each worker needs at least one sample a step",
                    remedy="use fewer workers, drop_last=True, or a larger dataset",
                )
            yield begin, end
            begin = end

    def mine(self, begin: int, end: int) -> tuple[int, int]:
        """This rank's part of the global batch [begin, end)."""
        each, rest = divmod(end - begin, self.world_size)
        first = begin + self.rank * each + min(self.rank, rest)
        return first, first + each + (self.rank < rest)

    def length(self, units: int) -> int:
        """Global batches in a whole epoch of `units`."""
        full, tail = divmod(units, self.batch_size * self.world_size)
        joins = full > 0 and tail < self.world_size
        return full if self.drop_last or tail == 0 or joins else full + 1
