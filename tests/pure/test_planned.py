"""Plans are kept from one save to the next, and made anew when anything differs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import pytest
import torch

from ray_accel_ckpt.errors import UnsupportedStateError
from ray_accel_ckpt.image.partition import plan_digest, share, specs_of
from ray_accel_ckpt.image.planned import Planned, Plans
from ray_accel_ckpt.image.shard import plan
from ray_accel_ckpt.state.part import Captured, Scope
from tests.helpers_image import part_of

VALUE = {"a": torch.zeros(5, 3), "b": torch.zeros(4), "c": torch.zeros(2, 2)}


def _of(
    plans: Plans,
    value: Mapping[str, torch.Tensor] = VALUE,
    *,
    scope: Scope = Scope.REPLICATED,
    frozen: Collection[str] = ("part/c",),
    rank: int = 0,
    world_size: int = 2,
) -> Planned:
    captured = part_of(dict(value), scope=scope)
    return plans.of(captured, rank=rank, world_size=world_size, frozen=frozen)


def _captured() -> dict[str, Captured]:
    return part_of(dict(VALUE))


def test_it_is_what_the_specs_say() -> None:
    for rank in range(2):
        specs = specs_of(_captured(), rank=rank, world_size=2, frozen={"part/c"})
        planned = _of(Plans(), rank=rank)
        mine = share(specs, rank=rank)
        assert planned.digest == plan_digest(specs, world_size=2)
        assert planned.layout == plan(p for p in mine if not p.spec.frozen)
        assert planned.frozen == plan(p for p in mine if p.spec.frozen)


def test_the_same_tensors_are_planned_once() -> None:
    plans = Plans()
    assert _of(plans) is _of(plans, {name: tensor.clone() for name, tensor in VALUE.items()})


@pytest.mark.parametrize(
    ("value", "options"),
    [
        ({"b": VALUE["b"], "c": VALUE["c"]}, {}),
        ({**VALUE, "d": torch.zeros(1)}, {}),
        ({**VALUE, "a": torch.zeros(5, 3, dtype=torch.float64)}, {}),
        ({**VALUE, "a": torch.zeros(3, 5)}, {}),
        (VALUE, {"frozen": ("part/a", "part/c")}),
        (VALUE, {"frozen": ()}),
        (VALUE, {"scope": Scope.RANK_ZERO}),
        (VALUE, {"scope": Scope.PER_RANK}),
        (VALUE, {"rank": 1}),
        (VALUE, {"world_size": 3}),
    ],
)
def test_others_are_planned_anew(
    value: dict[str, torch.Tensor], options: dict[str, object]
) -> None:
    """Just as if nothing had been planned before."""
    plans = Plans()
    before = _of(plans)
    after = _of(plans, value, **options)  # type: ignore[arg-type]
    assert after is not before
    assert after.key == _of(Plans(), value, **options).key  # type: ignore[arg-type]


def test_what_cannot_be_saved_is_refused_the_second_time_too() -> None:
    plans = Plans()
    _of(plans)
    for _ in range(2):
        with pytest.raises(UnsupportedStateError, match="65 dimensions"):
            _of(plans, {**VALUE, "a": torch.zeros([1] * 65)})


def test_without_frozen_tensors_there_is_no_file_of_them() -> None:
    assert _of(Plans(), frozen=()).frozen is None


def test_specs_of_other_shares_are_of_no_use() -> None:
    (spec, *_) = specs_of(_captured(), rank=0, world_size=2)
    tensor = VALUE["a"]
    assert spec.fits(tensor, Scope.REPLICATED, frozen=False)
    assert not replace(spec, scope=Scope.SHARDED).fits(tensor, Scope.SHARDED, frozen=False)
