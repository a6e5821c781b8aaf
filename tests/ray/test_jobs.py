"""`ray job submit`, `ray job stop` half way, and `ray job submit` again."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests.ray.conftest import TRIES
from tests.ray.runs import digests, record, records, until

# Ray's own handling of files and deprecated calls is not what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def head_of_its_own() -> Iterator[tuple[str, Any]]:
    """A head beside the tests' cluster: the address of its job server, and the node."""
    for attempt in range(TRIES):
        head = Cluster()
        try:
            # Free ports: the usual ones are the other cluster's.
            node = head.add_node(
                num_cpus=4,
                include_dashboard=True,
                dashboard_port=0,
                dashboard_agent_listen_port=0,
            )
            break
        except Exception:
            with contextlib.suppress(Exception):
                head.shutdown()
            if attempt == TRIES - 1:
                raise
    try:
        yield f"http://{node.webui_url}", node
    finally:
        head.shutdown()


@pytest.fixture
def job_server(untouched: list[str]) -> Iterator[str]:
    del untouched  # needs the other cluster, and is the heavier part: before this one starts
    with head_of_its_own() as (server, _):
        yield server


def _ray_job(command: str, server: str, *arguments: str) -> str:
    ray = [str(Path(sys.executable).with_name("ray")), "job", command, "--address", server]
    for _ in range(10):
        ran = subprocess.run([*ray, *arguments], capture_output=True, text=True, check=False)
        # What a server that has just been started answers.
        if "No available agent" not in ran.stderr:
            break
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_a_job_stopped_half_way_and_submitted_again_ends_with_the_same_bits(
    tmp_path: Path, untouched: list[str], job_server: str
) -> None:
    variables = {"PYTHONPATH": str(ROOT), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3"}
    environment = ("--runtime-env-json", json.dumps({"env_vars": variables}))
    entrypoint = (sys.executable, str(ROOT / "tests" / "ray" / "job.py"), str(tmp_path))
    job = ("--submission-id", "first", "--no-wait")
    _ray_job("submit", job_server, *job, *environment, "--", *entrypoint, "18")
    until(lambda: record(tmp_path / "run").step >= 16)
    stopped = _ray_job("stop", job_server, "first")
    assert "was stopped" in stopped
    assert not list((tmp_path / "run-out").glob("rank-*")), "it had ended: nothing is shown"
    # Waits for the job, and fails if it does.
    _ray_job("submit", job_server, *environment, "--", *entrypoint)
    assert records(tmp_path, "run")[0]["resumed_from"] is not None
    assert digests(tmp_path, "run") == untouched
