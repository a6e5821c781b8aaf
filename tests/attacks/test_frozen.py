"""The file of frozen tensors is believed no more than the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ray_accel_ckpt.errors import CheckpointError
from ray_accel_ckpt.storage.fakes import MemoryFilesystem
from ray_accel_ckpt.storage.writer import write_image
from tests.helpers_image import edited, image_of, opened, part_of

PATH = "run/checkpoint_1"
MANIFEST = f"{PATH}/manifest-00000-of-00001.json"
FROZEN = f"{PATH}/frozen-00000-of-00001.safetensors"


@pytest.fixture
def memory() -> MemoryFilesystem:
    memory = MemoryFilesystem()
    captured = part_of({"still": torch.arange(40.0), "moving": torch.arange(7.0)})
    write_image(memory, PATH, image_of(captured, frozen={"part/still"}), timeout=1.0)
    return memory


def _look(memory: MemoryFilesystem) -> Any:
    saved = opened(memory, PATH)
    saved.verify()
    return saved.state_dict("part")


def test_what_is_only_rewritten_is_accepted(memory: MemoryFilesystem) -> None:
    memory.files[MANIFEST] = edited(memory.files[MANIFEST], lambda body: None)
    assert torch.equal(_look(memory)["still"], torch.arange(40.0))
    assert torch.equal(_look(memory)["moving"], torch.arange(7.0))


def _twice(body: dict[str, Any]) -> None:
    body["frozen"]["slices"][0]["name"] = body["slices"][0]["name"]


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["frozen"]["shard"].update(file="../x/frozen-00000-of-00001.safetensors"),
        lambda body: body["frozen"]["shard"].update(file="/etc/passwd"),
        lambda body: body["frozen"]["shard"].update(file=body["shard"]["file"]),
        lambda body: body["shard"].update(file=body["frozen"]["shard"]["file"]),
        lambda body: body["frozen"]["shard"].update(header_nbytes=2**40, nbytes=2**40),
        lambda body: body["frozen"]["shard"].update(block=0),
        lambda body: body["frozen"]["shard"].update(nbytes=7),
        lambda body: body["frozen"]["slices"].clear(),
        lambda body: body["frozen"]["slices"][0].update(begin=0),
        lambda body: body["frozen"]["slices"][0].update(blocks=[]),
        lambda body: body["frozen"]["slices"].append(7),
        _twice,
        lambda body: body["frozen"].update(more=1),
        lambda body: body.update(frozen=None),
        lambda body: body.update(frozen=[]),
        lambda body: body.pop("frozen"),
        lambda body: body.update(version=2),
    ],
    ids=range(17),
)
def test_a_manifest_that_is_not_true(
    memory: MemoryFilesystem, change: Callable[[dict[str, Any]], Any]
) -> None:
    memory.files[MANIFEST] = edited(memory.files[MANIFEST], change)
    with pytest.raises(CheckpointError):
        _look(memory)


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_file_that_is_cut_off(memory: MemoryFilesystem, keep: int) -> None:
    memory.files[FROZEN] = memory.files[FROZEN][:keep]
    with pytest.raises(CheckpointError, match="frozen-00000"):
        opened(memory, PATH)


def test_a_file_that_is_gone(memory: MemoryFilesystem) -> None:
    del memory.files[FROZEN]
    with pytest.raises(CheckpointError, match="missing"):
        opened(memory, PATH)


def test_each_byte_counts(memory: MemoryFilesystem) -> None:
    whole = memory.files[FROZEN]
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        memory.files[FROZEN] = bytes(damaged)
        with pytest.raises(CheckpointError, match="frozen-00000"):
            _look(memory)
