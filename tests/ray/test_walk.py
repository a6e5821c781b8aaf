"""What README has a newcomer do: a cluster, a job, a loss, a report, the weights."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from ray_accel_ckpt import open_checkpoint
from tests.ray.test_jobs import head_of_its_own

ROOT = Path(__file__).parents[2]

# Ray's own handling of files and deprecated calls is not what is tested here.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.long]

# Only workers of this test's own cluster, whoever else trains on this machine.
PRELUDE = """set -euo pipefail
pgrep() { command pgrep -P "$RAYLET" "$@"; }
"""


def _commands() -> str:
    """Those of the section, but for what the test has done already."""
    section = (ROOT / "README.md").read_text().partition("## From nothing to a report")[2]
    block = re.search(r"^```sh\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    assert block is not None
    lines = block[1].splitlines(keepends=True)
    done = ("make demo", "source ", "ray start ", "export RAY_API", "ray stop")
    kept = [line for line in lines if not line.startswith(done)]
    assert len(lines) - len(kept) == len(done)
    return "".join(kept)


def test_the_walk_of_the_readme(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del cluster  # the heavier part: before this one starts
    # As in a shell in which the environment is activated; the cluster's processes inherit it.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    with head_of_its_own() as (server, node):
        environment = {
            **os.environ,
            "RAY_API_SERVER_ADDRESS": server,
            "RAYLET": str(node.all_processes["raylet"][0].process.pid),
        }
        ran = subprocess.run(
            ["/bin/bash", "-c", PRELUDE + _commands()],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "run digits is done: step 570, saved by 2 workers" in ran.stdout
    assert re.search(r"^\S+/runs/digits: 2 attempts, step 570$", ran.stdout, re.MULTILINE)
    page = (tmp_path / "report.html").read_text()
    assert "failed: rank" in page
    weights = load_file(tmp_path / "weights" / "model.safetensors")
    (last,) = sorted((tmp_path / "runs" / "digits").glob("checkpoint_0*"))[-1:]
    saved = open_checkpoint(last).state_dict("model")
    assert all(torch.equal(weights[name], tensor) for name, tensor in saved.items())
