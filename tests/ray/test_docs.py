"""The loops that the pages show, as they are shown; only places and numbers are made small."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import tune
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from ray_accel_ckpt import (
    Checkpointer,
    EverySteps,
    MaxOverhead,
    MemoryTier,
    open_checkpoint,
    run_config,
)
from tests.pages import ROOT, snippets

_OTHERS = ("accelerate", "transformers", "lightning")

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    # Ray's own, of which there are many.
    pytest.mark.filterwarnings("ignore"),
]


def _run(code: str, names: dict[str, Any], **replaced: str) -> None:
    for old, new in replaced.items():
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, "snippet", "exec"), names)  # noqa: S102


def make(config: dict[str, Any]) -> tuple[Any, ...]:
    """What the pages leave to the reader."""
    x = torch.randn(64, 4)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8, shuffle=True)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, torch.optim.AdamW(model.parameters()), loader, nn.functional.mse_loss


def test_the_loop_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loop, opened, script, memory, others = snippets("README.md", "python")
    names: dict[str, Any] = {"torch": torch, "make": make}
    places = {"/mnt/shared": str(tmp_path), "\nTorchTrainer(": "\nresult = TorchTrainer("}
    _run(loop, names, **places)
    assert names["result"].metrics == {"epoch": 2}
    names["model"] = make({})[0]
    _run(opened, names)
    weights = names["saved"].state_dict("model")
    assert all(torch.equal(t, weights[n]) for n, t in names["model"].state_dict().items())
    script_names: dict[str, Any] = {}
    _run("from ray_accel_ckpt import *\n" + script, script_names)
    assert script_names["ckpt"].global_step == 0
    # Run below, from the page about it.
    assert [memory] == snippets("docs/memory.md", "python")
    # Each is run, in its place, by the page that it leads to.
    pages = [(ROOT / "docs" / f"{name}.md").read_text() for name in _OTHERS]
    calls = re.findall(r"(Checkpointer\.from_accelerator|checkpointed|\w+Callback)\(", others)
    assert len(calls) == len(pages)
    assert all(f"{call}(" in page for call, page in zip(calls, pages, strict=True))


@pytest.mark.long
def test_getting_started_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    # The third is the script without Ray, which has a test of its own.
    for snippet in snippets("docs/getting-started.md", "python")[:2]:
        _run(snippet, names)
    assert names["saved"].step == 32
    (_, commands) = snippets("docs/getting-started.md", "sh")
    for command in commands.splitlines():
        program, *arguments = command.split()
        assert program == "ray-accel-ckpt"
        ran = subprocess.run(
            [sys.executable, "-m", "ray_accel_ckpt.cli", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        assert "checkpoint_00000032" in ran.stdout or "step 32" in ran.stdout
    assert "<svg" in (tmp_path / "first.html").read_text()


def _sharded_and_kept(config: dict[str, Any]) -> None:
    """The lines of docs/memory.md and docs/elastic.md in a loop."""
    model, _, loader, loss_fn = make({})
    names = {
        "torch": torch,
        "fully_shard": fully_shard,
        "model": model,
        "loader": loader,
        "Checkpointer": Checkpointer,
        "EverySteps": EverySteps,
        "MemoryTier": MemoryTier,
    }
    (kept,) = snippets("docs/memory.md", "python")
    _run(kept, names)
    _run(snippets("docs/elastic.md", "python")[1], names)
    ckpt: Any = names["ckpt"]
    for _ in ckpt.epochs(1):
        for x, y in names["loader"]:
            ckpt.backward(loss_fn(names["model"](x), y))
            names["optimizer"].step()
            names["optimizer"].zero_grad()
            ckpt.step()


@pytest.mark.long
def test_the_lines_about_machines_that_come_and_go_run(tmp_path: Path) -> None:
    trainer, _ = snippets("docs/elastic.md", "python")
    names: dict[str, Any] = {
        "TorchTrainer": TorchTrainer,
        "ScalingConfig": ScalingConfig,
        "run_config": run_config,
        "train_loop_per_worker": _sharded_and_kept,
    }
    small = {"TorchTrainer(": "result = TorchTrainer(", "(2, 8)": "(1, 2)"}
    _run(trainer, names, **small, **{"s3://bucket/runs": str(tmp_path)})
    # 64 samples are less than one global batch of 256.
    assert open_checkpoint(names["result"].checkpoint).step == 1


@pytest.mark.long
def test_the_run_of_the_page_about_spot_clusters_runs(tmp_path: Path) -> None:
    (code,) = snippets("docs/spot.md", "python")
    names: dict[str, Any] = {
        "TorchTrainer": TorchTrainer,
        "ScalingConfig": ScalingConfig,
        "run_config": run_config,
        "Checkpointer": Checkpointer,
        "MaxOverhead": MaxOverhead,
        "MemoryTier": MemoryTier,
        "make": make,
    }
    small = {"\nTorchTrainer(": "\nresult = TorchTrainer(", "(2, 4)": "(1, 2)", "=256": "=16"}
    _run(code, names, **small, **{'"epochs": 10': '"epochs": 2', "s3://bucket/runs": str(tmp_path)})
    # However many workers Ray has found room for.
    assert open_checkpoint(names["result"].checkpoint).step == 8
    assert names["result"].metrics == {"epoch": 1}


@pytest.mark.long
def test_a_loop_of_plain_ray_train_becomes_one_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    start, before, after, taken_over, read = snippets("docs/ray-train.md", "python")
    _run(start, names)
    _run(before, names)
    _run(after, names)
    # Both took two epochs of 128 samples by two workers.
    exact = open_checkpoint(names["new"].checkpoint)
    assert (exact.step, names["new"].metrics.keys()) == (8, names["old"].metrics.keys())
    _run(taken_over, names)
    _run(read, names)
    saved = names["saved"]
    weights = saved.state_dict("model")
    assert all(torch.equal(t, weights[n]) for n, t in names["model"].state_dict().items())
    # The new run counts from 0; the optimizer goes on from the old one's 8 steps.
    assert saved.step == 4
    steps = [each["step"].item() for each in saved.state_dict("optimizer")["state"].values()]
    assert steps == [12] * 4


@pytest.mark.long
def test_the_search_of_the_page_about_tune_runs(tmp_path: Path) -> None:
    search, _ = snippets("docs/tune.md", "python")
    model = make({})[0]
    names: dict[str, Any] = {"make": make, "model": model}
    small = {"num_workers=2": "num_workers=1", '"epochs": 10': '"epochs": 7'}
    small |= {"num_samples=8, max_concurrent_trials=4": "num_samples=2, max_concurrent_trials=1"}
    _run(search, names, **small, **{"/mnt/shared": str(tmp_path)})
    results: tune.ResultGrid = names["results"]
    assert (len(results), results.num_errors) == (2, 0)
    # 8 steps an epoch: a save after 50, and at the end.
    assert names["saved"].step == 56
    weights = names["saved"].state_dict("model")
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
