"""The manifest: written, read, described by a schema."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_accel_ckpt.errors import CorruptCheckpointError, UnsupportedStateError
from ray_accel_ckpt.image import hashing as images
from ray_accel_ckpt.image import manifest as manifests
from ray_accel_ckpt.image.image import Hashing
from ray_accel_ckpt.image.manifest import (
    Manifest,
    decode,
    encode,
    manifest_name,
    parse_name,
    shard_name,
)
from tests.helpers_image import Small, image_of, part_of, small_image

SCHEMA = Path(__file__).parents[2] / "docs" / "manifest.schema.json"


def _manifest(value: Any = None) -> Manifest:
    image = small_image(1) if value is None else image_of(part_of(value))
    hashing = Hashing(image)
    for _ in hashing.chunks():
        pass
    return hashing.manifest()


def expected_schema() -> dict[str, Any]:
    """What docs/manifest.schema.json must hold."""
    body = Manifest.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "manifest-RRRRR-of-WWWWW.json of ray_accel_ckpt, format versions 2 and 3",
        "description": "One line, ended by a newline; `checksum` is xxh3-128 of the bytes of "
        "`body` as they stand in the file.",
        "type": "object",
        "properties": {
            "checksum": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
            "body": {"$ref": "#/$defs/Manifest"},
        },
        "required": ["checksum", "body"],
        "additionalProperties": False,
        "$defs": {**body.pop("$defs"), "Manifest": body},
    }


def test_what_is_encoded_is_decoded() -> None:
    manifest = _manifest()
    assert decode(encode(manifest), "there") == manifest


def test_what_was_asked_of_it_before_changes_no_byte() -> None:
    """As of a frozen file's slices, which later manifests state again."""
    manifest = _manifest()
    data = encode(manifest)
    assert all(piece.box.size == tuple(piece.sizes) for piece in manifest.slices)
    assert encode(manifest) == data


def test_encoding_gives_one_line_of_ascii() -> None:
    data = encode(_manifest({"ключ": "значение", "new\nline": 1}))
    assert data.isascii()
    assert data.index(b"\n") == len(data) - 1


_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(_values)
def test_any_values_go_through(value: Any) -> None:
    manifest = _manifest({"value": value})
    assert decode(encode(manifest), "there") == manifest


@pytest.mark.parametrize("value", [math.nan, math.inf, 2**80, 1j, (1, 2), {3}, {1: 2}, b"\xff"])
def test_values_that_json_would_bend_go_through(value: Any) -> None:
    manifest = _manifest({"value": value})
    assert decode(encode(manifest), "there") == manifest


def test_an_error_names_the_file() -> None:
    with pytest.raises(CorruptCheckpointError) as caught:
        decode(b"{}", "there/manifest")
    assert caught.value.where == "there/manifest"


@given(st.integers(0, 99_998), st.integers(0, 99_998))
def test_names_are_parsed_as_they_are_made(a: int, b: int) -> None:
    rank, world_size = min(a, b), max(a, b) + 1
    assert parse_name(shard_name(rank, world_size)) == ("shard", rank, world_size)
    assert parse_name(manifest_name(rank, world_size)) == ("manifest", rank, world_size)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "manifest-00000-of-00001.safetensors",
        "shard-00000-of-00001.json",
        "shard-0-of-1.safetensors",
        "xshard-00000-of-00001.safetensors",
        "shard-00000-of-00001.safetensors.tmp",
        ".shard-00000-of-00001.safetensors.0a1b2c3d.partial",
        "manifest-00001-of-00001.json",
        "manifest-00000-of-00000.json",
        "manifest-00000-of-00001.json\n",
    ],
)
def test_other_names_are_not_parsed(name: str) -> None:
    assert parse_name(name) is None


def test_a_checksum_covers_a_block_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (images, manifests):
        monkeypatch.setattr(module, "BLOCK", 64)
    value = {"a": torch.zeros(33), "b": torch.zeros(32), "c": torch.zeros(0), "d": torch.zeros(1)}
    manifest = _manifest(value)
    counts = {info.name: len(info.blocks) for info in manifest.slices}
    assert counts == {"part/a": 3, "part/b": 2, "part/c": 0, "part/d": 1}
    assert decode(encode(manifest), "there") == manifest


def test_chunks_are_the_file_and_may_be_gone_through_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(images, "_CHUNK", 100)
    image = image_of(Small(1).captured())
    hashing = Hashing(image)
    first = [bytes(chunk) for chunk in hashing.chunks()]
    manifest = hashing.manifest()
    assert len(first) > 1
    assert b"".join(first) == bytes(image.data)
    next(iter(hashing.chunks()))
    assert [bytes(chunk) for chunk in hashing.chunks()] == first
    assert hashing.manifest() == manifest


def test_a_manifest_too_long_to_be_read_again_is_not_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest = _manifest()
    monkeypatch.setattr(manifests, "MAX_NBYTES", 1000)
    with pytest.raises(UnsupportedStateError, match="too long"):
        encode(manifest)


def test_the_schema_is_the_models() -> None:
    """If this fails: PYTHONPATH=. python -m tests.pure.test_manifest"""
    assert json.loads(SCHEMA.read_text()) == expected_schema()


@pytest.mark.parametrize("value", [None, {"x": torch.zeros(2, 2), "n": math.nan}, {}, []])
def test_a_real_manifest_satisfies_the_schema(value: Any) -> None:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(encode(_manifest(value))), schema)


@pytest.mark.parametrize("member", ["format", "version", "slices", "shard", "plan", "parts"])
def test_the_schema_misses_what_is_missing(member: str) -> None:
    content = json.loads(encode(_manifest()))
    del content["body"][member]
    with pytest.raises(jsonschema.ValidationError, match=member):
        jsonschema.validate(content, json.loads(SCHEMA.read_text()))


if __name__ == "__main__":
    SCHEMA.write_text(json.dumps(expected_schema(), indent=2) + "\n")
