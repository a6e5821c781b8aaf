"""Plans are kept from one save to the next, and made anew when anything differs."""

from __future__ import annotations

from dataclasses import replace

import torch

from ray_accel_ckpt.image.partition import TensorSpec, plan_digest, share, specs_of
from ray_accel_ckpt.image.planned import Plans
from ray_accel_ckpt.image.shard import plan
from tests.helpers_image import part_of


def _specs() -> list[TensorSpec]:
    value = {"a": torch.zeros(5, 3), "b": torch.zeros(4), "c": torch.zeros(2, 2)}
    return specs_of(part_of(value), rank=0, world_size=2, frozen={"part/c"})


def test_it_is_what_the_specs_say() -> None:
    specs = _specs()
    for rank in range(2):
        planned = Plans().of(specs, rank=rank, world_size=2)
        mine = share(specs, rank=rank)
        assert planned.digest == plan_digest(specs, world_size=2)
        assert planned.layout == plan(p for p in mine if not p.spec.frozen)
        assert planned.frozen == plan(p for p in mine if p.spec.frozen)


def test_the_same_tensors_are_planned_once() -> None:
    plans = Plans()
    planned = plans.of(_specs(), rank=0, world_size=2)
    assert plans.of(_specs(), rank=0, world_size=2) is planned


def test_others_are_planned_anew() -> None:
    first, *rest = _specs()
    others = [
        [*rest],
        [replace(first, dtype=torch.float64), *rest],
        [replace(first, shape=(3, 5)), *rest],
        [replace(first, frozen=True), *rest],
        [replace(first, peers=(0,)), *rest],
        [replace(first, layout="cut"), *rest],
    ]
    for other in others:
        plans = Plans()
        before = plans.of([first, *rest], rank=0, world_size=2)
        assert plans.of(other, rank=0, world_size=2) is not before
    assert Plans().of([first], rank=0, world_size=2).frozen is None
