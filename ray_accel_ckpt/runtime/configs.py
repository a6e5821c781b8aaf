"""`run_config(...)`: a `RunConfig` made for machines that vanish."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING, Any

from ray_accel_ckpt.errors import ConfigurationError, StorageError
from ray_accel_ckpt.runtime.heal import heal_run
from ray_accel_ckpt.storage.filesystem import LocalFilesystem, resolve, to_arrow
from ray_accel_ckpt.storage.retry import retried

if TYPE_CHECKING:
    from ray.train import RunConfig

MAX_FAILURES = 1000
"""Failures a run survives by default. Ray's own default is 0, and a node that is
reclaimed before its announced deadline counts as one."""

_PROBE_TIMEOUT = 60.0


def run_config(
    name: str,
    storage_path: str | os.PathLike[str],
    *,
    storage_filesystem: Any = None,
    max_failures: int = MAX_FAILURES,
    num_to_keep: int | None = 3,
    failure_config: Any = None,
    checkpoint_config: Any = None,
    **options: Any,
) -> RunConfig:
    """A `ray.train.RunConfig` for a run that goes on whatever happens.

    The pair (storage_path, name) is the run: started again with the same pair,
    after a lost driver or cluster, it goes on. The storage is written to and
    read from once, so that a wrong path fails here and not at the first save,
    and a run directory that a crash left unstartable is healed (`heal_run`). What Ray registers,
    and which workers fail, is written down for `ray-accel-ckpt report`.

    Args:
        name: the run's name. Fixed: one with a time in it never resumes.
        storage_path: shared by all nodes: a mounted directory or a URI.
        storage_filesystem: a pyarrow or fsspec filesystem that `storage_path` is a path on.
        max_failures: how many failures are survived; preemptions that Ray
            recognises are not counted and have no limit.
        num_to_keep: how many checkpoints stay; None for all.
        failure_config: Ray's, used as it is, instead of `max_failures`.
        checkpoint_config: Ray's, used as it is, instead of `num_to_keep`.
        options: whatever else `RunConfig` takes.

    Raises:
        ConfigurationError: no name, a config beside the short form of it, or a
            failure_config that lets Ray register checkpoints with shares missing.
        StorageError: the storage cannot be written to and read from.
    """
    import ray.train

    if not name:
        raise ConfigurationError(
            "a run needs a fixed name",
            why="it is found again by (storage_path, name); Ray's default name is a time stamp",
            remedy="run_config(name='digits', storage_path=...)",
        )
    if failure_config is None:
        failure_config = ray.train.FailureConfig(
            max_failures=max_failures, max_preemption_failures=-1
        )
    elif max_failures != MAX_FAILURES:
        raise ConfigurationError("give failure_config or max_failures, not both")
    elif failure_config.relax_collectives_on_preemption:
        raise ConfigurationError(
            "relax_collectives_on_preemption cannot be used with these checkpoints",
            why="Ray would register some that lack the shares of the ranks that went first, and "
            "remove whole ones for them",
            remedy="leave it out: on a notice of preemption all ranks save in time",
        )
    if checkpoint_config is None:
        checkpoint_config = ray.train.CheckpointConfig(num_to_keep=num_to_keep)
    elif num_to_keep != 3:
        raise ConfigurationError("give checkpoint_config or num_to_keep, not both")
    filesystem, path = resolve(storage_path, storage_filesystem)
    _probe(filesystem, f"{path}/{name}")
    heal_run(
        storage_path,
        name,
        storage_filesystem=storage_filesystem,
        checkpoint_config=checkpoint_config,
    )
    from ray_accel_ckpt.runtime.callback import ControllerEvents

    local = isinstance(filesystem, LocalFilesystem) and storage_filesystem is None
    return ray.train.RunConfig(
        name=name,
        storage_path=path if local else os.fspath(storage_path),
        storage_filesystem=None if storage_filesystem is None else to_arrow(storage_filesystem),
        failure_config=failure_config,
        checkpoint_config=checkpoint_config,
        callbacks=[*(options.pop("callbacks", None) or []), ControllerEvents()],
        **options,
    )


def _probe(filesystem: Any, directory: str) -> None:
    """Write, read and remove a small file."""
    path = f"{directory}/.ray_accel_ckpt-probe-{secrets.token_hex(4)}"
    written = secrets.token_bytes(16)
    read = bytearray(len(written))

    def probe() -> None:
        filesystem.write(path, [written])
        filesystem.read_into(path, 0, memoryview(read))
        filesystem.delete(path)

    try:
        retried(probe, what="write to the storage", where=path, timeout=_PROBE_TIMEOUT)
    except (FileNotFoundError, EOFError) as e:
        raise StorageError(
            "the storage does not give back what was written to it",
            where=path,
            why=str(e),
            remedy="see that storage_path exists (a bucket is not created) and is shared",
        ) from e
    if bytes(read) != written:
        raise StorageError(
            "the storage gave back other bytes than were written", where=path, why="unknown"
        )
