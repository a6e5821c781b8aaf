"""Random streams: captured without a draw, restored to the bit."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from ray_accel_ckpt.state import rng
from ray_accel_ckpt.state.tree import flatten, unflatten
from tests.pure.helpers import digest, seed_everything, streams


def draw() -> str:
    """Something from each stream, normal deviates too: these come in pairs."""
    values: list[Any] = [random.random(), random.gauss(0, 1), float(np.random.rand())]
    return digest(*values, float(np.random.randn()), torch.rand(3), torch.randn(1))


@pytest.fixture(params=["MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"])
def bit_generator(request: pytest.FixtureRequest) -> Iterator[str]:
    """What numpy's global stream is drawn from, as `np.random.set_bit_generator` has it."""
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(getattr(np.random, request.param)(3))
    yield request.param
    np.random.set_bit_generator(before)


def test_a_stream_of_any_bit_generator_comes_back(bit_generator: str) -> None:
    draw()
    flat = flatten(rng.capture(), "rng")
    value, tensors = json.loads(json.dumps(flat.value, allow_nan=False)), flat.tensors
    expected = draw()
    # In a life that has not made it yet, it is made.
    np.random.set_bit_generator(np.random.MT19937(4))
    rng.check(unflatten(value, tensors))
    rng.restore(unflatten(value, tensors))
    assert draw() == expected
    assert type(np.random.get_bit_generator()).__name__ == bit_generator


@pytest.mark.usefixtures("bit_generator")
def test_whatever_was_drawn_before_a_seed_decides() -> None:
    """Normal deviates come in pairs, and the second must not outlive the seed."""
    rng.seed_host(5)
    expected = draw()
    while not np.random.get_state(legacy=False)["has_gauss"]:
        np.random.randn()
    rng.seed_host(5)
    assert draw() == expected


ODD = [
    ("MT19937", "pos", -1),
    ("MT19937", "pos", 625),
    ("MT19937", "pos", True),
    ("MT19937", "pos", None),
    ("MT19937", "key", np.zeros(1, np.uint32)),
    ("MT19937", "key", np.zeros(624, np.uint64)),
    ("MT19937", "has_gauss", 2**200),
    ("MT19937", "gauss", None),
    ("PCG64", "state", -1),
    ("PCG64", "state", 2**128),
    ("PCG64DXSM", "inc", 1.5),
    ("Philox", "buffer_pos", -1),
    ("Philox", "buffer_pos", 5),
    ("Philox", "counter", np.zeros(1, np.uint64)),
    ("SFC64", "state", np.zeros(1, np.uint64)),
    ("SFC64", "state", []),
    ("SFC64", "has_uint32", "1"),
    ("SFC64", "more", 1),
]


@pytest.mark.parametrize(("bit_generator", "member", "odd"), ODD, indirect=["bit_generator"])
def test_an_odd_state_of_numpys_is_none(bit_generator: str, member: str, odd: Any) -> None:
    """Of a position beyond its buffer numpy would draw from memory that is another's."""
    state = rng.capture()
    rng.check(state)
    inner = state["numpy"]["state"]
    (inner if member in inner else state["numpy"])[member] = odd
    with pytest.raises(rng.NOT_A_STATE):
        rng.check(state)


def test_a_bit_generator_of_somebody_elses_is_none() -> None:
    state = rng.capture()
    state["numpy"]["bit_generator"] = "Mine"
    with pytest.raises(ValueError, match="Mine"):
        rng.check(state)


def test_restoring_brings_every_stream_back() -> None:
    draw()
    state = rng.capture()
    expected = draw()
    seed_everything(1)
    rng.restore(state)
    assert draw() == expected


def test_a_state_survives_being_saved() -> None:
    flat = flatten(rng.capture(), "rng")
    text = json.dumps(flat.value, allow_nan=False)
    tensors = {name: tensor.clone() for name, tensor in flat.tensors.items()}
    expected = draw()
    rng.restore(unflatten(json.loads(text), tensors))
    assert draw() == expected


def test_capturing_draws_nothing() -> None:
    before = streams()
    rng.capture()
    assert streams() == before


def test_a_captured_state_does_not_move_with_the_stream() -> None:
    state = rng.capture()
    before = digest(state)
    draw()
    assert digest(state) == before


def test_a_state_with_another_number_of_accelerators_is_taken_as_far_as_it_goes() -> None:
    state = rng.capture()
    expected = draw()
    rng.restore({**state, "accelerator": [torch.zeros(16, dtype=torch.uint8)][:0]})
    assert draw() == expected


def test_what_is_drawn_untouched_leaves_no_trace() -> None:
    before = streams()
    with rng.untouched():
        draw()
        seed_everything(4)
    assert streams() == before


def test_untouched_holds_when_the_body_fails() -> None:
    before = streams()
    with pytest.raises(ZeroDivisionError), rng.untouched():
        draw()
        raise ZeroDivisionError
    assert streams() == before


def test_own_streams_go_on_from_scope_to_scope() -> None:
    seed_everything(5)
    expected = [draw(), draw()]
    own = rng.OwnStreams(5)
    rng.seed_host(5)
    found = []
    for _ in range(2):
        before = streams()
        with own.scope():
            found.append(draw())
        assert streams() == before
        random.random()
    assert found == expected


def test_seeds_depend_on_every_part() -> None:
    seeds = {rng.derived_seed(1, 2), rng.derived_seed(12), rng.derived_seed(2, 1)}
    assert len(seeds) == 3


def test_seeds_are_the_same_on_every_machine() -> None:
    """xxh3-64 of the parts as text; of no text at all, it is the vector its authors publish."""
    assert rng.derived_seed("") == 0x2D06800538D394C2
    assert rng.derived_seed(0, "order") == xxhash.xxh3_64_intdigest(b"0:order")


@pytest.mark.parametrize("seed", [0, 2**32, 2**63, 2**64 - 1])
def test_any_64_bits_are_a_seed(seed: int) -> None:
    with rng.untouched():
        rng.seed_all(seed)
        first = draw()
        rng.seed_all(seed)
        assert draw() == first


def test_a_checkpointer_draws_nothing_whatever_it_has_ray_import() -> None:
    """In a process of its own, where nothing is imported yet."""
    script = """
import random, ray.train
from ray_accel_ckpt import Checkpointer
random.seed(0)
before = random.getstate()
Checkpointer()
assert random.getstate() == before
"""
    subprocess.run([sys.executable, "-c", script], check=True)
