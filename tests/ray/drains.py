"""Ray's own drain request, as a cloud's notice makes it."""

from __future__ import annotations

import time

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
