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
    kind, key, position, has_gauss, gauss = states["numpy_random_seed"]
    devices = [
        value
        for name, value in states.items()
        if name.startswith("torch_") and isinstance(value, (list, tuple))
    ]
    return {
        "python": states["random_state"],
        "numpy": {
            "bit_generator": kind,
            "state": {"key": np.asarray(key), "pos": int(position)},
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        },
        "torch": states["torch_manual_seed"],
        "accelerator": [state for device in devices for state in device],
    }


def to_theirs(streams: Mapping[str, Any], *, step: int) -> dict[str, Any]:
    """The content of a `random_states_<rank>.pkl`.

    Args:
        step: micro-steps that the accelerator has counted.
    """
    numpy = streams["numpy"]
    state = numpy["state"]
    found = {
        "step": step,
        "random_state": streams["python"],
        "numpy_random_seed": (
            *(numpy["bit_generator"], state["key"], state["pos"]),
            *(numpy["has_gauss"], numpy["gauss"]),
        ),
        "torch_manual_seed": streams["torch"],
    }
    devices = list(streams["accelerator"])
    return {**found, "torch_cuda_manual_seed": devices} if devices else found
