"""torch.distributed.checkpoint reads our checkpoints, in one process. In several: tests/gloo."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from ray_accel_ckpt import Checkpointer, errors, open_checkpoint
from ray_accel_ckpt.image import hashing as images
from ray_accel_ckpt.image.manifest import manifest_name
from ray_accel_ckpt.integrations.dcp import CheckpointReader, from_dcp, to_dcp
from ray_accel_ckpt.integrations.dcp.whole import write_whole
from ray_accel_ckpt.state.part import Captured, Scope
from ray_accel_ckpt.storage.filesystem import LocalFilesystem
from ray_accel_ckpt.storage.writer import write_image
from tests.helpers_image import flip, forged, image_of, part_of

# DCP tells everyone who loads in one process that it does so.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


class Network(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.frozen(self.norm(self.embed(tokens))))


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    named = list(model.named_parameters())
    decayed = [p for n, p in named if n.startswith("embed")]
    rest = [p for n, p in named if not n.startswith("embed") and p.requires_grad]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.01)


def _trained(seed: int, steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Network(seed)
    optimizer = _adamw(model)
    for _ in range(steps):
        model(torch.arange(11)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def _saved(directory: Path, *objects: Any, **registered: Any) -> Path:
    ckpt = Checkpointer()
    ckpt.prepare(*objects)
    ckpt.register_for_checkpointing(**registered)
    ckpt.save_state(directory)
    return directory


def _save_parts(directory: Path, captured: dict[str, Captured], world_size: int = 1) -> Path:
    for rank in range(world_size):
        image = image_of(captured, rank=rank, world_size=world_size)
        write_image(LocalFilesystem(), str(directory), image, timeout=1.0)
    return directory


def _load(state: dict[str, Any], checkpoint: Any, **options: Any) -> dict[str, Any]:
    dcp.load(state, storage_reader=CheckpointReader(checkpoint, **options), no_dist=True)
    return state


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and a == b


def _cloned(state: Any) -> Any:
    return torch.utils._pytree.tree_map(
        lambda v: v.clone() if isinstance(v, torch.Tensor) else v, state
    )


# --- reading --------------------------------------------------------------------------------


def test_dcp_loads_a_model_and_its_optimizer(tmp_path: Path) -> None:
    model, optimizer = _trained(1)
    source = _saved(tmp_path / "ckpt", model, optimizer)
    expected = _cloned((model.state_dict(), get_optimizer_state_dict(model, optimizer)))
    model, optimizer = _trained(2, steps=1)
    optimizer.param_groups[0]["lr"] = 0.5
    state = {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    _load(state, source)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    assert _same(dict(model.state_dict()), dict(expected[0]))
    assert _same(get_optimizer_state_dict(model, optimizer), expected[1])
    assert model.head.weight is model.embed.weight


def test_dcp_loads_a_flattened_optimizer(tmp_path: Path) -> None:
    model, optimizer = _trained(1)
    source = _saved(tmp_path / "ckpt", model, optimizer)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    expected = _cloned(get_optimizer_state_dict(model, optimizer, options=options))
    model, optimizer = _trained(2, steps=1)
    optimizer.param_groups[1]["betas"] = (0.5, 0.6)
    state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    assert any(key.startswith("param_groups.norm.weight.") for key in state["optimizer"])
    _load(state, source)
    assert _same(state["optimizer"], expected)


def test_both_names_of_a_tied_weight_are_there(tmp_path: Path) -> None:
    source = _saved(tmp_path / "ckpt", Network(1))
    state = {"model": {n: torch.zeros(11, 6) for n in ("embed.weight", "head.weight")}}
    _load(state, source)
    for tensor in state["model"].values():
        assert torch.equal(tensor, Network(1).embed.weight)


class Narrow(DefaultLoadPlanner):
    """Asks for other rows of each name, as two shardings of a tied weight would."""

    rows: ClassVar[dict[str, tuple[int, int]]] = {
        "model.embed.weight": (8, 3),
        "model.head.weight": (1, 2),
    }

    def create_local_plan(self) -> LoadPlan:
        items = []
        for item in super().create_local_plan().items:
            first, count = self.rows[item.dest_index.fqn]
            offsets, lengths = torch.Size((first, 0)), torch.Size((count, 6))
            items.append(
                replace(item, storage_offsets=offsets, dest_offsets=offsets, lengths=lengths)
            )
        return LoadPlan(items)


def test_names_of_a_tied_weight_may_want_different_rows(tmp_path: Path) -> None:
    with mock.patch.object(images, "BLOCK", 64):
        source = _saved(tmp_path / "ckpt", Network(1))
    state = {"model": {n: torch.zeros(11, 6) for n in ("embed.weight", "head.weight")}}
    dcp.load(state, storage_reader=CheckpointReader(source), planner=Narrow(), no_dist=True)
    for name, (first, count) in Narrow.rows.items():
        expected = torch.zeros(11, 6)
        expected[first : first + count] = Network(1).embed.weight[first : first + count]
        assert torch.equal(state["model"][name.removeprefix("model.")], expected)


def test_a_slice_without_bytes_hides_no_other(tmp_path: Path) -> None:
    """Nothing here writes one beside others, but the format has it."""
    source = _save_parts(tmp_path / "ckpt", part_of({"rows": torch.ones(2, 4)}), world_size=3)
    manifests = [source / manifest_name(rank, 3) for rank in range(3)]
    bodies = [json.loads(manifest.read_text())["body"] for manifest in manifests]
    (idle,) = [rank for rank in range(3) if not bodies[rank]["slices"]]
    (first,) = [i for body in bodies for i in body["slices"] if i["offsets"] == [0, 0]]
    end = bodies[idle]["shard"]["nbytes"]
    empty = {**first, "sizes": [2, 0], "blocks": [], "begin": end, "end": end}
    manifests[idle].write_bytes(forged({**bodies[idle], "slices": [empty]}))
    found = _load({"part": {"rows": torch.zeros(2, 4)}}, source)
    assert torch.equal(found["part"]["rows"], torch.ones(2, 4))


def test_each_optimizer_has_the_names_of_its_own_model(tmp_path: Path) -> None:
    """As of a GAN: DCP asks each optimizer by the model it trains."""
    first, second = _trained(1), _trained(2)
    source = _saved(tmp_path / "ckpt", first[0], second[0], first[1], second[1])
    expected = _cloned(get_optimizer_state_dict(*second))
    other = _trained(3, steps=1)
    state = {"model_1": other[0].state_dict(), "optimizer_1": get_optimizer_state_dict(*other)}
    _load(state, source)
    assert _same(state["optimizer_1"], expected)
    assert _same(dict(other[0].state_dict()), dict(second[0].state_dict()))


def test_an_optimizer_of_several_models_has_full_names(tmp_path: Path) -> None:
    def made() -> tuple[nn.ModuleDict, torch.optim.Optimizer]:
        both = nn.ModuleDict({"model": nn.Linear(2, 3), "model_1": nn.Linear(3, 2)})
        optimizer = torch.optim.SGD(both.parameters(), lr=0.1, momentum=0.9)
        both["model_1"](both["model"](torch.ones(1, 2))).sum().backward()
        optimizer.step()
        return both, optimizer

    both, optimizer = made()
    source = _saved(tmp_path / "ckpt", both["model"], both["model_1"], optimizer)
    expected = _cloned(get_optimizer_state_dict(both, optimizer))
    state = {"optimizer": get_optimizer_state_dict(*made())}
    _load(state, source)
    assert "model_1.weight" in state["optimizer"]["state"]
    assert _same(state["optimizer"], expected)


class Registered:
    """Everything a state may be made of."""

    def __init__(self, number: int) -> None:
        self.number = number

    def state_dict(self) -> dict[str, Any]:
        number = self.number
        return {
            "count": number,
            "array": np.arange(number),
            "pair": (torch.full((2,), number), "text"),
            "history": [{"loss": torch.tensor(number / 3)}, {"loss": torch.tensor(0.0)}],
            "losses": [0.5, float(number)],
            "big": 10**30 + number,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["count"]


def test_registered_objects_and_schedulers_are_there_by_name(tmp_path: Path) -> None:
    model, optimizer = _trained(1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    source = _saved(tmp_path / "ckpt", model, optimizer, scheduler, metric=Registered(7))
    state = {"metric": Registered(2).state_dict(), "scheduler": {"step_size": 0, "gamma": 0.0}}
    _load(state, source)
    found, expected = state["metric"], Registered(7).state_dict()
    assert np.array_equal(found.pop("array"), expected.pop("array"))
    assert _same(found, expected)
    assert state["scheduler"] == {"step_size": 3, "gamma": 0.1}


def test_stateful_objects_are_loaded(tmp_path: Path) -> None:
    """DCP calls `state_dict` and `load_state_dict` of what is stateful itself."""
    source = _saved(tmp_path / "ckpt", metric=Registered(7))
    other = Registered(1)
    _load({"metric": other}, source)
    assert other.number == 7


def test_what_each_worker_has_for_itself_is_that_of_the_rank_named(tmp_path: Path) -> None:
    for rank in range(2):
        captured = part_of({"noise": torch.full((3,), rank)}, name="own", scope=Scope.PER_RANK)
        image = image_of(captured, rank=rank, world_size=2)
        write_image(LocalFilesystem(), str(tmp_path), image, timeout=1.0)
    for rank in range(2):
        state = _load({"own": {"noise": torch.zeros(3, dtype=torch.int64)}}, tmp_path, rank=rank)
        assert state["own"]["noise"].tolist() == [rank] * 3
    with pytest.raises(errors.ConfigurationError, match="no rank 2"):
        CheckpointReader(tmp_path, rank=2)


def test_shapes_of_every_kind(tmp_path: Path) -> None:
    state = {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "wide": torch.randn(7, 300).to(torch.bfloat16),
        "deep": torch.randn(3, 2, 5),
    }
    source = _save_parts(tmp_path / "ckpt", part_of(state), world_size=3)
    found = _load({"part": {n: torch.zeros_like(t) for n, t in state.items()}}, source)
    assert _same(found["part"], state)


def test_a_narrow_read_reads_few_bytes(tmp_path: Path) -> None:
    """Of one layer among many, only its own blocks; the manifest is not counted."""
    block = 256
    state = {f"layer.{i}": torch.randn(64, 16) for i in range(20)}
    with mock.patch.object(images, "BLOCK", block):
        source = _save_parts(tmp_path / "ckpt", part_of(state, name="model"))
    reader = CheckpointReader(source)
    read: list[int] = []
    original = LocalFilesystem.read_into

    def counted(self: Any, path: str, offset: int, buffer: memoryview) -> None:
        read.append(len(buffer))
        original(self, path, offset, buffer)

    wanted = {"model": {"layer.7": torch.zeros(64, 16)}}
    with mock.patch.object(LocalFilesystem, "read_into", counted):
        dcp.load(wanted, storage_reader=reader, no_dist=True)
    assert torch.equal(wanted["model"]["layer.7"], state["layer.7"])
    assert sum(read) == 64 * 16 * 4


def test_neighbours_are_read_at_once(tmp_path: Path) -> None:
    state = {f"layer.{i}": torch.randn(16, 16) for i in range(50)}
    source = _save_parts(tmp_path / "ckpt", part_of(state, name="model"))
    reader = CheckpointReader(source)
    original, reads = LocalFilesystem.read_into, []

    def counted(self: Any, path: str, offset: int, buffer: memoryview) -> None:
        reads.append(path)
        original(self, path, offset, buffer)

    wanted = {"model": {n: torch.zeros_like(t) for n, t in state.items()}}
    with mock.patch.object(LocalFilesystem, "read_into", counted):
        dcp.load(wanted, storage_reader=reader, no_dist=True)
    assert _same(wanted["model"], state)
    assert len(reads) == 1


def test_damage_is_noticed(tmp_path: Path) -> None:
    source = _saved(tmp_path / "ckpt", Network(1))
    flip(source, "model/frozen.weight")
    state = {"model": Network(2).state_dict()}
    with pytest.raises(CheckpointException) as caught:
        _load(state, source)
    cause = caught.value.failures[0][0]
    assert isinstance(cause, errors.CorruptCheckpointError)
    assert "model/frozen.weight" in cause.what
    assert "frozen.weight" in str(caught.value)
    # Other tensors are proved for themselves.
    _load({"model": {"frozen.bias": torch.zeros(6)}}, source)


def test_an_unknown_name_is_dcps_own_error(tmp_path: Path) -> None:
    source = _saved(tmp_path / "ckpt", Network(1))
    with pytest.raises(CheckpointException, match=r"Missing key.*model\.other"):
        _load({"model": {"other": torch.zeros(1)}}, source)
    with pytest.raises(CheckpointException, match="Size mismatch"):
        _load({"model": {"frozen.bias": torch.zeros(7)}}, source)


def test_the_reader_goes_on_with_another_checkpoint(tmp_path: Path) -> None:
    first, second = (_saved(tmp_path / str(i), Network(i)) for i in (1, 2))
    reader = CheckpointReader(first)
    for path, seed in ((None, 1), (second, 2)):
        state = {"model": Network(3).state_dict()}
        dcp.load(state, storage_reader=reader, checkpoint_id=path, no_dist=True)
        assert _same(dict(state["model"]), dict(Network(seed).state_dict()))
    reader.reset()
    assert reader.checkpoint_id == str(second)


def test_what_is_a_checkpoint_is_told(tmp_path: Path) -> None:
    source = _saved(tmp_path / "ckpt", Network(1))
    assert CheckpointReader.validate_checkpoint_id(source)
    assert not CheckpointReader.validate_checkpoint_id(tmp_path)
    assert not CheckpointReader.validate_checkpoint_id("no-such-scheme://bucket/x")
    next(source.glob("shard-*")).unlink()
    assert CheckpointReader.validate_checkpoint_id(source)
    with pytest.raises(errors.NotACheckpointError):
        CheckpointReader(tmp_path)


def test_values_of_one_name_are_refused(tmp_path: Path) -> None:
    source = _save_parts(tmp_path / "ckpt", part_of({"a": {"b": 1}, "a.b": 2}))
    with pytest.raises(errors.UnsupportedStateError, match="tell two values apart"):
        CheckpointReader(source)


def test_an_optimizer_of_another_shape_is_damage(tmp_path: Path) -> None:
    captured = part_of({"state": {}, "groups": [{"no": "params"}]}, name="optimizer")
    captured["optimizer"] = replace(captured["optimizer"], kind="optimizer")
    with pytest.raises(errors.CorruptCheckpointError, match="state of an optimizer"):
        CheckpointReader(_save_parts(tmp_path / "ckpt", captured))


# --- converting -----------------------------------------------------------------------------


def _write_dcp(directory: Path, state: dict[str, Any]) -> Path:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(directory), no_dist=True)
    return directory


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}


def _loaded(directory: Path | str, **registered: Any) -> dict[str, Any]:
    """The states of a fresh model and optimizer after `load_state` of a converted checkpoint."""
    model = Network(9)
    optimizer = _adamw(model)
    ckpt = Checkpointer()
    ckpt.prepare(model, optimizer)
    ckpt.register_for_checkpointing(**registered)
    assert ckpt.load_state(directory, parts=("model", "optimizer", *registered))
    return _states(model, optimizer)


def test_a_checkpoint_of_dcp_becomes_ours(tmp_path: Path) -> None:
    state = _states(*_trained(1)) | {"metric": Registered(7).state_dict()}
    source = _write_dcp(tmp_path / "dcp", state)
    assert from_dcp(source, tmp_path / "ours") == str(tmp_path / "ours")
    metric = Registered(0)
    found = _loaded(tmp_path / "ours", metric=metric)
    assert _same(dict(found["model"]), dict(state["model"]))
    assert _same(found["optimizer"], state["optimizer"])
    assert metric.number == 7
    opened = open_checkpoint(tmp_path / "ours")
    opened.verify()
    assert opened.world_size == 1


def test_ours_becomes_a_checkpoint_of_dcp(tmp_path: Path) -> None:
    model, optimizer = _trained(1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    source = _saved(tmp_path / "ours", model, optimizer, scheduler, metric=Registered(7))
    assert to_dcp(source, tmp_path / "dcp") == str(tmp_path / "dcp")
    other = _trained(2, steps=1)
    torch.optim.lr_scheduler.StepLR(other[1], 3)
    state = _states(*other) | {"metric": Registered(1).state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    expected = _states(model, optimizer)
    assert _same(dict(state["model"]), dict(expected["model"]))
    assert _same(state["optimizer"], expected["optimizer"])
    assert np.array_equal(state["metric"]["array"], np.arange(7))
    names = dcp.FileSystemReader(tmp_path / "dcp").read_metadata().state_dict_metadata
    # What each worker has for itself has no place there.
    assert {name.partition(".")[0] for name in names} == {
        *("model", "optimizer", "scheduler", "metric", "progress")
    }


def test_there_and_back_are_the_same_bits(tmp_path: Path) -> None:
    model, optimizer = _trained(1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    first = _saved(tmp_path / "1", model, optimizer, scheduler, metric=Registered(7))
    to_dcp(first, tmp_path / "2")
    from_dcp(tmp_path / "2", tmp_path / "3")
    to_dcp(tmp_path / "3", tmp_path / "4")
    a, b = open_checkpoint(first), open_checkpoint(tmp_path / "3")
    shared = ("model", "optimizer", "scheduler", "progress")
    assert all(_same(_plain(a.state_dict(p)), _plain(b.state_dict(p))) for p in shared)
    states = [_states(*_trained(2, steps=1)) for _ in range(2)]
    for state, name in zip(states, ("2", "4"), strict=True):
        dcp.load(state, checkpoint_id=tmp_path / name, no_dist=True)
    assert _same(_plain(states[0]), _plain(states[1]))
    ckpt = Checkpointer()
    model, optimizer = _trained(5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 99)
    ckpt.prepare(model, optimizer, scheduler)
    assert ckpt.load_state(tmp_path / "3", parts=("model", "optimizer", "scheduler"))
    assert scheduler.step_size == 3


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return value


def test_an_optimizer_without_state_is_converted(tmp_path: Path) -> None:
    def made(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Linear(3, 2)
        return model, torch.optim.SGD(model.parameters(), lr=0.1 * seed)

    model, optimizer = made(1)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    from_dcp(_write_dcp(tmp_path / "dcp", state), tmp_path / "ours")
    other, optimizer = made(2)
    ckpt = Checkpointer()
    ckpt.prepare(other, optimizer)
    assert ckpt.load_state(tmp_path / "ours", parts=("model", "optimizer"))
    assert torch.equal(other.weight, model.weight)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_parameter_of_no_model_keeps_its_name(tmp_path: Path) -> None:
    """One that only the optimizer knows, a learned temperature say: it is named by its place."""

    def made(value: float) -> tuple[nn.Module, torch.optim.Optimizer, nn.Parameter]:
        torch.manual_seed(0)
        model, extra = nn.Linear(3, 2), nn.Parameter(torch.tensor([value]))
        optimizer = torch.optim.SGD([*model.parameters(), extra], lr=0.1, momentum=0.9)
        (model(torch.ones(3)).sum() * extra).sum().backward()
        optimizer.step()
        return model, optimizer, extra

    model, optimizer, extra = made(3.0)
    to_dcp(_saved(tmp_path / "1", model, optimizer), tmp_path / "2")
    from_dcp(tmp_path / "2", tmp_path / "3")
    other_model, other, parameter = made(4.0)
    ckpt = Checkpointer()
    ckpt.prepare(other_model, other)
    assert ckpt.load_state(tmp_path / "3", parts=("model", "optimizer"))
    assert _same(other.state[parameter], optimizer.state[extra])
    assert _same(other.state_dict(), optimizer.state_dict())


def test_states_are_found_where_they_are_said_to_be(tmp_path: Path) -> None:
    state = _states(*_trained(1))
    source = _write_dcp(tmp_path / "nested", {"app": state})
    from_dcp(source, tmp_path / "1", model="app.model", optimizer="app.optimizer")
    assert open_checkpoint(tmp_path / "1").parts == ("model", "optimizer")
    assert _same(_loaded(tmp_path / "1")["optimizer"], state["optimizer"])
    source = _write_dcp(tmp_path / "weights", dict(state["model"]))
    from_dcp(source, tmp_path / "2", model="", optimizer=None)
    found = open_checkpoint(tmp_path / "2").state_dict("model")
    assert _same(_plain(found), dict(state["model"]))


@pytest.mark.parametrize(
    ("options", "place"),
    [({}, "model='model'"), ({"model": "app.weights"}, "model='weights'")],
)
def test_a_place_without_anything_is_an_error(
    tmp_path: Path, options: dict[str, Any], place: str
) -> None:
    source = _write_dcp(tmp_path / "dcp", {"app": {"model": {"w": torch.ones(1)}}})
    with pytest.raises(errors.ConfigurationError, match=place):
        from_dcp(source, tmp_path / "ours", **options)
    assert not (tmp_path / "ours").exists()


class Opaque:
    pass


def _flattened(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    return get_optimizer_state_dict(model, optimizer, options=options)


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"other": {"a": [Opaque()]}}, "other/a/0"),
        ({"no-name": 3}, "no-name"),
        ({"optimizer": _flattened(*_trained(1))}, "optimizer"),
        ({"optimizer": _trained(1)[1].state_dict()}, "optimizer"),
        ({"model": {"inner": {"weight": torch.ones(1)}}}, "model.inner"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_place(
    tmp_path: Path, state: dict[str, Any], where: str
) -> None:
    source = _write_dcp(tmp_path / "dcp", _states(*_trained(1)) | state)
    with pytest.raises(errors.UnsupportedStateError) as caught:
        from_dcp(source, tmp_path / "ours")
    assert caught.value.where == where
    assert not (tmp_path / "ours").exists()


def test_keys_that_dcp_would_change_are_refused(tmp_path: Path) -> None:
    state = {"a": [{"b": {1: 2}}], "weight": torch.ones(1)}
    source = _save_parts(tmp_path / "ours", part_of(state) | part_of({"c": 1}, name="fine"))
    with pytest.raises(errors.UnsupportedStateError, match="key 1") as caught:
        to_dcp(source, tmp_path / "dcp")
    assert caught.value.where == "part/a/0/b"
    assert not (tmp_path / "dcp").exists()
    to_dcp(source, tmp_path / "dcp", parts=("fine",))


def test_what_each_worker_has_for_itself_cannot_be_converted(tmp_path: Path) -> None:
    source = _saved(tmp_path / "ours", Network(1))
    with pytest.raises(errors.ConfigurationError, match="'rng' of its own"):
        to_dcp(source, tmp_path / "dcp", parts=("rng",))
    with pytest.raises(errors.ConfigurationError, match="no part 'other'"):
        to_dcp(source, tmp_path / "dcp", parts=("other",))


def test_converting_overwrites_nothing(tmp_path: Path) -> None:
    ours = _saved(tmp_path / "ours", *_trained(1))
    theirs = Path(to_dcp(ours, tmp_path / "dcp"))
    before = {p: p.read_bytes() for p in (*ours.iterdir(), *theirs.iterdir())}
    with pytest.raises(errors.CheckpointExistsError):
        to_dcp(ours, theirs)
    with pytest.raises(errors.CheckpointExistsError):
        from_dcp(theirs, ours)
    assert {p: p.read_bytes() for p in (*ours.iterdir(), *theirs.iterdir())} == before


def test_damage_is_found_before_anything_is_converted(tmp_path: Path) -> None:
    ours = _saved(tmp_path / "ours", *_trained(1))
    flip(ours, "model/frozen.weight")
    with pytest.raises(errors.CorruptCheckpointError, match=r"model/frozen\.weight"):
        to_dcp(ours, tmp_path / "dcp")
    assert not (tmp_path / "dcp").exists()


def test_what_dcp_did_not_finish_is_no_checkpoint(tmp_path: Path) -> None:
    source = _write_dcp(tmp_path / "dcp", _states(*_trained(1)))
    metadata = (source / ".metadata").read_bytes()
    (source / ".metadata").write_bytes(metadata[:100])
    with pytest.raises(errors.CorruptCheckpointError, match="cannot read its checkpoint"):
        from_dcp(source, tmp_path / "ours")
    (source / ".metadata").unlink()
    with pytest.raises(errors.NotACheckpointError, match=r"no \.metadata there"):
        from_dcp(source, tmp_path / "ours")


def test_what_dcp_failed_by_is_told_without_its_traceback(tmp_path: Path) -> None:
    ours = _saved(tmp_path / "ours", *_trained(1))
    (tmp_path / "file").touch()
    with pytest.raises(errors.StorageError, match="could not write the checkpoint") as caught:
        write_whole({"model": {}}, tmp_path / "file" / "dcp")
    assert re.match(r"NotADirectoryError: .*file", caught.value.why)
    theirs = Path(to_dcp(ours, tmp_path / "dcp"))
    (theirs / "__0_0.distcp").unlink()
    with pytest.raises(errors.CorruptCheckpointError, match="cannot read") as found:
        from_dcp(theirs, tmp_path / "back")
    assert re.match(r"FileNotFoundError: .*__0_0", found.value.why)
    assert "\n" not in caught.value.why + found.value.why


def test_converts_from_and_to_uris(tmp_path: Path) -> None:
    ours = _saved(tmp_path / "ours", *_trained(1))
    theirs = "memory://converted/dcp"
    to_dcp(ours, theirs)
    from_dcp(theirs, "memory://converted/ours")
    assert _same(_plain(_loaded("memory://converted/ours")), _plain(_loaded(ours)))
    with pytest.raises(errors.CheckpointExistsError):
        to_dcp(ours, theirs)
