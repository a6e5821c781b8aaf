"""Where a prepared loader's batches come from: by index, or out of a stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch.utils.data import DataLoader

from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.state.cursor import Cursor
from ray_accel_ckpt.state.part import Differences
from ray_accel_ckpt.state.tree import Json


@dataclass(frozen=True, kw_only=True)
class Served:
    """One batch as it is handed out.

    Attributes:
        consumed: the position after it.
        weight: what this rank's mean loss counts in the mean over ranks.
        padding: a copy of what another worker has, which must not count.
    """

    batch: Any
    consumed: int
    weight: float = 1.0
    padding: bool = False


class Source(Protocol):
    """What is behind one loader. The position in it is the loader's cursor."""

    per_rank: bool
    """Each rank has a position of its own."""

    members: frozenset[str]
    """What `state` may hold."""

    @property
    def units(self) -> int | None:
        """Size of the epoch's order, if it is known."""
        ...

    def length(self, cursor: Cursor) -> int:
        """Batches of a whole epoch."""
        ...

    def position(self, cursor: Cursor, num_batches: int) -> int:
        """What is consumed after so many batches of the cursor's epoch."""
        ...

    def batches(self, cursor: Cursor) -> Iterator[Served]:
        """Go through the cursor's pass from where it stands."""
        ...

    def state(self, position: Mapping[str, Any]) -> dict[str, Any]:
        """What is saved beside `position`, which the cursor saves."""
        ...

    def compare(self, saved: Mapping[str, Json], differences: Differences) -> None:
        """Add what keeps `saved`, a loader's encoded state, from being gone on with."""
        ...

    def understands(self, state: Mapping[str, Any]) -> bool:
        """Whether what `state` holds beside the position is something this source writes."""
        ...

    def apply(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was saved; the cursor has its position already."""
        ...

    def dealt_anew(self, saved: Sequence[Json]) -> Json:
        """What this rank goes on with after other ranks than now saved `saved`.

        Raises:
            ElasticDataError: the data cannot be dealt out to another number of workers.
        """
        ...


def require_in_order(loader: DataLoader[Any], name: str) -> None:
    """Raise `ConfigurationError` if loader workers may hand out batches as they finish them."""
    if loader.num_workers and not loader.in_order:
        raise ConfigurationError(
            f"loader {name!r} has in_order=False",
            why="its batches come in the order in which its workers finish them, so that a "
            "position does not say which samples there were: some would come twice, some never",
            remedy="leave in_order out; a larger prefetch_factor evens out slow samples too",
        )


def iterates_itself(loader: DataLoader[Any]) -> bool:
    """Whether its batches come out of an `__iter__` that is neither torch's nor torchdata's."""
    maker = next(kind for kind in type(loader).__mro__ if "__iter__" in vars(kind))
    return maker.__module__.partition(".")[0] not in ("torch", "torchdata")


def require_plain(loader: DataLoader[Any], name: str) -> None:
    """Raise `ConfigurationError` if a loader made anew of its dataset would serve other batches."""
    if iterates_itself(loader):
        raise ConfigurationError(
            f"loader {name!r} is a {type(loader).__qualname__} with an __iter__ of its own",
            why="prepared loaders read the dataset by index themselves, and what that makes of "
            "the batches, or how many it serves, would be lost without a word",
            remedy="do it in collate_fn, in the dataset or in the loop, and prepare a DataLoader",
        )
