"""The training batches as Trainer gets them: skipped by its count, and never read for it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset

from ray_accel_ckpt.state.loader import PreparedLoader


class Batches(IterableDataset[Any]):
    """What Trainer gets as dataset: the batches of a prepared loader.

    Trainer skips what it has had of an epoch by counting. Of a resumed pass, which
    begins behind that, it is given as many times nothing.
    """

    def __init__(self, loader: PreparedLoader) -> None:
        self.loader = loader
        self._resumed: Iterator[Any] | None = None

    @property
    def sized(self) -> bool:
        try:
            return len(self) >= 0
        except TypeError:
            return False

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        resumed, self._resumed = self._resumed, None
        return iter(self.loader) if resumed is None else resumed

    @contextlib.contextmanager
    def resumed(self, skipped: int) -> Iterator[None]:
        """The next pass is the one that was resumed into, `skipped` batches into its epoch."""
        # A callback may have looked at a batch since it was loaded.
        self.loader.reenter()
        rest = iter(self.loader)
        self._resumed = itertools.chain(itertools.repeat(None, skipped), rest)
        yield
        # It is over now, also if nothing was left of it, or Trainer was to stop.
        self._resumed = None
        if self.loader.in_flight():
            next(rest, None)
