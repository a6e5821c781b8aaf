"""Manifests with the right checksum that claim what is not true."""

from __future__ import annotations

from typing import Any

import pytest

from tests.attacks.conftest import Victim


def _slice(body: dict[str, Any]) -> dict[str, Any]:
    """The record of a float32 tensor of shape [3, 7]."""
    (found,) = (piece for piece in body["slices"] if piece["name"] == "model/0.weight")
    return found  # type: ignore[no-any-return]


def test_what_is_only_rewritten_is_accepted(victim: Victim) -> None:
    """So the refusals below are for what was changed, not for how."""
    victim.edit(lambda body: None)
    victim.loads()
    victim.looks()


@pytest.mark.parametrize(
    "file",
    [
        "../checkpoint_1/shard-00000-of-00001.safetensors",
        "/etc/passwd",
        "./shard-00000-of-00001.safetensors",
        "shard-00000-of-00001.safetensors/../../../etc/passwd",
        "shard-00001-of-00002.safetensors",
        "shard-00000-of-00001.safetensors\0",
        "file:///etc/passwd",
        "",
    ],
)
def test_a_shard_of_another_name(victim: Victim, file: str) -> None:
    victim.edit(lambda body: body["shard"].update(file=file))
    victim.refuses("names the shard")


@pytest.mark.parametrize("nbytes", [-1, 0, 7, 2**40, 2**61, 2**62, 2**64, 1.5, "8", None, True])
def test_a_header_of_another_length(victim: Victim, nbytes: Any) -> None:
    victim.edit(lambda body: body["shard"].update(header_nbytes=nbytes))
    victim.refuses()


def test_a_header_as_long_as_a_huge_shard(victim: Victim) -> None:
    def change(body: dict[str, Any]) -> None:
        body["shard"].update(header_nbytes=2**40, nbytes=2**40)
        body["slices"], body["parts"] = [], {}

    victim.edit(change)
    victim.refuses("header")


@pytest.mark.parametrize("field", ["begin", "end"])
@pytest.mark.parametrize("value", [-1, 1, 10**6, 2**61, 2**62, 2**70, 0.0, None, [0]])
def test_a_range_that_is_not_true(victim: Victim, field: str, value: Any) -> None:
    victim.edit(lambda body: _slice(body).update({field: value}))
    victim.refuses()


@pytest.mark.parametrize("field", ["offsets", "sizes"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("value", [-1, 1, 10**6, 2**61, 2**62, 2**70, 0.0, None, [0]])
def test_a_box_that_is_not_true(victim: Victim, field: str, dim: int, value: Any) -> None:
    victim.edit(lambda body: _slice(body)[field].__setitem__(dim, value))
    victim.refuses()


@pytest.mark.parametrize("field", ["offsets", "sizes"])
@pytest.mark.parametrize("value", [[], [0], [0, 0, 0], [3, 7, 1], [0] * 65, None, 0, {}])
def test_a_box_of_other_dimensions(victim: Victim, field: str, value: Any) -> None:
    victim.edit(lambda body: _slice(body).update({field: value}))
    victim.refuses()


@pytest.mark.parametrize("block", [-1, 0, 1, 63, 65, 64, 2**31, 2**62, 64.0, "64", None, True])
def test_a_block_of_another_length(victim: Victim, block: Any) -> None:
    """64 is a length that a block may have; the number of checksums is another then."""
    victim.edit(lambda body: body["shard"].update(block=block))
    victim.refuses()


def test_ranges_moved_together(victim: Victim) -> None:
    def change(body: dict[str, Any]) -> None:
        piece = _slice(body)
        piece["begin"], piece["end"] = piece["begin"] - 4, piece["end"] - 4

    victim.edit(change)
    victim.refuses("overlap")


def test_a_tensor_left_out_of_the_ranges(victim: Victim) -> None:
    victim.edit(lambda body: body["slices"].pop(1))
    victim.refuses("gaps")


def test_a_tensor_beyond_the_shard(victim: Victim) -> None:
    def change(body: dict[str, Any]) -> None:
        last = max(body["slices"], key=lambda piece: piece["end"])
        body["slices"].append({**last, "name": "model/more", "begin": last["end"]})
        body["slices"][-1]["end"] = last["end"] + last["end"] - last["begin"]

    victim.edit(change)
    victim.refuses("beyond")


def test_a_tensor_that_is_not_aligned(victim: Victim) -> None:
    """Its bytes cannot be viewed as its dtype, which torch says in its own way."""

    def change(body: dict[str, Any]) -> None:
        shard, pieces = body["shard"], body["slices"]
        shift = 1
        at = shard["header_nbytes"]
        for piece in pieces:
            piece["begin"] += shift
            piece["end"] += shift
        shard["nbytes"] += shift
        byte = {**pieces[0], "name": "shared/byte", "dtype": "uint8", "shape": [1]}
        byte |= {"offsets": [0], "sizes": [1], "begin": at, "end": at + 1, "scope": "rank_zero"}
        pieces.insert(0, byte)

    victim.edit(change)
    victim.memory.files["run/checkpoint_1/shard-00000-of-00001.safetensors"] += b"\0"
    victim.refuses("align")


@pytest.mark.parametrize(
    "shape",
    [
        [2**60],
        [2**30, 2**30],
        [2**61] * 64,
        [0, 2**61, 2**61],
        [2**61, 2**61, 0],
        [1] * 65,
        [-1, -21],
        [True],
        ["7"],
        [3.0],
        None,
        {},
    ],
)
def test_a_shape_that_is_not_true(victim: Victim, shape: Any) -> None:
    victim.edit(lambda body: _slice(body).update(shape=shape))
    victim.refuses()


@pytest.mark.parametrize("shape", [[0, 2**61, 2**61], [2**61, 2**61, 0]])
def test_an_empty_shape_that_torch_cannot_hold(victim: Victim, shape: list[int]) -> None:
    """No bytes are claimed, so the byte ranges are true; its strides would overflow."""

    def change(body: dict[str, Any]) -> None:
        piece = {**_slice(body), "name": "shared/empty", "shape": shape, "sizes": shape}
        piece |= {"offsets": [0, 0, 0], "end": piece["begin"], "blocks": []}
        body["slices"].append(piece)
        body["parts"]["shared"]["value"]["empty"] = {
            "!": "tensor",
            "name": "shared/empty",
            "device": "cpu",
        }

    victim.edit(change)
    victim.refuses("shape")


def test_a_tensor_named_twice(victim: Victim) -> None:
    victim.edit(lambda body: body["slices"][0].update(name=body["slices"][1]["name"]))
    victim.refuses("twice")


@pytest.mark.parametrize(
    "dtype", ["object", "float31", "", "Tensor", "float32 ", "torch.float32", "O", "x" * 10**6, 4]
)
def test_an_unknown_dtype(victim: Victim, dtype: Any) -> None:
    victim.edit(lambda body: _slice(body).update(dtype=dtype))
    victim.refuses()


def test_a_dtype_of_another_size(victim: Victim) -> None:
    victim.edit(lambda body: _slice(body).update(dtype="float64"))
    victim.refuses("bytes of its shape")


@pytest.mark.parametrize("blocks", [[], ["0" * 32] * 2, ["0" * 32], ["g" * 32], ["0"], [0], "0"])
def test_other_checksums(victim: Victim, blocks: Any) -> None:
    victim.edit(lambda body: _slice(body).update(blocks=blocks))
    victim.refuses()


@pytest.mark.parametrize("scope", ["per_rank", "everybody", "", None, 0])
def test_another_scope(victim: Victim, scope: Any) -> None:
    def change(body: dict[str, Any]) -> None:
        for piece in body["slices"]:
            piece.update(scope=scope, offsets=[1 for _ in piece["shape"]])

    victim.edit(change)
    victim.refuses()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("world_size", 0),
        ("world_size", 2),
        ("world_size", 10**9),
        ("rank", 1),
        ("rank", -1),
        ("rank", False),
        ("step", -1),
        ("step", 2**63),
        ("step", 1e400),
        ("attempt", "../../x"),
        ("attempt", "abc123\n"),
        ("plan", ""),
        ("saved_at", "now"),
        ("slices", {}),
        ("slices", None),
        ("slices", [None]),
        ("parts", []),
        ("parts", {"": {}}),
        ("parts", {"model": None}),
        ("shard", None),
        ("more", 1),
        ("format", "other"),
        ("format", ["ray_accel_ckpt"]),
        ("version", 0),
        ("version", -1),
        ("version", "1"),
        ("version", 1.0),
        ("version", True),
        ("version", None),
        ("version", 1),
        ("version", 3),
        ("version", 10**100),
    ],
)
def test_another_member(victim: Victim, field: str, value: Any) -> None:
    victim.edit(lambda body: body.update({field: value}))
    victim.refuses()


@pytest.mark.parametrize(
    "field", ["format", "version", "shard", "slices", "parts", "rank", "plan", "saved_at"]
)
def test_a_member_left_out(victim: Victim, field: str) -> None:
    victim.edit(lambda body: body.pop(field))
    victim.refuses()


def test_parts_that_speak_of_tensors_that_are_not_there(victim: Victim) -> None:
    def change(body: dict[str, Any]) -> None:
        body["parts"]["shared"]["value"]["moments"]["name"] = "shared/gone"

    victim.edit(change)
    victim.refuses("no shard holds")
