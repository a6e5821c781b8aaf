"""Weights as plain safetensors files, loaded by the tools that load such."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ray_accel_ckpt import Checkpointer, errors
from ray_accel_ckpt.integrations.export import export_safetensors
from ray_accel_ckpt.state.part import Captured, Scope
from ray_accel_ckpt.storage.filesystem import LocalFilesystem
from ray_accel_ckpt.storage.writer import write_image
from tests.helpers_image import flip, image_of, part_of


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("counts", torch.arange(5))
        self.register_buffer("scalar", torch.tensor(float("nan")))


def _saved(model: nn.Module, directory: Path) -> Path:
    ckpt = Checkpointer()
    ckpt.prepare(model)
    ckpt.save_state(directory)
    return directory


def _save_part(directory: Path, captured: dict[str, Captured], *, world_size: int = 1) -> Path:
    for rank in range(world_size):
        image = image_of(captured, rank=rank, world_size=world_size)
        write_image(LocalFilesystem(), str(directory), image, timeout=1.0)
    return directory


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """To compare NaNs too."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(_bits(found[name]), _bits(tensor)), name


def test_one_file_holds_every_name_of_the_state_dict(tmp_path: Path) -> None:
    model = Tied()
    written = export_safetensors(_saved(model, tmp_path / "ckpt"), tmp_path / "out")
    names = ["model.safetensors", "model.safetensors.index.json"]
    assert written == tuple(str(tmp_path / "out" / name) for name in names)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    index = json.loads(Path(written[1]).read_text())
    assert set(index["weight_map"]) == set(model.state_dict())
    _assert_same(load_file(written[0]), model.state_dict())
    with safe_open(written[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.uint16, torch.bool])
def test_a_dtype_stays_what_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {"a": torch.arange(12).reshape(3, 4).to(dtype), "empty": torch.empty(0, 3).to(dtype)}
    source = _save_part(tmp_path / "ckpt", part_of(state, name="model"))
    path, _ = export_safetensors(source, tmp_path / "out")
    _assert_same(load_file(path), state)


def test_what_does_not_fit_one_file_goes_into_several(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {f"layer.{i}": torch.randn(4, 4) for i in range(5)} | {"large": torch.randn(100)}
    source = _save_part(tmp_path / "ckpt", part_of(state, name="model"))
    *files, index = export_safetensors(source, tmp_path / "out", max_shard_nbytes=128)
    assert [Path(f).name for f in files] == [
        f"model-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)
    ]
    content = json.loads(Path(index).read_text())
    assert content["metadata"] == {"total_size": 5 * 64 + 400}
    found: dict[str, torch.Tensor] = {}
    for file in files:
        tensors = load_file(file)
        assert all(content["weight_map"][name] == Path(file).name for name in tensors)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 128
        found |= tensors
    assert content["weight_map"].keys() == state.keys()
    _assert_same(found, state)


def test_what_several_workers_wrote_comes_out_whole(tmp_path: Path) -> None:
    state = {"weight": torch.randn(10, 7), "bias": torch.randn(3)}
    source = _save_part(tmp_path / "ckpt", part_of(state, name="model"), world_size=3)
    path, _ = export_safetensors(source, tmp_path / "out")
    _assert_same(load_file(path), state)


def test_other_parts_are_exported_by_name(tmp_path: Path) -> None:
    state = {"shadow.weight": torch.randn(3, 3)}
    source = _save_part(tmp_path / "ckpt", part_of(state, name="average", scope=Scope.RANK_ZERO))
    path, _ = export_safetensors(source, tmp_path / "out", part="average")
    _assert_same(load_file(path), state)
    with pytest.raises(errors.ConfigurationError, match="no part 'model'") as caught:
        export_safetensors(source, tmp_path / "more")
    assert "average" in caught.value.remedy


def test_what_is_no_tensor_is_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {"weight": torch.randn(3), "norm._extra_state": {"scale": 2.0}}
    source = _save_part(tmp_path / "ckpt", part_of(state, name="model"))
    with caplog.at_level(logging.WARNING, "ray_accel_ckpt"):
        path, _ = export_safetensors(source, tmp_path / "out")
    assert "norm._extra_state" in caplog.text
    _assert_same(load_file(path), {"weight": state["weight"]})


def test_a_part_without_tensors_is_refused(tmp_path: Path) -> None:
    source = _save_part(tmp_path / "ckpt", part_of({"nested": {"weight": torch.ones(2)}}))
    with pytest.raises(errors.UnsupportedStateError, match="no tensor to export"):
        export_safetensors(source, tmp_path / "out", part="part")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fnuz])
def test_a_dtype_that_would_come_back_as_another_is_refused(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    source = _save_part(tmp_path / "ckpt", part_of({"w": torch.ones(2).to(dtype)}, name="model"))
    with pytest.raises(errors.UnsupportedStateError, match="cannot export") as caught:
        export_safetensors(source, tmp_path / "out")
    assert caught.value.where == "model/w"
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    source = _saved(Tied(), tmp_path / "ckpt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    path, _ = export_safetensors(source, tmp_path / "out")
    before = Path(path).read_bytes()
    with pytest.raises(errors.CheckpointExistsError, match="weights lie there already"):
        export_safetensors(source, tmp_path / "out", max_shard_nbytes=100)
    assert Path(path).read_bytes() == before
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_damage_is_found_before_a_file_appears(tmp_path: Path) -> None:
    source = _saved(Tied(), tmp_path / "ckpt")
    flip(source, "model/middle.weight")
    with pytest.raises(errors.CorruptCheckpointError, match="not those that were written"):
        export_safetensors(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit", [0, -1, 1.5, True])
def test_a_size_that_cannot_work_is_refused_at_once(tmp_path: Path, limit: Any) -> None:
    with pytest.raises(errors.ConfigurationError, match="max_shard_nbytes"):
        export_safetensors(tmp_path / "nowhere", tmp_path / "out", max_shard_nbytes=limit)


def test_exports_to_a_uri(tmp_path: Path) -> None:
    import fsspec

    model = Tied()
    source = _saved(model, tmp_path / "ckpt")
    paths = export_safetensors(source, "memory://exported/here", max_shard_nbytes=300)
    memory = fsspec.filesystem("memory")
    names = {Path(p).name for p in paths}
    assert {Path(p).name for p in memory.ls("/exported/here", detail=False)} == names
    memory.get("/exported/here/", str(tmp_path / "fetched"), recursive=True)
    found: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "fetched").rglob("*.safetensors"):
        found |= load_file(file)
    _assert_same(found, model.state_dict())


@pytest.mark.parametrize("limit", [10**9, 20_000])
def test_transformers_loads_what_was_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=16)
    model = GPT2LMHeadModel(config).eval()
    source = _saved(model, tmp_path / "ckpt")
    written = export_safetensors(source, tmp_path / "out", max_shard_nbytes=limit)
    assert (len(written) == 2) == (limit == 10**9)
    model.config.save_pretrained(tmp_path / "out")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    _assert_same(loaded.state_dict(), model.state_dict())
    tokens = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
