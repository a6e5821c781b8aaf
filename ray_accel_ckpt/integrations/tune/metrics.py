"""What Tune is told of a trial's metrics, and what is remembered of them for its next life."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.runtime.report import plain_metrics


def completed(known: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`new`, and of what it lacks the values known before; nested ones alike."""
    merged = dict(known)
    for name, value in new.items():
        before = known.get(name)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            merged[name] = completed(before, value)
        else:
            merged[name] = value
    return merged


def remembered(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can hold of `metrics`. A report without a checkpoint may hold anything."""
    plain: dict[str, Any] = {}
    for name, value in metrics.items():
        # Tune has been told of it; only a life after this one will lack it.
        with suppress(ConfigurationError):
            plain |= plain_metrics({name: value})
    return plain
