"""A frozen image -> `ray.train.report`: uploaded by Ray's own thread, straight from the slot.

Nothing is written to a temporary directory: Ray calls `checkpoint_upload_fn` in
its background thread, and there the staging buffer is streamed to the run's
storage. Ray's queue of uploads has no bound of its own; the slots are its bound.
"""

from __future__ import annotations

import numbers
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from ray_accel_ckpt.arguments import require
from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.image.image import Image
from ray_accel_ckpt.runtime.ray_run import RayRun
from ray_accel_ckpt.storage.writer import write_image

Metrics = Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None


def report(
    run: RayRun,
    image: Image,
    *,
    directory_name: str,
    metrics: Mapping[str, Any],
    timeout: float,
    release: Callable[[], None],
    durable: Callable[[], None],
) -> None:
    """Hand an image to Ray. Returns once all ranks have agreed on the directory's name.

    A collective of Ray's, *before* the upload: between its end and the bytes
    being durable no rank needs another. Ray registers the checkpoint when all
    ranks have reported; a rank that dies costs this one checkpoint.

    Args:
        release: called when the image's memory is free again, on success or not.
        durable: called once this rank's share is durable, before Ray is told. Must not raise.
    """
    import ray.train

    target = ray.train.Checkpoint(f"{run.path}/{directory_name}", filesystem=run.arrow)

    def upload(checkpoint: Any, name: str) -> Any:
        try:
            write_image(run.filesystem, f"{run.path}/{name}", image, timeout=timeout)
        finally:
            once()
        durable()
        return ray.train.Checkpoint(f"{run.path}/{name}", filesystem=run.arrow)

    # Ray may drop a report without uploading (a reset barrier): then the slot comes back too.
    once = weakref.finalize(upload, release)
    ray.train.report(
        dict(metrics),
        checkpoint=target,
        checkpoint_dir_name=directory_name,
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=False,
        checkpoint_upload_fn=upload,
    )


def require_metrics(metrics: Any) -> None:
    """Raise `ConfigurationError` unless these are metrics as `Checkpointer.step` takes them."""
    require(
        metrics is None or isinstance(metrics, Mapping) or callable(metrics),
        *("metrics", metrics),
        expected="a dict, a function that returns one, or None",
        remedy='metrics={"loss": loss}, say',
    )


def plain_metrics(metrics: Metrics) -> dict[str, Any]:
    """Metrics as Ray's controller can hold them: plain numbers, strings, lists and dicts.

    One numpy scalar ends a run there, with an error that no `max_failures`
    retries. So numpy and torch scalars become numbers here.

    Raises:
        ConfigurationError: naming a metric that is not a plain value; a function
            that returns no dict.
    """
    resolved = metrics() if callable(metrics) else metrics
    require(
        resolved is None or isinstance(resolved, Mapping),
        *("what metrics() returns", resolved),
        expected="a dict or None",
        remedy='lambda: {"loss": loss}, say',
    )
    return {str(name): _plain(value, str(name)) for name, value in (resolved or {}).items()}


def _plain(value: Any, name: str) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if hasattr(value, "item") and getattr(value, "size", None) is not None:
        count = value.numel() if callable(getattr(value, "numel", None)) else value.size
        if count == 1:
            return _plain(value.item(), name)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{name}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{name}[{i}]") for i, v in enumerate(value)]
    kind = type(value)
    raise ConfigurationError(
        f"metric {name!r} is a {kind.__module__}.{kind.__qualname__}",
        why="Ray keeps metrics as JSON",
        remedy="report numbers, strings, or lists and dicts of them",
    )
