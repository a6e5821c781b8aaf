"""What this process is to Ray: a worker of a run with storage, a local one, or nothing."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.runtime.record import read_record
from ray_accel_ckpt.state import rng
from ray_accel_ckpt.storage.filesystem import Filesystem, wrap


@dataclass(frozen=True, kw_only=True)
class Registered:
    """What Ray knows of a run's checkpoints.

    Attributes:
        names: of those it keeps, in the order it came to know them. Each was whole.
        metrics: what was reported with the latest.
    """

    names: tuple[str, ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def latest(self) -> str | None:
        return self.names[-1] if self.names else None


@dataclass(frozen=True, kw_only=True)
class RayRun:
    """A Ray Train run as seen from one of its workers.

    Attributes:
        name: the run's name, equal over restarts.
        path: the run's directory on `arrow`.
        arrow: Ray's own filesystem object. Checkpoints are reported on this very
            object: Ray compares filesystems, and one made anew need not be equal.
    """

    name: str
    path: str
    arrow: Any

    def registered(self) -> Registered:
        """As it was when the worker started, until this worker reports a checkpoint.

        Raises:
            StorageError: Ray's record of the run cannot be read.
        """
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return Registered()
        latest = str(checkpoint.path).rpartition("/")[2]
        record = read_record(self.filesystem, self.path)
        if record is None or record.latest != latest:
            # Torn, or behind what Ray has in memory.
            return Registered(names=(latest,))
        earlier = tuple(name for name in record.order if name != latest)
        return Registered(names=(*earlier, latest), metrics=_as_reported(record.metrics))

    @property
    def filesystem(self) -> Filesystem:
        return wrap(self.arrow)


def _as_reported(value: Any) -> Any:
    """Ray writes NaN and infinities as null, and could not rank a null that is reported again."""
    if isinstance(value, dict):
        return {key: _as_reported(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_as_reported(each) for each in value]
    return math.nan if value is None else value


def current_run() -> RayRun | None:
    """The run this process is a worker of; None outside Ray Train and in its local mode."""
    context = _context()
    if context is None:
        return None
    try:
        storage = context.get_storage()
    except NotImplementedError:
        return None
    return RayRun(
        name=context.get_experiment_name(),
        path=storage.experiment_fs_path.rstrip("/"),
        arrow=storage.storage_filesystem,
    )


def ray_world_size() -> int:
    """Workers of the run this process is in."""
    return int(_context().get_world_size())


def in_local_mode() -> bool:
    """Inside Ray Train's `num_workers=0`, which has no storage."""
    return _context() is not None and current_run() is None


def training_device() -> torch.device:
    """What Ray gave this worker; else the accelerator of this local rank; else the CPU."""
    if _context() is not None:
        import ray.train.torch

        device: torch.device = ray.train.torch.get_device()
        return device
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, _local_rank() % torch.accelerator.device_count())


@dataclass(frozen=True, kw_only=True)
class Controller:
    """The actor that leads a run: it outlives groups of workers, and the run ends with it."""

    handle: Any

    @classmethod
    def current(cls) -> Controller:
        """Of the run that this process is a worker of."""
        from ray.train.v2._internal.execution.context import get_train_context

        return cls(handle=get_train_context().controller_actor)

    @property
    def id(self) -> str:
        return str(self.handle._actor_id.hex())

    def has_ended(self) -> bool:
        """Whether the run is over, well or not, or its driver is gone. Blocks for 2 s at most.

        That the actor lives means nothing: a driver may hold on to it.
        """
        import ray

        try:
            return bool(ray.get(self.handle.__ray_call__.remote(_is_at_an_end), timeout=2))
        except ray.exceptions.ActorDiedError:
            return True
        except (ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError):
            # It is busy: starting workers, say.
            return False


def _is_at_an_end(controller: Any) -> bool:
    return bool(controller.get_state().is_terminal())


def is_ray_data(obj: Any) -> bool:
    """Whether `obj` is what `iter_torch_batches` of a Ray dataset or its shard returns.

    Raises:
        ConfigurationError: it is the dataset or the shard itself, which has no batches yet.
    """
    if "ray.data" not in sys.modules:
        return False
    import ray.data

    if isinstance(obj, (ray.data.Dataset, ray.data.DataIterator)):
        raise ConfigurationError(
            f"a {type(obj).__qualname__} has no batches yet",
            remedy="prepare(shard.iter_torch_batches(batch_size=...))",
        )
    return type(obj).__module__.startswith("ray.data.") and isinstance(obj, Iterable)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _context() -> Any:
    # Not imported: certainly no worker of it, and no reason to pay seconds for the import.
    if "ray" not in sys.modules:
        return None
    import ray.train

    try:
        # The first time it imports what draws from python's stream, on which training counts.
        with rng.untouched():
            return ray.train.get_context()
    except (RuntimeError, DeprecationWarning):
        # No worker; the second is what Ray raises inside a Tune function.
        return None
