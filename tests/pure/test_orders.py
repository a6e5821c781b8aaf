"""The order of an epoch: drawn, or listed from a sampler, the same everywhere."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Sampler

from ray_accel_ckpt.state.orders import FromSampler, Sequential, Shuffled
from tests.pure.helpers import seed_everything, streams

SIZES = st.integers(1, 120)


@given(SIZES, st.integers(0, 2**64 - 1), st.integers(0, 5))
def test_an_order_holds_each_sample_once(size: int, seed: int, epoch: int) -> None:
    assert sorted(Shuffled(size).draw(seed, epoch).tolist()) == list(range(size))
    assert list(Sequential(size).draw(seed, epoch)) == list(range(size))


def test_an_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    orders = [Shuffled(50).draw(seed, epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert not any(torch.equal(orders[0], other) for other in orders[1:])
    torch.manual_seed(99)
    assert torch.equal(Shuffled(50).draw(1, 0), orders[0])


class Drawing(Sampler[int]):
    """Draws from each source there is, and one of its own."""

    def __init__(self, *, generator: torch.Generator | None = None) -> None:
        self.generator = generator
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 30

    def __iter__(self) -> Iterator[int]:
        order = list(range(30))
        random.shuffle(order)
        np.random.shuffle(order)
        own = torch.randperm(30, generator=self.generator)
        return iter([order[i] + 100 * self.epoch for i in own])


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_a_sampler_is_listed_the_same_everywhere(generator: torch.Generator | None) -> None:
    listed = FromSampler(Drawing(generator=generator)).draw(1, 2)
    seed_everything(77)
    before = streams()
    assert FromSampler(Drawing(generator=generator)).draw(1, 2) == listed
    assert streams() == before
    assert FromSampler(Drawing(generator=generator)).draw(1, 3) != listed


def test_a_sampler_is_told_the_epoch() -> None:
    assert min(FromSampler(Drawing()).draw(1, 4)) == 400
