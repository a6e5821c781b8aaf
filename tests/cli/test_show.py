"""`show`: what lies in a checkpoint, without a tensor being read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ray_accel_ckpt import Checkpointer
from ray_accel_ckpt.cli import output
from ray_accel_ckpt.storage.catalog import open_snapshot
from ray_accel_ckpt.storage.description import describe
from ray_accel_ckpt.storage.fakes import RecordingFilesystem
from ray_accel_ckpt.storage.filesystem import LocalFilesystem
from tests.cli import runs
from tests.cli.commands import document, refused, told
from tests.helpers_image import Holder, edited


def _parts(found: Any) -> dict[str, Any]:
    return {part["name"]: part for part in found["parts"]}


def _tensors(part: Any) -> dict[str, Any]:
    return {each["path"]: each for each in part["tensors"]}


def _values(part: Any) -> dict[str, str]:
    return {each["path"]: each["value"] for each in part["values"]}


def test_what_a_run_saves(checkpoint: Path) -> None:
    found = document("show", checkpoint)
    about = {key: found[key] for key in ("run", "attempt", "step", "world_size", "rank", "library")}
    assert about == {
        "run": "digits",
        "attempt": runs.ATTEMPT,
        "step": 20,
        "world_size": 2,
        "rank": 0,
        "library": "test",
    }
    assert found["random_streams"] == ["numpy", "python", "torch"]
    parts = _parts(found)
    assert list(parts) == ["model", "optimizer", "loader", "scheduler", "progress", "rng"]
    assert [name for name, part in parts.items() if part["per_rank"]] == ["rng"]
    assert _values(parts["progress"]) == {"global_step": "20", "epoch": "0", "seed": "7"}
    assert _values(parts["loader"])["consumed"] == "0"
    assert _values(parts["rng"])["python/1"] == "tuple of 625"
    assert _values(parts["optimizer"])["groups/0/lr"] == "0.5"


def test_tensors_with_their_shapes_and_scopes(checkpoint: Path) -> None:
    model = _parts(document("show", checkpoint))["model"]
    tensors = _tensors(model)
    worker = runs.Worker(20, 0, 2)
    assert {n: t["shape"] for n, t in tensors.items()} == {
        n: list(t.shape) for n, t in worker.model.state_dict().items()
    }
    assert model["nbytes"] == sum(t.nbytes for t in worker.model.state_dict().values())
    assert tensors["0.weight"]["dtype"] == "float32"
    assert (tensors["0.weight"]["scope"], tensors["1.running_mean"]["scope"]) == (
        "replicated",
        "per_rank",
    )


def test_frozen_files_and_what_is_in_them(tmp_path: Path) -> None:
    found = document("show", tmp_path / runs.saved(tmp_path, 20, frozen=True))
    assert [file["frozen"] for file in found["files"]] == [False, False, True, True]
    names = [file["name"] for file in found["files"]]
    assert [(tmp_path / found["path"] / n).stat().st_size for n in names] == [
        file["nbytes"] for file in found["files"]
    ]
    tensors = _tensors(_parts(found)["model"])
    assert [n for n, t in tensors.items() if t["frozen"]] == ["0.weight"]
    assert tensors["0.weight"]["pieces"] == 2


def test_the_tree_on_a_screen(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "now", lambda: runs.SAVED_AT + 20 + 3 * 86_400)
    lines = told("show", checkpoint).splitlines()
    assert lines[0] == str(checkpoint)
    assert lines[1].startswith("step 20, epoch 0; saved 3 d ago by 2 workers, ")
    assert "├── 0.weight               float32 [8, 4]  128 B  replicated" in lines
    assert "└── seed = 7" in lines
    assert "rng, each worker's own, 2 tensors, 7.6 kB" in lines
    assert sum(line.endswith(".safetensors") or ".safetensors " in line for line in lines) == 2


def test_parts_alone(checkpoint: Path) -> None:
    screen = told("show", checkpoint, "--brief")
    assert "\nmodel, 9 tensors" in screen
    assert "0.weight" not in screen


def test_another_workers_own(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    runs.save(LocalFilesystem(), str(path), 20)
    assert document("show", path, "--rank", 1)["rank"] == 1
    assert "no rank 2: 2 workers saved" in refused("show", path, "--rank", 2)


@pytest.mark.filterwarnings("ignore:.*no_sync.*")
def test_a_real_save_with_ties_and_odd_values(tmp_path: Path) -> None:
    model = nn.Module()
    model.first, model.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    model.second.weight = model.first.weight
    ckpt = Checkpointer()
    ckpt.prepare(model)
    state = {1: "x" * 500, "t": (torch.zeros(2), None), "markup": "[bold]no[/bold]", "e": {}}
    ckpt.register_for_checkpointing(odd=Holder(state))
    ckpt.save_state(tmp_path / "saved")
    parts = _parts(document("show", tmp_path / "saved"))
    assert parts["model"]["nbytes"] == 36
    assert [each["stored"] for each in parts["model"]["tensors"]] == ["model/first.weight"] * 2
    assert list(_tensors(parts["odd"])) == ["t/0"]
    values = _values(parts["odd"])
    assert (values["t/1"], values["markup"], values["e"]) == ("None", "'[bold]no[/bold]'", "{}")
    assert values["[1]"].startswith("'xxx")
    assert len(values["[1]"]) == 60
    screen = told("show", tmp_path / "saved")
    assert "tied to first.weight" in screen
    assert "markup = '[bold]no[/bold]'" in screen
    assert "model, 1 tensor, 36 B" in screen


@pytest.mark.parametrize(
    "value",
    [
        {"!": "tensor", "name": 7},
        {"!": "ndarray", "name": "model/0.bias", "dtype": "nonsense", "shape": [8]},
        {"!": "ndarray", "name": "model/0.bias", "dtype": "<f4", "shape": "x"},
        {"!": "ndarray", "name": "model/0.bias", "shape": [8]},
        {"!": "tuple", "items": 3},
        {"!": "dict", "pairs": [[1]]},
        {"!": "dict", "pairs": [[{"!": "bytes"}, 1]]},
        {"!": "int", "hex": "x"},
        {"!": "unknown"},
    ],
    ids=str,
)
def test_a_manifest_that_an_attacker_wrote_is_refused(checkpoint: Path, value: Any) -> None:
    manifest = checkpoint / "manifest-00000-of-00002.json"
    sound = checkpoint.parent / runs.saved(checkpoint.parent, 40)

    def forge(body: dict[str, Any]) -> None:
        body["parts"]["model"]["value"]["0.bias"] = value

    manifest.write_bytes(edited(manifest.read_bytes(), forge))
    refused("show", checkpoint)
    refused("diff", checkpoint, sound, status=2)
    refused("diff", sound, checkpoint, status=2)


def test_no_tensor_is_read(checkpoint: Path) -> None:
    recording = RecordingFilesystem(LocalFilesystem())
    describe(open_snapshot(recording, str(checkpoint)), rank=0)
    assert {Path(read.path).suffix for read in recording.reads} == {".json"}


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    assert "give the directory that holds manifest-*.json" in refused("show", tmp_path)
