"""One file of `torch.save`: read safely, with the states that objects take."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ray_accel_ckpt import Checkpointer
from ray_accel_ckpt.errors import (
    CheckpointExistsError,
    CorruptCheckpointError,
    UnsupportedStateError,
)
from ray_accel_ckpt.integrations import export_torch as module
from ray_accel_ckpt.integrations.export_torch import export_torch
from ray_accel_ckpt.storage.fakes import MemoryFilesystem, RecordingFilesystem
from tests.helpers_image import Holder, flip
from tests.pure.helpers import digest


def _made() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    groups = [{"params": model[2].parameters()}, {"params": model[0].parameters(), "lr": 0.1}]
    return model, torch.optim.AdamW(groups, lr=1e-3)


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    for i in range(3):
        model(torch.full((2, 4), float(i + 1))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return digest(model, optimizer)


def _saved(directory: Path, **objects: Any) -> Path:
    ckpt = Checkpointer()
    for name, state in objects.items():
        ckpt.register_for_checkpointing(**{name: Holder(state)})
    ckpt.save_state(directory / "saved")
    return directory / "saved"


def test_plain_torch_goes_on_from_it(tmp_path: Path) -> None:
    """Two groups, in another order than the model's parameters."""
    ckpt = Checkpointer()
    model, optimizer = ckpt.prepare(*_made())
    _steps(model, optimizer)
    ckpt.save_state(tmp_path / "saved")
    path = export_torch(tmp_path / "saved", tmp_path / "model.pt")
    whole = _steps(model, optimizer)
    states = torch.load(path, weights_only=True)
    other, resumed = _made()
    other.load_state_dict(states["model"])
    resumed.load_state_dict(states["optimizer"])
    assert _steps(other, resumed) == whole


def test_its_optimizer_state_is_torchs_own(tmp_path: Path) -> None:
    ckpt = Checkpointer()
    model, optimizer = ckpt.prepare(*_made())
    _steps(model, optimizer)
    ckpt.save_state(tmp_path / "saved")
    found = torch.load(
        export_torch(tmp_path / "saved", tmp_path / "model.pt", parts=("optimizer",)),
        weights_only=True,
    )
    assert list(found) == ["optimizer"]
    assert digest(found["optimizer"]) == digest(optimizer.state_dict())


def test_values_that_torch_reads_safely(tmp_path: Path) -> None:
    state = {
        "plain": [None, True, 1, 2**70, 1.5, float("inf"), 1j, "text", b"bytes", bytearray(b"x")],
        "nested": ((1, 2), {3}, collections.OrderedDict(a=1), {4: "four"}),
        "torch": [torch.float8_e4m3fn, torch.Size([1, 2]), torch.device("cpu")],
        "tensors": [torch.arange(3), torch.ones(2).bfloat16(), torch.empty(0, 4), torch.tensor(1)],
    }
    path = export_torch(_saved(tmp_path, it=state), tmp_path / "out.pt")
    assert digest(torch.load(path, weights_only=True)["it"]) == digest(state)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    weight = torch.ones(1000)
    path = export_torch(_saved(tmp_path, it={"a": weight, "b": weight}), tmp_path / "out.pt")
    found = torch.load(path, weights_only=True)["it"]
    assert found["a"].data_ptr() == found["b"].data_ptr()
    assert Path(path).stat().st_size < 2 * weight.nbytes


@pytest.mark.parametrize(
    "value",
    [np.zeros(2), np.float32(1), frozenset({1}), collections.deque([1])],
    ids=lambda value: type(value).__name__,
)
def test_what_torch_would_unpickle_is_refused_by_place(tmp_path: Path, value: Any) -> None:
    """Should torch read one of these safely some day, this one may let it through."""
    saved = _saved(tmp_path, it={"deep": [value]})
    with pytest.raises(UnsupportedStateError, match="reads no") as caught:
        export_torch(saved, tmp_path / "out.pt")
    assert caught.value.where == "it/deep/0"
    assert not (tmp_path / "out.pt").exists()
    torch.save(value, tmp_path / "raw.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "raw.pt", weights_only=True)
    others = export_torch(saved, tmp_path / "out.pt", parts=("progress",))
    assert torch.load(others, weights_only=True)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_nothing_is_overwritten(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out.pt"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
    with pytest.raises(CheckpointExistsError):
        export_torch(_saved(tmp_path), out)
    assert kind == "directory" or out.read_text() == "mine"


def test_it_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = RecordingFilesystem(MemoryFilesystem())
    monkeypatch.setattr(module, "resolve", lambda path: (recording, str(path)))
    export_torch(_saved(tmp_path), "/there/out.pt")
    writes = [o for o in recording.operations if o.kind != "append"]
    assert [(o.kind, o.path) for o in writes] == [
        ("create", "/there/out.pt"),
        ("complete", "/there/out.pt"),
    ]


def test_every_byte_is_proved(tmp_path: Path) -> None:
    saved = _saved(tmp_path, it=torch.ones(4))
    flip(saved, "it")
    with pytest.raises(CorruptCheckpointError):
        export_torch(saved, tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()
