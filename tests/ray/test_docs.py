"""The loops that README and the first page of the docs show, as they are shown."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parents[2]

_OTHERS = ("accelerate", "transformers", "lightning")

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    # Ray's own, of which there are many.
    pytest.mark.filterwarnings("ignore"),
]


def _snippets(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def _run(code: str, names: dict[str, Any]) -> None:
    exec(compile(code, "snippet", "exec"), names)  # noqa: S102


def make(config: dict[str, Any]) -> tuple[Any, ...]:
    """What README leaves to the reader."""
    x = torch.randn(64, 4)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8, shuffle=True)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, torch.optim.AdamW(model.parameters()), loader, nn.functional.mse_loss


def test_the_loop_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loop, opened, script, memory, others = _snippets(ROOT / "README.md", "python")
    assert "/mnt/shared" in loop
    loop = loop.replace("/mnt/shared", str(tmp_path))
    names: dict[str, Any] = {"torch": torch, "make": make}
    _run(loop.replace("\nTorchTrainer(", "\nresult = TorchTrainer("), names)
    assert names["result"].metrics == {"epoch": 2}
    names["model"] = make({})[0]
    _run(opened, names)
    weights = names["saved"].state_dict("model")
    assert all(torch.equal(t, weights[n]) for n, t in names["model"].state_dict().items())
    script_names: dict[str, Any] = {}
    _run("from ray_accel_ckpt import *\n" + script, script_names)
    assert script_names["ckpt"].global_step == 0
    assert "MemoryTier(every_steps=1, replicas=1)" in memory
    # Each is run, in its place, by the page that it leads to.
    pages = [(ROOT / "docs" / f"{name}.md").read_text() for name in _OTHERS]
    calls = re.findall(r"(Checkpointer\.from_accelerator|checkpointed|\w+Callback)\(", others)
    assert len(calls) == len(pages)
    assert all(f"{call}(" in page for call, page in zip(calls, pages, strict=True))


@pytest.mark.long
def test_getting_started_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs" / "getting-started.md"
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for snippet in _snippets(page, "python"):
        _run(snippet, names)
    assert names["saved"].step == 32
    (_, commands) = _snippets(page, "sh")
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
