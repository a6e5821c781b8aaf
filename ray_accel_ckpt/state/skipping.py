"""A loader without its first batches: `Checkpointer.skip_first_batches`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.state.indexed import worker_options
from ray_accel_ckpt.state.loader import PreparedLoader


class SkippedLoader:
    """A loader without its first batches, for one epoch. See `Checkpointer.skip_first_batches`."""

    def __init__(self, loader: Any, num_batches: int) -> None:
        self._loader = loader
        self._num_batches = num_batches
        self._used = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return max(0, len(self._loader) - self._num_batches)

    def __iter__(self) -> Iterator[Any]:
        if self._used:
            raise ConfigurationError(
                "a loader from skip_first_batches() serves one epoch, and it has served it",
                remedy="iterate the loader itself for the epochs that follow",
            )
        self._used = True
        if isinstance(self._loader, PreparedLoader):
            return self._loader.skipped(self._num_batches)
        if isinstance(self._loader, DataLoader) and not _is_iterable(self._loader):
            return iter(_without_first(self._loader, self._num_batches))
        return itertools.islice(iter(self._loader), self._num_batches, None)


def _without_first(loader: DataLoader[Any], num_batches: int) -> DataLoader[Any]:
    """The same loader from batch `num_batches` on: indices are skipped, samples never read."""
    options: dict[str, Any]
    if loader.batch_sampler is not None:
        options = {"batch_sampler": _Tail(loader.batch_sampler, num_batches)}
    else:
        options = {"sampler": _Tail(loader.sampler, num_batches), "batch_size": None}
    return DataLoader(
        loader.dataset,
        **options,
        collate_fn=loader.collate_fn,
        generator=loader.generator,
        **worker_options(loader),
    )


class _Tail:
    def __init__(self, sampler: Any, skip: int) -> None:
        self._sampler, self._skip = sampler, skip

    def __len__(self) -> int:
        return max(0, len(self._sampler) - self._skip)

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self._sampler), self._skip, None)


def _is_iterable(loader: DataLoader[Any]) -> bool:
    return isinstance(loader.dataset, IterableDataset)
