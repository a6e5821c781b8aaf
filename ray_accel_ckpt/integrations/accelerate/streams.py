"""Random streams as Accelerate keeps them, and as they are kept here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def from_theirs(states: Mapping[str, Any]) -> dict[str, Any]:
    """The streams of one `random_states_<rank>.pkl` as `state.rng.capture` returns them.

    Raises:
        LookupError, TypeError, ValueError: it holds no such streams.
    """
    devices = [
        value
        for name, value in states.items()
        if name.startswith("torch_") and isinstance(value, (list, tuple))
    ]
    return {
        "python": states["random_state"],
        "numpy": _numpy_of(states["numpy_random_seed"]),
        "torch": states["torch_manual_seed"],
        "accelerator": [state for device in devices for state in device],
    }


def to_theirs(streams: Mapping[str, Any], *, step: int) -> dict[str, Any]:
    """The content of a `random_states_<rank>.pkl`.

    Args:
        step: micro-steps that the accelerator has counted.
    """
    found = {
        "step": step,
        "random_state": streams["python"],
        "numpy_random_seed": _legacy(streams["numpy"]),
        "torch_manual_seed": streams["torch"],
    }
    devices = list(streams["accelerator"])
    return {**found, "torch_cuda_manual_seed": devices} if devices else found


def _numpy_of(theirs: Any) -> dict[str, Any]:
    """What `np.random.get_state()` returned, with names for all that is in it."""
    if isinstance(theirs, Mapping):
        return dict(theirs)
    kind, key, position, has_gauss, gauss = theirs
    return {
        "bit_generator": kind,
        "state": {"key": np.asarray(key), "pos": int(position)},
        "has_gauss": int(has_gauss),
        "gauss": float(gauss),
    }


def _legacy(state: dict[str, Any]) -> Any:
    """The inverse of `_numpy_of`: numpy has the tuple for its Mersenne Twister alone."""
    if state["bit_generator"] != "MT19937":
        return state
    inner = state["state"]
    return ("MT19937", inner["key"], inner["pos"], state["has_gauss"], state["gauss"])
