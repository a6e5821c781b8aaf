"""`export`: what each of the tools it writes for reads back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from ray_accel_ckpt.cli.export import To
from ray_accel_ckpt.runtime import progress
from tests.cli import runs
from tests.cli.commands import document, refused, run, told
from tests.helpers_image import flip


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return runs.Worker(20, 0, 2).model.state_dict()


def _same(found: Any, weights: dict[str, torch.Tensor]) -> bool:
    return list(found) == list(weights) and all(
        torch.equal(t, found[n]) for n, t in weights.items()
    )


@pytest.mark.parametrize("to", ["safetensors", "torch"])
def test_a_bar_shows_how_much_is_read(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    counts: list[progress._Far],
    to: str,
) -> None:
    monkeypatch.setattr(progress, "_on_terminal", lambda: True)
    told("export", checkpoint, tmp_path / "out", "--to", to)
    total = sum(file.stat().st_size for file in checkpoint.glob("shard-*"))
    ((name, nbytes, read),) = [(far.name, far.nbytes, far.read) for far in counts]
    assert (name, nbytes) == (checkpoint.name, total)
    assert 0 < read <= total


def test_to_safetensors(checkpoint: Path, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    out = tmp_path / "out"
    found = document("export", checkpoint, out, "--to", "safetensors")
    files = ["model.safetensors", "model.safetensors.index.json"]
    assert found == {"to": "safetensors", "written": [str(out / name) for name in files]}
    read = load_file(out / "model.safetensors")
    assert _same({name: read[name] for name in weights}, weights)


def test_to_torch(checkpoint: Path, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    out = tmp_path / "model.pt"
    assert told("export", checkpoint, out, "--to", "torch") == f"written: {out}\n"
    found = torch.load(out, weights_only=True)
    assert list(found) == ["model", "optimizer", "loader", "scheduler", "progress"]
    assert _same(found["model"], weights)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_to_dcp(checkpoint: Path, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    out = tmp_path / "out"
    found = document("export", checkpoint, out, "--to", "dcp", "--part", "model")
    assert found == {"to": "dcp", "written": [str(out)]}
    state = {"model": {name: torch.full_like(t, 9) for name, t in weights.items()}}
    dcp.load(state, checkpoint_id=out, no_dist=True)
    assert _same(state["model"], weights)


def test_to_accelerate(checkpoint: Path, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    out = tmp_path / "out"
    found = document("export", checkpoint, out, "--to", "accelerate")
    assert found == {"to": "accelerate", "written": [str(out)]}
    read = load_file(out / "model.safetensors")
    assert _same({name: read[name] for name in weights}, weights)
    assert "loads all of a folder" in refused(
        "export", checkpoint, tmp_path / "part", "--to", "accelerate", "--part", "model"
    )


@pytest.mark.parametrize("to", To)
def test_what_was_written_is_told_by_absolute_paths(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in document("export", checkpoint, "out", "--to", to)["written"]:
        assert path.startswith(f"{tmp_path}/out")


def test_a_folder_for_accelerate_is_written_to_this_machine_alone(checkpoint: Path) -> None:
    said = refused("export", checkpoint, "s3://b/out", "--to", "accelerate")
    assert "must be a local path, not 's3://b/out'" in said


@pytest.mark.parametrize("to", To)
def test_nothing_is_overwritten(checkpoint: Path, tmp_path: Path, to: str) -> None:
    out = tmp_path / "out"
    told("export", checkpoint, out, "--to", to)
    files = [out] if out.is_file() else list(out.iterdir())
    before = {path: path.read_bytes() for path in files}
    refused("export", checkpoint, out, "--to", to)
    assert {path: path.read_bytes() for path in files} == before


def test_parts_are_chosen(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "two.pt"
    told("export", checkpoint, out, "--to", "torch", "--part", "progress", "--part", "scheduler")
    found = torch.load(out, weights_only=True)
    assert list(found) == ["progress", "scheduler"]
    assert found["progress"]["global_step"] == 20


def test_what_cannot_be_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    both = ["--part", "model", "--part", "optimizer"]
    assert "hold one part" in refused("export", checkpoint, out, "--to", "safetensors", *both)
    assert "it has: model, " in refused(
        "export", checkpoint, out, "--to", "torch", "--part", "modle"
    )
    assert "these are shared: model" in refused(
        "export", checkpoint, out, "--to", "torch", "--part", "rng"
    )
    assert not out.exists()
    assert run("export", checkpoint, out).exit_code == 2
    known = ", ".join(f"'{to}'" for to in To)
    assert known in run("export", checkpoint, out, "--to", "x").stderr


@pytest.mark.parametrize("to", To)
def test_damage_makes_no_model(checkpoint: Path, tmp_path: Path, to: str) -> None:
    flip(checkpoint, "model/0.weight")
    out = tmp_path / "out"
    assert "bytes of tensor 'model/0.weight'" in refused("export", checkpoint, out, "--to", to)
    assert not out.exists() or list(out.iterdir()) == []
