"""Ray's own drain request, as a cloud's notice makes it, and what Ray has registered."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import ray
from ray.core.generated import autoscaler_pb2


def drain(address: str, node_id: str, *, seconds: float) -> None:
    """Announce that a node is going to be taken away in `seconds`. It stays."""
    accepted, why = ray._raylet.GcsClient(address=address).drain_node(
        node_id,
        autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "a test",
        int((time.time() + seconds) * 1000),
    )
    assert accepted, why


def registered_steps(run: Path) -> list[int]:
    """Steps of the checkpoints that Ray knows, oldest first."""
    try:
        state = json.loads((run / "checkpoint_manager_snapshot.json").read_text())
    except (FileNotFoundError, ValueError):  # not there, or just being written
        return []
    names = [result["checkpoint_dir_name"] for result in state["checkpoint_results"]]
    return sorted(int(name.split("_")[1]) for name in names)


def until(condition: Callable[[], bool], alive: Callable[[], bool]) -> None:
    while not condition():
        assert alive(), "the run ended before its time"
        time.sleep(0.1)
