"""Marks are equal for equal bytes, and for no others that a program comes upon."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_accel_ckpt.image import mark
from ray_accel_ckpt.image.mark import mark_of, weighted_sum
from ray_accel_ckpt.image.partition import share, specs_of
from ray_accel_ckpt.image.shard import plan
from tests.helpers_image import part_of

_WEIGHT = 0x9E3779B97F4A7C15


def _sum_by_hand(data: bytes) -> int:
    padded = data + bytes(-len(data) % 4)
    words = [padded[i : i + 4] for i in range(0, len(padded), 4)]
    terms = [
        int.from_bytes(word, "little", signed=True) * (n * _WEIGHT | 1)
        for n, word in enumerate(words)
    ]
    return sum(terms) % 2**64


@pytest.mark.parametrize("chunk", [4, 8, 2**20])
@given(st.binary(max_size=40))
def test_the_sum_is_what_it_says(chunk: int, data: bytes) -> None:
    before, mark._CHUNK = mark._CHUNK, chunk
    try:
        found = int(weighted_sum(torch.tensor(list(data), dtype=torch.uint8)))
    finally:
        mark._CHUNK = before
    assert found % 2**64 == _sum_by_hand(data)


def _mark(tensor: torch.Tensor) -> object:
    captured = part_of({"x": tensor})
    layout = plan(share(specs_of(captured, rank=0, world_size=1), rank=0))
    return mark_of(layout, captured["part"].tensors)


@pytest.fixture(params=["host", "accelerator"], autouse=True)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of taking a mark, on the host."""
    if request.param == "accelerator":
        monkeypatch.setattr(mark, "_on_host", lambda rows: [])


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.bool, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.int64],
)
def test_any_change_changes_it(dtype: torch.dtype) -> None:
    raw = torch.randint(0, 2, (33 * dtype.itemsize,), dtype=torch.uint8)
    tensor = raw.view(dtype)
    before = _mark(tensor)
    assert _mark(tensor.clone()) == before
    for position in range(raw.numel()):
        changed = raw.clone()
        changed[position] ^= 1
        assert _mark(changed.view(dtype)) != before


def test_it_goes_by_places() -> None:
    tensor = torch.arange(8.0)
    others = [-tensor, tensor.flip(0), tensor.roll(1), tensor.view(2, 4), tensor.double()]
    assert all(_mark(other) != _mark(tensor) for other in others)
    assert _mark(torch.zeros(8)) != _mark(torch.zeros(9))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(0, 3),
        torch.tensor(1.5),
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(9, dtype=torch.bfloat16)[1:],
        torch.tensor([1 + 2j, 3j]).conj(),
        torch.tensor([1 + 2j, 3j]).conj().imag,
    ],
    ids=["empty", "scalar", "transposed", "not aligned", "conjugate", "negative"],
)
def test_every_tensor_has_one(tensor: torch.Tensor) -> None:
    assert _mark(tensor) == _mark(tensor.clone().contiguous())
