"""Manifests with the right checksum around JSON that is no manifest, or hardly JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ray_accel_ckpt.errors import CorruptCheckpointError
from ray_accel_ckpt.image import manifest as manifests
from tests.attacks.conftest import MANIFEST, SHARD, Victim

_DIGITS = b"9" * 10**5


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"0",
        b'"ray_accel_ckpt"',
        b"[]",
        b"{}",
        b"{",
        b"{}{}",
        b"\0",
        b"[" * 10**5,
        b"[" * 10**5 + b"]" * 10**5,
        b'{"format":' * 10**5,
        b'{"format":' * 10**5 + b"0" + b"}" * 10**5,
        _DIGITS,
        b'{"format":"ray_accel_ckpt","version":' + _DIGITS + b"}",
        b'{"format":"ray_accel_ckpt","version":1e999999999}',
        b'{"format":"ray_accel_ckpt","version":NaN}',
        b'{"format":"ray_accel_ckpt","version":1,"slices":[' + b"{}," * 10**5 + b"{}]}",
        b'{"format":"ray_accel_ckpt","version":1,"slices":[' + b"0," * 10**6 + b"0]}",
        b'{"format":"\xff\xfe"}',
        b"\xff\xfe" + '{"format":"ray_accel_ckpt"}'.encode("utf-16-le"),
        b"\xef\xbb\xbf{}",
        b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07payload\x94.",
    ],
    ids=range(23),
)
def test_a_body_that_is_no_manifest(victim: Victim, body: bytes) -> None:
    victim.forge(body)
    victim.refuses()


@pytest.mark.parametrize("member", [b"NaN", b"Infinity", b"-Infinity", _DIGITS])
def test_numbers_that_are_none(victim: Victim, member: bytes) -> None:
    victim.edit(lambda body: body["parts"]["shared"].update(value="HERE"))
    body = json.dumps(json.loads(victim.memory.files[MANIFEST])["body"]).encode()
    victim.forge(body.replace(b'"HERE"', member))
    victim.refuses()


@pytest.mark.parametrize("depth", [900, 10**5])
def test_values_nested_too_deep(victim: Victim, depth: int) -> None:
    victim.edit(lambda body: body["parts"]["shared"].update(value="HERE"))
    body = json.dumps(json.loads(victim.memory.files[MANIFEST])["body"]).encode()
    victim.forge(body.replace(b'"HERE"', b'{"a":' * depth + b"0" + b"}" * depth))
    with pytest.raises(CorruptCheckpointError):
        victim.loads()


def test_a_name_that_is_no_text(victim: Victim) -> None:
    """A lone surrogate: JSON can spell it, UTF-8 cannot."""
    victim.edit(lambda body: body["slices"][0].update(name="model/\ud800"))
    victim.refuses()


@pytest.mark.parametrize("name", ["", "x" * 5000, 7, None])
def test_a_name_that_is_none(victim: Victim, name: Any) -> None:
    victim.edit(lambda body: body["slices"][0].update(name=name))
    victim.refuses()


@pytest.mark.parametrize("cut", [0, 1, 12, 44, 45, 54, 55])
def test_too_short_to_hold_a_checksum(victim: Victim, cut: int) -> None:
    victim.memory.files[MANIFEST] = victim.memory.files[MANIFEST][:cut]
    victim.refuses()


def test_something_before_and_after(victim: Victim) -> None:
    good = victim.memory.files[MANIFEST]
    for data in (b" " + good, good + b" ", good[:-1], good + good, b"\xef\xbb\xbf" + good):
        victim.memory.files[MANIFEST] = data
        victim.refuses()


def test_a_checksum_in_capitals(victim: Victim) -> None:
    good = victim.memory.files[MANIFEST]
    victim.memory.files[MANIFEST] = good[:13] + good[13:45].upper() + good[45:]
    victim.refuses()


def test_a_manifest_too_long_to_be_one(victim: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is read: it may be as long as the disk."""
    monkeypatch.setattr(manifests, "MAX_NBYTES", 100)
    victim.refuses("too long")


@pytest.mark.parametrize("name", [MANIFEST, SHARD])
def test_a_directory_under_our_name(victim: Victim, name: str) -> None:
    victim.memory.files[f"{name}/x"] = victim.memory.files.pop(name)
    victim.refuses()
