"""Augmentation that depends on the sample, not on who loads it or when.

Each sample is produced with python, numpy and torch seeded from (seed, epoch,
index). So it comes out the same in the training process or in any number of
loader workers, before or after a restart. In the training process this happens
in a scope: the training streams are afterwards as if nothing had been drawn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset, get_worker_info

from ray_accel_ckpt.state.rng import derived_seed, seed_host, untouched

Key = tuple[int, Any]


class SeededDataset(Dataset[Any]):
    """Takes keys (epoch, index) and returns collated batches.

    Collating is done here and not by torch, because a `collate_fn` may draw
    too (mixup): it goes on with the stream of the batch's last sample.

    Args:
        dataset: the user's map-style dataset.
        collate: the user's `collate_fn`.
        seed: the loader's seed.
        in_worker: samples are produced in loader processes, whose streams
            nobody else uses; then no scope is needed.
    """

    def __init__(
        self, dataset: Any, collate: Callable[[Any], Any], *, seed: int, in_worker: bool
    ) -> None:
        self.dataset = dataset
        self.seed = seed
        self._collate = collate
        self._in_worker = in_worker

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> Any:
        with self._scope():
            return self._collate(self._sample(key))

    def __getitems__(self, keys: list[Key]) -> Any:
        with self._scope():
            # None where a subclass takes it back; so torch understands it.
            if getattr(self.dataset, "__getitems__", None):
                seed_host(derived_seed(self.seed, *keys))
                samples = self.dataset.__getitems__([index for _, index in keys])
            else:
                samples = [self._sample(key) for key in keys]
            return self._collate(samples)

    def _sample(self, key: Key) -> Any:
        epoch, index = key
        seed_host(derived_seed(self.seed, epoch, index))
        return self.dataset[index]

    def _scope(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._in_worker else untouched()


class InWorker:
    """The inner loader's `worker_init_fn`: the user's, which may look at the data it is for.

    What it or the dataset asks ``get_worker_info().dataset`` for is the user's own object.
    """

    def __init__(self, init: Callable[[int], Any] | None) -> None:
        self._init = init

    def __call__(self, worker: int) -> None:
        info: Any = get_worker_info()
        # Past what keeps it from being changed by mistake.
        object.__setattr__(info, "dataset", info.dataset.dataset)
        if self._init is not None:
            self._init(worker)


def identity(batch: Any) -> Any:
    """The inner loader's `collate_fn`: batches arrive collated. Named, so that it pickles."""
    return batch
