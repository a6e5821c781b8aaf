"""Batches out of an iterable that starts anew each time, as Ray Data's do: counted in rows.

The position is a number of rows, and a checksum of them. A resumed pass reads
the rows before it once more and compares: that the data comes in the same order
again is not hoped for but seen, and an order that changed is an error.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree

from ray_accel_ckpt.errors import ConfigurationError, ElasticDataError
from ray_accel_ckpt.state.cursor import Cursor
from ray_accel_ckpt.state.part import Differences
from ray_accel_ckpt.state.rng import OwnStreams, derived_seed
from ray_accel_ckpt.state.source import Served
from ray_accel_ckpt.state.tree import Json

logger = logging.getLogger(__name__)

_END = object()
_PLACES = 512
_ODD = -7046029254386353131
"""2^64 divided by the golden ratio, as a signed integer: spreads what it multiplies."""


class RowSource:
    """This rank's batches of an iterable; `consumed` counts them, rows say where they are.

    Args:
        batches: each `iter()` begins a pass. Its batches are made of tensors
            that have the rows as their first dimension.
    """

    per_rank = True
    units = None
    members = frozenset({"rows", "checksum"})

    def __init__(self, batches: Iterable[Any], *, name: str, world_size: int) -> None:
        self._batches = batches
        self._name = name
        self._world_size = world_size
        self._running: tuple[int, Rows] | None = None
        self._entry: _Entry | None = None

    def length(self, cursor: Cursor) -> int:
        del cursor
        return len(self._batches)  # type: ignore[arg-type]

    def position(self, cursor: Cursor, num_batches: int) -> int:
        del cursor
        return num_batches

    def batches(self, cursor: Cursor) -> Iterator[Served]:
        own = OwnStreams(derived_seed(cursor.seed, cursor.epoch, "workers"))
        stream = _Scoped(self._batches, own)
        rows = Rows()
        rest: Any = _END
        if self._entry is not None and self._entry.at == (cursor.epoch, cursor.consumed):
            rest = self._read_again(stream, rows, self._entry)
        else:
            for batch in itertools.islice(stream, cursor.consumed):
                rows.add(batch)
        self._entry = None
        consumed = cursor.consumed
        while True:
            batch = next(stream, _END) if rest is _END else rest
            if batch is _END:
                return
            rest = _END
            rows.add(batch)
            consumed += 1
            self._running = cursor.epoch, rows
            yield Served(batch=batch, consumed=consumed)

    # --- the state ---------------------------------------------------------------------

    def state(self, position: Mapping[str, Any]) -> dict[str, Any]:
        within = position["started"] and not position["spent"]
        if within and self._running is not None and self._running[0] == position["epoch"]:
            rows = self._running[1]
            return {"rows": rows.count, "checksum": rows.checksum()}
        here = position["epoch"], position["consumed"]
        if within and self._entry is not None and self._entry.at == here:
            return {"rows": self._entry.rows, "checksum": self._entry.checksum}
        return {"rows": 0, "checksum": 0}

    def compare(self, saved: Mapping[str, Json], differences: Differences) -> None:
        if "rows" not in saved:
            differences.differing.append(
                f"{self._name} (checkpoint: a DataLoader, registered: an iterable of batches)"
            )

    def understands(self, state: Mapping[str, Any]) -> bool:
        counts = all(type(state.get(name)) is int for name in self.members)
        return counts and state["rows"] >= 0 and -(2**63) <= state["checksum"] < 2**63

    def apply(self, state: Mapping[str, Any]) -> None:
        self._running = None
        at = state["epoch"], state["consumed"]
        entry = _Entry(at=at, rows=state["rows"], checksum=state["checksum"])
        self._entry = entry if entry.rows else None

    def dealt_anew(self, saved: Sequence[Json]) -> Json:
        if any(isinstance(each, dict) and each.get("rows") for each in saved):
            raise ElasticDataError(
                f"loader {self._name!r} cannot go on with {self._world_size} workers",
                why=f"it was saved by {len(saved)} in the middle of a pass, and each read its own "
                "part of the data; which rows another number of workers would read is not known",
                remedy=f"go on with {len(saved)} workers, save between two epochs, or use a "
                "map-style dataset, which any number of workers can go on with",
            )
        return saved[0]

    def _read_again(self, stream: Iterator[Any], rows: Rows, entry: _Entry) -> Any:
        """Go through the rows before `entry`; what is left of the batch the last of them is in."""
        count, checksum = entry.rows, entry.checksum
        logger.warning(
            "loader %r: reading %d rows again to get back to the position of the checkpoint",
            self._name,
            count,
        )
        rest: Any = _END
        while rows.count < count:
            batch = next(stream, _END)
            if batch is _END:
                break
            missing = count - rows.count
            if rows_of(batch) > missing:
                batch, rest = _cut(batch, 0, missing), _cut(batch, missing, None)
            rows.add(batch)
        if (rows.count, rows.checksum()) != (count, checksum):
            raise ElasticDataError(
                f"loader {self._name!r} cannot go on where the checkpoint was saved",
                why=f"the first {count} rows of this pass are not those of the pass that was saved"
                if rows.count == count
                else f"this pass has {rows.count} rows, and {count} were handed out",
                remedy="make the order of the data the same each time: preserve_order=True in the "
                "ExecutionOptions of Ray Train's DataConfig, a seed for each shuffle, a fixed "
                "number of blocks; or save between two epochs",
            )
        return rest


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """Into a pass `at` (epoch, batches handed out): so many rows, with such a checksum."""

    at: tuple[int, int]
    rows: int
    checksum: int


class Rows:
    """How many rows have gone by, and a checksum of them that the cuts into batches do not move.

    It is reckoned where the batches are, and fetched when it is asked for: on an
    accelerator no batch is waited for. Of a wide row, some hundred places spread over
    it count. It finds another order; it is no signature.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[int, torch.Tensor] = {}

    def add(self, batch: Any) -> None:
        rows = rows_of(batch)
        for i, leaf in enumerate(_leaves(batch)):
            index = torch.arange(self.count, self.count + rows, device=leaf.device)
            total = (_row_sums(leaf) * ((index * 2 + 1) * _ODD)).sum()
            self._sums[i] = self._sums[i] + total if i in self._sums else total
        self.count += rows

    def checksum(self) -> int:
        total = torch.zeros((), dtype=torch.int64, device="cpu")
        for i, each in sorted(self._sums.items()):
            total = total * 31 + each.cpu() * (2 * i + 1)
        return int(total)


class _Scoped(Iterator[Any]):
    """One pass; what it draws is drawn from streams of its own."""

    def __init__(self, batches: Iterable[Any], own: OwnStreams) -> None:
        self._own = own
        with own.scope():
            self._inner = iter(batches)

    def __next__(self) -> Any:
        with self._own.scope():
            return next(self._inner)


def rows_of(batch: Any) -> int:
    """How many rows a batch has.

    Raises:
        ConfigurationError: it is not made of tensors with the same first dimension.
    """
    counts = {len(leaf) if leaf.dim() else -1 for leaf in _leaves(batch)}
    if len(counts) > 1 or -1 in counts:
        raise ConfigurationError(
            "the rows of a batch cannot be counted",
            why=f"its tensors have first dimensions {sorted(counts)}",
            remedy="let collate_fn return tensors that have one row for each of the dataset",
        )
    return counts.pop() if counts else 0


def _leaves(batch: Any) -> list[torch.Tensor]:
    leaves = _pytree.tree_leaves(batch)
    odd = [type(leaf).__qualname__ for leaf in leaves if not isinstance(leaf, torch.Tensor)]
    if odd:
        raise ConfigurationError(
            "the rows of a batch cannot be counted",
            why=f"it holds a {odd[0]} beside or instead of tensors",
            remedy="use iter_torch_batches(), or let collate_fn return tensors only",
        )
    return leaves


def _cut(batch: Any, start: int, stop: int | None) -> Any:
    return _pytree.tree_map(lambda leaf: leaf[start:stop], batch)


def _row_sums(leaf: torch.Tensor) -> torch.Tensor:
    """One int64 a row, in which each of its bytes counts by its place; overflows wrap."""
    if leaf.numel() == 0:
        return torch.zeros(len(leaf), dtype=torch.int64, device=leaf.device)
    data = leaf.detach().reshape(len(leaf), -1).contiguous()
    if data.storage_offset() or data.stride(-1) != 1:
        # A single row counts as contiguous wherever it begins, and cannot be seen as words.
        data = data.clone(memory_format=torch.contiguous_format)
    data = data.view(torch.uint8)
    width = next(n for n in (8, 4, 2, 1) if data.shape[1] % n == 0)
    words = data.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[width])
    words = words[:, :: max(1, words.shape[1] // _PLACES)]
    weights = (torch.arange(words.shape[1], device=leaf.device) * 2 + 1) * _ODD
    # The high half is folded in: a product alone would lose the order of its high bits.
    mixed = words.to(torch.int64) * weights
    return (mixed ^ (mixed >> 32)).sum(1)
