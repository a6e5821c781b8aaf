"""A shard is a plain safetensors file: that very library opens it and finds equal tensors."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_accel_ckpt.errors import UnsupportedStateError
from ray_accel_ckpt.image import shard
from ray_accel_ckpt.image.dtypes import STORED, dtype_named, name_of
from ray_accel_ckpt.image.partition import specs_of
from ray_accel_ckpt.image.shard import ALIGNMENT, plan
from ray_accel_ckpt.state.part import Scope
from tests.helpers_image import Small, bytes_of, image_of, part_of

DTYPES = list(STORED)


def _tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Every bit pattern that can come, NaNs with payloads among them."""
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.arange(count) * 37 + 11
    raw = raw % 2 if dtype is torch.bool else raw % 256
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def _loaded(value: object, **options: int) -> dict[str, torch.Tensor]:
    image = image_of(part_of(value), **options)  # type: ignore[arg-type]
    return safetensors.torch.load(bytes(image.data))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_safetensors_finds_the_same_bytes(dtype: torch.dtype) -> None:
    tensor = _tensor(dtype, 3, 4)
    found = _loaded({"x": tensor})["part/x"]
    assert bytes_of(found) == bytes_of(tensor)
    stored = STORED[dtype]
    assert found.shape == (3, 4, *stored.extra)
    if stored.name == "U8":
        assert found.dtype is torch.uint8
    elif not stored.extra:
        assert found.dtype is dtype
        if not dtype.is_floating_point:
            assert torch.equal(found, tensor)
    else:
        assert torch.is_complex(tensor)
        assert found.dtype.itemsize * 2 == dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_numbers_are_pairs(dtype: torch.dtype) -> None:
    tensor = torch.tensor([1 + 2j, -3.5j], dtype=dtype)
    found = _loaded({"x": tensor})["part/x"]
    assert torch.equal(torch.view_as_complex(found), tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dtypes_name_leads_back_to_it(dtype: torch.dtype) -> None:
    assert dtype_named(name_of(dtype)) is dtype


@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 3), (3, 0), (2, 0, 5), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64], ids=str)
def test_empty_and_scalar_tensors(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    found = _loaded({"x": _tensor(dtype, *shape), "y": torch.ones(3)})
    assert found["part/x"].shape == (*shape, *STORED[dtype].extra)
    assert torch.equal(found["part/y"], torch.ones(3))


def test_a_shard_without_tensors() -> None:
    assert _loaded({"just": "text"}) == {}


def test_tensors_that_are_not_contiguous() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    views = {"t": base.t(), "step": base[::2, 1::2], "one": base[1, 2], "all": base.expand(2, 4, 6)}
    found = _loaded(views)
    assert all(torch.equal(found[f"part/{name}"], view) for name, view in views.items())


def test_all_ranks_shards_together_hold_the_state() -> None:
    value = {"a": torch.arange(70.0).reshape(10, 7), "b": torch.arange(9), "c": torch.tensor(5)}
    for world_size in range(1, 6):
        shards = [_loaded(value, rank=r, world_size=world_size) for r in range(world_size)]
        for name, tensor in value.items():
            pieces = [held[f"part/{name}"] for held in shards if f"part/{name}" in held]
            whole = torch.cat(pieces) if tensor.dim() else pieces[0]
            assert torch.equal(whole, tensor)


_names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(st.dictionaries(_names, st.sampled_from(DTYPES), max_size=6), st.integers(0, 5))
def test_any_names_and_dtypes_lie_aligned(found: dict[str, torch.dtype], rows: int) -> None:
    value = {name: _tensor(dtype, rows, 3) for name, dtype in found.items()}
    image = image_of(part_of(value))
    layout = image.layout
    assert len(layout.header) % ALIGNMENT == 0
    position = len(layout.header)
    for placed in layout.placed:
        assert placed.begin == position
        assert placed.begin % placed.slice.spec.dtype.itemsize == 0
        position = placed.end
    assert position == layout.nbytes == len(image.data)
    loaded = safetensors.torch.load(bytes(image.data))
    assert {n: bytes_of(t) for n, t in loaded.items()} == {
        f"part/{name}": bytes_of(tensor) for name, tensor in value.items()
    }


def test_the_header_is_what_its_length_says() -> None:
    layout = image_of(Small(1).captured()).layout
    length = int.from_bytes(layout.header[:8], "little")
    assert len(layout.header) == 8 + length
    entries = json.loads(layout.header[8:])
    assert entries["__metadata__"] == {"format": "pt"}
    assert len(entries) == 1 + len(layout.placed)


def test_the_same_slices_give_the_same_bytes() -> None:
    first, second = (image_of(Small(1).captured()) for _ in range(2))
    assert bytes(first.data) == bytes(second.data)


def test_more_tensors_than_a_header_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "MAX_HEADER_NBYTES", 256)
    with pytest.raises(UnsupportedStateError, match="too many tensors"):
        image_of(Small(1).captured())


def test_a_layout_is_planned_without_touching_tensors() -> None:
    """On the meta device there is nothing to touch."""
    with torch.device("meta"):
        captured = part_of({"x": 1})
        tensors = {"part/x": torch.empty(1000, 1000)}
    part = captured["part"]
    scopes = {"part/x": Scope.RANK_ZERO}
    spec = specs_of(
        {"part": type(part)(**{**vars(part), "tensors": tensors, "scopes": scopes})},
        rank=0,
        world_size=1,
    )
    assert plan(shard.Slice(spec=s, start=0, stop=s.box.rows) for s in spec).nbytes > 4_000_000
