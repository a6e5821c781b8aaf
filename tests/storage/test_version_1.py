"""Checkpoints of format version 1, as released code wrote them, stay readable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_accel_ckpt.errors import CorruptCheckpointError
from ray_accel_ckpt.storage.filesystem import LocalFilesystem
from tests.helpers_image import Small, edited, newest, opened

DATA = Path(__file__).parents[1] / "data" / "version_1"
MANIFEST = "checkpoint_3/manifest-00001-of-00002.json"


def test_it_was_written_as_version_1() -> None:
    """By two ranks, with a cut tensor and scalars in it."""
    body = json.loads((DATA / MANIFEST).read_text())["body"]
    assert body["version"] == 1
    assert {tuple(piece["shape"]) for piece in body["slices"]} >= {(), (3, 7)}


def test_it_is_loaded_bit_for_bit() -> None:
    restored = newest(LocalFilesystem(), into := Small(99), str(DATA))
    assert restored is not None
    assert into.bits() == Small(3).bits()


def test_it_is_opened() -> None:
    saved = opened(LocalFilesystem(), str(DATA / "checkpoint_3"))
    saved.verify()
    weights = Small(3).model.state_dict()
    assert all(torch.equal(t, weights[n]) for n, t in saved.state_dict("model").items())
    assert saved.state_dict("own", rank=1)["rank"] == 1


def _slice(body: dict[str, Any], name: str) -> dict[str, Any]:
    return next(piece for piece in body["slices"] if piece["name"] == name)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["slices"][0].pop("offset"),
        lambda body: body["slices"][0].update(shape=None),
        lambda body: body["slices"][0].update(shape=7),
        lambda body: body.update(slices=None),
        lambda body: body.update(slices=[7]),
        lambda body: body.update(shard=None),
        lambda body: _slice(body, "model/0.weight").update(offset=3),
        lambda body: _slice(body, "model/0.weight").update(length=-1),
        lambda body: _slice(body, "model/0.weight").update(offset="1"),
        lambda body: _slice(body, "model/1.num_batches_tracked").update(offset=1),
        lambda body: _slice(body, "model/1.num_batches_tracked").update(length=0),
        lambda body: _slice(body, "model/1.num_batches_tracked").update(length=2),
        lambda body: _slice(body, "model/0.weight").update(sizes=[2, 7]),
        lambda body: body["shard"].update(block=64),
    ],
    ids=range(14),
)
def test_what_is_not_true_is_noticed(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    shutil.copytree(DATA, tmp_path / "run")
    manifest = tmp_path / "run" / MANIFEST
    manifest.write_bytes(edited(manifest.read_bytes(), change))
    with pytest.raises(CorruptCheckpointError):
        opened(LocalFilesystem(), str(tmp_path / "run" / "checkpoint_3"))
