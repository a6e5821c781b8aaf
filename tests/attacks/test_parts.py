"""Parts of a real `Checkpointer` whose values are well-formed, and not what the part writes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ray_accel_ckpt import Checkpointer, ProjectConfiguration
from ray_accel_ckpt.errors import AccelCkptError
from ray_accel_ckpt.image.manifest import SliceInfo
from ray_accel_ckpt.image.pieces import Piece
from ray_accel_ckpt.runtime import session, sinks
from ray_accel_ckpt.runtime.dealer import _chunks
from ray_accel_ckpt.storage.fakes import MemoryFilesystem
from tests.helpers_image import edited

PATH = "p/checkpoints/checkpoint_0"
MANIFEST = f"{PATH}/manifest-00000-of-00001.json"


class Trainer:
    """Everything that can be registered, after two steps."""

    def __init__(self) -> None:
        project = ProjectConfiguration("p", automatic_checkpoint_naming=True)
        self.ckpt = Checkpointer(project_config=project, seed=3)
        data = TensorDataset(torch.arange(12.0).reshape(6, 2))
        model = nn.Linear(2, 1)
        optimizer = torch.optim.AdamW(model.parameters())
        loader = DataLoader(data, batch_size=2, shuffle=True)
        self.model, self.optimizer, self.loader = self.ckpt.prepare(model, optimizer, loader)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        self.ckpt.register_for_checkpointing(self.scheduler)
        for _, (batch,) in zip(range(2), self.loader, strict=False):
            self.model(batch).sum().backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.ckpt.step()

    def state(self) -> str:
        """All that a load could change, to be compared."""
        torch.set_printoptions(profile="full", precision=12)
        cursor = getattr(self.loader, "cursor", None)
        return repr(
            (
                self.model.state_dict(),
                self.optimizer.state_dict(),
                self.scheduler.state_dict(),
                cursor,
                self.ckpt.global_step,
                self.ckpt.epoch,
                torch.get_rng_state().tolist(),
                random.getstate(),
                np.random.get_state()[1].tolist(),
            )
        )


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> MemoryFilesystem:
    """A checkpoint of a `Trainer`."""
    found = MemoryFilesystem()
    for module in (session, sinks):
        monkeypatch.setattr(module, "resolve", lambda path: (found, str(path)))
    Trainer().ckpt.save_state()
    return found


def _refused(memory: MemoryFilesystem) -> None:
    victim = Trainer()
    before = victim.state()
    with pytest.raises(AccelCkptError):
        victim.ckpt.load_state(PATH)
    assert victim.state() == before


def test_the_checkpoint_is_good(memory: MemoryFilesystem) -> None:
    victim = Trainer()
    assert victim.ckpt.load_state(PATH)


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        "text",
        [],
        {},
        {"x": 1},
        {"!": "dict", "pairs": 7},
        {"!": "dict", "pairs": [7]},
        {"!": "dict", "pairs": [["a"]]},
        {"!": "tuple", "items": []},
        {"!": "tensor"},
    ],
    ids=repr,
)
@pytest.mark.parametrize("part", ["progress", "model", "optimizer", "loader", "rng"])
def test_a_part_of_another_structure(memory: MemoryFilesystem, part: str, value: Any) -> None:
    def change(body: dict[str, Any]) -> None:
        assert part in body["parts"]
        body["parts"][part]["value"] = value

    memory.files[MANIFEST] = edited(memory.files[MANIFEST], change)
    _refused(memory)


@pytest.mark.parametrize("value", [None, "1", [], -1], ids=repr)
@pytest.mark.parametrize("member", ["global_step", "epoch"])
def test_counters_that_do_not_count(memory: MemoryFilesystem, member: str, value: Any) -> None:
    def change(body: dict[str, Any]) -> None:
        body["parts"]["progress"]["value"][member] = value

    memory.files[MANIFEST] = edited(memory.files[MANIFEST], change)
    _refused(memory)


@pytest.mark.parametrize("value", [None, "1", []], ids=repr)
@pytest.mark.parametrize("member", ["consumed", "epoch", "seed"])
def test_a_position_that_is_none(memory: MemoryFilesystem, member: str, value: Any) -> None:
    def change(body: dict[str, Any]) -> None:
        body["parts"]["loader"]["value"][member] = value

    memory.files[MANIFEST] = edited(memory.files[MANIFEST], change)
    _refused(memory)


@pytest.mark.parametrize(
    "more",
    [
        {"sampler": 7},
        {"sampler": {"epoch": 0, "length": 1, "before": [{}], "now": [{}]}},
        {"entry": None},
        {"entry": {"at": 0, "kind": "dataset", "state": {}, "streams": None}},
        {"loader_workers": 0},
        {"more": 1},
    ],
    ids=repr,
)
def test_a_position_that_holds_what_such_a_loader_has_not(
    memory: MemoryFilesystem, more: dict[str, Any]
) -> None:
    def change(body: dict[str, Any]) -> None:
        body["parts"]["loader"]["value"].update(more)

    memory.files[MANIFEST] = edited(memory.files[MANIFEST], change)
    _refused(memory)


@pytest.mark.parametrize("stream", ["python", "numpy", "torch"])
def test_a_random_stream_that_is_none(memory: MemoryFilesystem, stream: str) -> None:
    """Restored last of all: what is wrong with it must be known before anything is."""

    def change(body: dict[str, Any]) -> None:
        body["parts"]["rng"]["value"][stream] = 7

    memory.files[MANIFEST] = edited(memory.files[MANIFEST], change)
    _refused(memory)


@pytest.mark.parametrize("position", [-1, 625, 2**31 - 1])
def test_a_random_stream_that_stands_outside_its_buffer(
    memory: MemoryFilesystem, position: int
) -> None:
    """numpy believes it, and draws from memory that is not its own."""

    def change(body: dict[str, Any]) -> None:
        body["parts"]["rng"]["value"]["numpy"]["state"]["pos"] = position

    memory.files[MANIFEST] = edited(memory.files[MANIFEST], change)
    _refused(memory)


@pytest.mark.parametrize("kind", ["PCG64", "Mine", 7, []], ids=repr)
def test_a_random_stream_of_another_bit_generator(memory: MemoryFilesystem, kind: Any) -> None:
    def change(body: dict[str, Any]) -> None:
        body["parts"]["rng"]["value"]["numpy"]["bit_generator"] = kind

    memory.files[MANIFEST] = edited(memory.files[MANIFEST], change)
    _refused(memory)


def test_optimizer_state_of_another_shape(memory: MemoryFilesystem) -> None:
    def change(body: dict[str, Any]) -> None:
        state = body["parts"]["optimizer"]["value"]["state"]
        weight, bias = state["model.weight"], state["model.bias"]
        weight["exp_avg"], bias["exp_avg"] = bias["exp_avg"], weight["exp_avg"]

    memory.files[MANIFEST] = edited(memory.files[MANIFEST], change)
    _refused(memory)


def test_rows_without_bytes_are_not_dealt_out_one_by_one() -> None:
    """A shape [2**61, 0] holds nothing: dealing it out in chunks would take for ever."""
    info = SliceInfo(
        name="part/x",
        scope="rank_zero",
        dtype="uint8",
        shape=[2**30, 0],
        offsets=[0, 0],
        sizes=[2**30, 0],
        begin=64,
        end=64,
        blocks=[],
    )
    assert len(list(_chunks([Piece.whole(info)]))) <= 1


@pytest.mark.parametrize("extra", [[], 7, {"state": {}}, {"param_groups": []}], ids=repr)
def test_more_of_an_optimizer_than_it_has(memory: MemoryFilesystem, extra: Any) -> None:
    def change(body: dict[str, Any]) -> None:
        body["parts"]["optimizer"]["value"]["extra"] = extra

    memory.files[MANIFEST] = edited(memory.files[MANIFEST], change)
    _refused(memory)


def test_a_model_with_a_key_that_is_no_text(memory: MemoryFilesystem) -> None:
    def change(body: dict[str, Any]) -> None:
        model = body["parts"]["model"]
        pairs = [[name, value] for name, value in model["value"].items()]
        model["value"] = {"!": "dict", "pairs": [*pairs, [5, 1]]}

    memory.files[MANIFEST] = edited(memory.files[MANIFEST], change)
    _refused(memory)


def test_a_tensor_of_another_part(memory: MemoryFilesystem) -> None:
    """Momentum that is the live weight would change with it."""

    def change(body: dict[str, Any]) -> None:
        state = body["parts"]["optimizer"]["value"]["state"]
        state["model.weight"]["exp_avg"]["name"] = "model/weight"

    memory.files[MANIFEST] = edited(memory.files[MANIFEST], change)
    _refused(memory)


@pytest.mark.parametrize("part", ["loader", "progress"])
@pytest.mark.parametrize("value", [1 << 64, -(1 << 64), 1 << 20_000], ids=["2^64", "-2^64", "long"])
def test_a_number_beyond_any_count(memory: MemoryFilesystem, part: str, value: int) -> None:
    def change(body: dict[str, Any]) -> None:
        for member in ("seed", "epoch"):
            body["parts"][part]["value"][member] = {"!": "int", "hex": hex(value)}

    memory.files[MANIFEST] = edited(memory.files[MANIFEST], change)
    _refused(memory)


def test_a_random_stream_with_numbers_that_overflow(memory: MemoryFilesystem) -> None:
    def change(body: dict[str, Any]) -> None:
        state = {"!": "tuple", "items": [-1] * 625}
        body["parts"]["rng"]["value"]["python"] = {"!": "tuple", "items": [3, state, None]}

    memory.files[MANIFEST] = edited(memory.files[MANIFEST], change)
    _refused(memory)
