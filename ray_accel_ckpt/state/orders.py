"""The global order of one epoch, drawn from (seed, epoch) or listed from a user's sampler."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
)

from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.state.dealing import own_batch_sampler
from ray_accel_ckpt.state.rng import derived_seed, seed_host, untouched
from ray_accel_ckpt.state.tree import Json, encoded_items, flatten

# How samplers that deal out to ranks call the number of these, and their own.
_COUNTS = ("num_replicas", "_num_replicas", "world_size", "_world_size", "num_shards")
_RANKS = ("rank", "_rank", "shard_id", "shard_index")


class Order(Protocol):
    """The global order of each epoch: `units` items, samples or a sampler's batches."""

    @property
    def units(self) -> int | None:
        """How many there are, or None if only an epoch's order tells."""
        ...

    @property
    def stateful(self) -> bool:
        """Whether there is more to it than seed and epoch: then it is saved."""
        ...

    def draw(self, seed: int, epoch: int) -> Sequence[Any] | torch.Tensor:
        """The epoch's order: has `len` and is sliced."""
        ...

    def count(self, seed: int, epoch: int) -> int:
        """The length of the epoch's order, found without moving anything."""
        ...

    def state(self) -> Any:
        """What else decides the orders to come; None if `seed` and `epoch` are all."""
        ...

    def alike(self, encoded: Json) -> bool:
        """Whether a saved state, encoded, is of as many objects as have one here."""
        ...

    def understands(self, state: Any) -> bool:
        """Whether `state` is one that `state()` returns."""
        ...

    def load(self, state: Any, seed: int) -> None:
        """Be as the order that `state` was taken of."""
        ...


class _Pure:
    """An order that depends on (seed, epoch) alone."""

    stateful = False

    def __init__(self, size: int) -> None:
        self.units: int = size

    def count(self, seed: int, epoch: int) -> int:
        del seed, epoch
        return self.units

    def state(self) -> None:
        return None

    def alike(self, encoded: Json) -> bool:
        del encoded
        return False

    def understands(self, state: Any) -> bool:
        return state is None

    def load(self, state: Any, seed: int) -> None:
        del state, seed


class Shuffled(_Pure):
    """A random permutation of `size` samples: torch's `randperm` from (seed, epoch)."""

    def draw(self, seed: int, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derived_seed(seed, epoch, "order"))
        return torch.randperm(self.units, generator=generator, device="cpu")


class Sequential(_Pure):
    """The samples as they lie."""

    def draw(self, seed: int, epoch: int) -> Sequence[int]:
        del seed, epoch
        return range(self.units)


class FromSampler:
    """Whatever a user's sampler or batch sampler yields, listed once an epoch.

    It is listed with python, numpy, torch and its own torch `generator` seeded
    from (seed, epoch), so each rank and each restart lists the same; a sampler
    with a source of randomness of another kind must bring `set_epoch`, or
    `state_dict` and `load_state_dict`.

    Those are of three moments: before the last listing, right after it, and now.
    Loading re-enacts them: it lists again from the first, which leaves the
    sampler as it was left then. The state of now is loaded only if somebody has
    changed it since: to samplers that count what they have yielded, loading the
    state of their end means to yield nothing the next time.
    """

    units = None

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self._holders = [sampler, *_inner(sampler)]
        self._with_state = [h for h in self._holders if _has_state(h)]
        self._of: tuple[int, int] | None = None
        self._listed: list[Any] = []
        self._before: list[Any] = []
        self._after: list[Any] = []

    @property
    def stateful(self) -> bool:
        return bool(self._with_state)

    def draw(self, seed: int, epoch: int) -> list[Any]:
        if self._of != (seed, epoch):
            self._before = self._states()
            self._listed = self._list(seed, epoch)
            self._after, self._of = self._states(), (seed, epoch)
        return self._listed

    def count(self, seed: int, epoch: int) -> int:
        if self._of == (seed, epoch):
            return len(self._listed)
        # To list one that has a state would move it.
        return len(self._sampler) if self.stateful else len(self._list(seed, epoch))

    def state(self) -> Any:
        if not self.stateful:
            return None
        now = self._states()
        if self._of is None:
            return {"epoch": None, "length": 0, "before": None, "now": now}
        return {
            "epoch": self._of[1],
            "length": len(self._listed),
            "before": self._before,
            "now": None if _same(now, self._after) else now,
        }

    def alike(self, encoded: Json) -> bool:
        lists = [encoded_items(encoded).get(name) for name in ("before", "now")]
        count = len(self._with_state)
        return self.stateful and all(len(each) == count for each in lists if isinstance(each, list))

    def understands(self, state: Any) -> bool:
        if not isinstance(state, dict) or set(state) != {"epoch", "length", "before", "now"}:
            return False
        epoch, before, now = state["epoch"], state["before"], state["now"]
        counted = epoch is None or (type(epoch) is int and epoch >= 0)
        counted = counted and type(state["length"]) is int
        needed = (before is None) == (epoch is None) and not (epoch is None and now is None)
        lists = [each for each in (before, now) if each is not None]
        fit = all(isinstance(x, list) and len(x) == len(self._with_state) for x in lists)
        return counted and needed and fit

    def load(self, state: Any, seed: int) -> None:
        self._of = None
        if state is None:
            return
        if state["epoch"] is not None:
            self._set(state["before"])
            if not self.draw(seed, state["epoch"]) and state["length"]:
                # To it, what it was before this listing is the end of the listing before.
                self._of = None
                self.draw(seed, state["epoch"])
        if state["now"] is not None:
            self._set(state["now"])

    def _list(self, seed: int, epoch: int) -> list[Any]:
        with untouched():
            seed_host(derived_seed(seed, epoch, "order"))
            for holder in self._holders:
                if hasattr(holder, "set_epoch"):
                    holder.set_epoch(epoch)
                if isinstance(getattr(holder, "generator", None), torch.Generator):
                    holder.generator.manual_seed(derived_seed(seed, epoch, "order"))
            return list(self._sampler)

    def _states(self) -> list[Any]:
        return [copy.deepcopy(holder.state_dict()) for holder in self._with_state]

    def _set(self, states: list[Any]) -> None:
        for holder, state in zip(self._with_state, states, strict=True):
            holder.load_state_dict(copy.deepcopy(state))


def order_of(loader: DataLoader[Any]) -> Order:
    """The order that a map-style loader's own sampler means.

    Raises:
        ConfigurationError: the sampler deals out to ranks itself.
    """
    if own_batch_sampler(loader):
        _refuse_split(loader.batch_sampler)
        return FromSampler(loader.batch_sampler)
    # A BatchSampler that the user made holds the sampler; the loader's own is a stand-in.
    batches = loader.batch_sampler
    sampler: Any = batches.sampler if isinstance(batches, BatchSampler) else loader.sampler
    kind = type(sampler)
    if kind in (SequentialSampler, RandomSampler, DistributedSampler):
        # Under a sampler of the user's the data need not have a length: torch asks for none.
        size = len(loader.dataset)  # type: ignore[arg-type]
        if kind is DistributedSampler:
            return Shuffled(size) if sampler.shuffle else Sequential(size)
        if kind is SequentialSampler and len(sampler) == size:
            return Sequential(size)
        if kind is RandomSampler and not sampler.replacement and sampler.num_samples == size:
            return Shuffled(size)
    _refuse_split(sampler)
    return FromSampler(sampler)


def _refuse_split(sampler: Any) -> None:
    for holder in _within(sampler):
        counts = [getattr(holder, name, 1) for name in _COUNTS]
        splits = any(type(count) is int and count > 1 for count in counts)
        if splits and any(hasattr(holder, name) for name in _RANKS):
            raise ConfigurationError(
                f"the loader's {type(holder).__name__} deals the data out to ranks itself",
                why="the prepared loader deals out to ranks too: together they would leave out "
                "most of the data",
                remedy="give the loader the order of the whole epoch, as for one rank of one; "
                "torch's own DistributedSampler is understood and replaced",
            )


def _within(sampler: Any) -> Iterator[Any]:
    """A sampler and those it is made of, as far as they say so."""
    seen: list[Any] = []
    pending = [sampler]
    while pending:
        holder = pending.pop()
        if holder is not None and not any(holder is each for each in seen):
            seen.append(holder)
            yield holder
            pending += [getattr(holder, name, None) for name in ("sampler", "batch_sampler")]


def _inner(sampler: Any) -> list[Any]:
    inner = getattr(sampler, "sampler", None)
    return [] if inner is None else [inner]


def _has_state(holder: Any) -> bool:
    return hasattr(holder, "state_dict") and hasattr(holder, "load_state_dict")


def _same(some: Any, others: Any) -> bool:
    """Bit for bit, as far as a checkpoint could tell."""
    one, two = flatten(some, "sampler"), flatten(others, "sampler")
    tensors = zip(one.tensors.items(), two.tensors.items(), strict=False)
    return one.value == two.value and all(
        a == b and s.dtype == t.dtype and torch.equal(s, t) for (a, s), (b, t) in tensors
    )
