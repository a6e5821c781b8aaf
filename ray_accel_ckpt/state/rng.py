"""Random number streams: python, numpy, torch CPU and every accelerator of this worker.

Captured without drawing from any of them, restored last of all: anything that
runs between restoring and the next batch (building an iterator, moving a
model) may draw, and would shift the stream.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import xxhash

NOT_A_STATE = (
    *(TypeError, ValueError, KeyError),
    *(RuntimeError, AttributeError, OverflowError),
)
"""What `check` raises of a state that is none."""

SEEDS = (-(2**63), 2**64 - 1)
"""The least and the largest that torch takes, and so what a checkpoint may hold."""

_BIT_GENERATORS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        *(np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM),
        *(np.random.Philox, np.random.SFC64),
    )
}
_POSITIONS = {"MT19937": ("pos", 624), "Philox": ("buffer_pos", 4)}
"""Where a bit generator stands in what it has drawn ahead, and the end of that."""


def capture() -> dict[str, Any]:
    """All streams of this process, as plain values and host tensors.

    Accelerator states are read from the generators, so no device that this
    process has not used gets a context.
    """
    return {
        **_host_state(),
        "accelerator": [g.get_state() for g in _accelerator_generators()],
    }


def check(state: dict[str, Any]) -> None:
    """Try `state` on generators of no consequence; raises whatever they raise."""
    check_host(state)
    for saved in state["accelerator"]:
        if saved.dtype != torch.uint8:
            raise TypeError(f"a generator's state is uint8, not {saved.dtype}")


def check_host(state: dict[str, Any]) -> None:
    """As `check`, for a state without accelerators."""
    random.Random().setstate(state["python"])  # noqa: S311 - drawn from by nobody
    _check_numpy(state["numpy"])
    torch.Generator().set_state(state["torch"])


def restore(state: dict[str, Any]) -> None:
    """Set every stream to what `capture` returned.

    A device that exists now and did not then keeps its stream; one that is
    gone takes its stream with it.
    """
    _set_host_state(state)
    for generator, saved in zip(_accelerator_generators(), state["accelerator"], strict=False):
        generator.set_state(saved)


def derived_seed(*parts: object) -> int:
    """64 bits that depend on all of `parts` (xxh3-64 of their text), the same on every machine."""
    return xxhash.xxh3_64_intdigest(":".join(map(str, parts)).encode())


def seed_host(seed: int) -> None:
    """Seed python, numpy and torch CPU. Accelerator streams are left alone."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    if _bit_generator() != "MT19937":
        # Of others numpy keeps the second of two normal deviates that were drawn before.
        np.random.set_state({**np.random.get_state(legacy=False), "has_gauss": 0, "gauss": 0.0})
    torch.default_generator.manual_seed(seed)


def seed_all(seed: int) -> None:
    """Seed every stream of this process, each accelerator with a seed of its own."""
    seed_host(seed)
    for i, generator in enumerate(_accelerator_generators()):
        generator.manual_seed(derived_seed(seed, "accelerator", i))


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Whatever is drawn inside, the host streams are afterwards as they were before."""
    before = _host_state()
    try:
        yield
    finally:
        _set_host_state(before)


class OwnStreams:
    """Host streams of somebody's own, which go on from one scope to the next."""

    def __init__(self, seed: int) -> None:
        with untouched():
            seed_host(seed)
            self._state = _host_state()

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """What is drawn inside is drawn from these streams, not from the process's."""
        with untouched():
            _set_host_state(self._state)
            try:
                yield
            finally:
                self._state = _host_state()

    def state(self) -> dict[str, Any]:
        """As plain values and host tensors, which do not change when the streams go on."""
        return self._state

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state()` returned."""
        self._state = state


def _host_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.default_generator.get_state(),
    }


def _set_host_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind = state["numpy"]["bit_generator"]
    if kind != _bit_generator():
        np.random.set_bit_generator(_BIT_GENERATORS[kind]())  # type: ignore[attr-defined]
    np.random.set_state(state["numpy"])
    torch.default_generator.set_state(state["torch"])


def _bit_generator() -> str:
    """The name of what numpy's global stream is drawn from."""
    return type(np.random.get_bit_generator()).__name__  # type: ignore[attr-defined]


def _check_numpy(state: dict[str, Any]) -> None:
    """What numpy believes without looking, it draws from memory that is not its own."""
    kind = state["bit_generator"]
    if kind not in _BIT_GENERATORS:
        raise ValueError(f"{kind!r} is no bit generator of numpy's own")
    sample = np.random.RandomState(_BIT_GENERATORS[kind]())
    _require_alike(state, sample.get_state(legacy=False))
    position, end = _POSITIONS.get(kind, (None, 0))
    if position is not None and {**state, **state["state"]}[position] > end:
        raise ValueError(f"{position} of {kind} is not in 0..{end}")
    sample.set_state(state)


def _require_alike(value: Any, like: Any) -> None:
    """Raise unless `value` is made as `like` is, and its whole numbers count something."""
    same = type(value) is type(like)
    if same and isinstance(like, dict):
        same = value.keys() == like.keys()
        for name in like if same else ():
            _require_alike(value[name], like[name])
    elif same and isinstance(like, np.ndarray):
        same = (value.dtype, value.shape) == (like.dtype, like.shape)
    elif same and isinstance(like, int):
        same = value >= 0
    if not same:
        raise ValueError("it is not made as numpy's state of this bit generator is")


def _accelerator_generators() -> tuple[torch.Generator, ...]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ()
    module = torch.get_device_module(accelerator)
    if hasattr(module, "init"):
        module.init()
    generators = getattr(module, "default_generators", None)
    if generators is None:
        default = getattr(module, "default_generator", None)
        generators = () if default is None else (default,)
    return tuple(generators)
