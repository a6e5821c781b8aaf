"""One question to Ray's control plane (GCS), asked in a process of its own.

Ray's client waits 40 s for a GCS that is not there, and ends its process when one
has been away for a minute; neither must happen to whoever watches over a node. So
this file is run as a program, and ended by its caller if it takes too long. It uses
what `ray drain-node` uses, and imports nothing of this library, to be quick.

Standard input: a request as JSON. Last line of standard output: the answer as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def answered(request: dict[str, Any]) -> dict[str, Any]:
    """`node_ids` that are meant, or none and `why`. With one, and a `reason`, it is drained:
    then also `accepted` and `refusal`."""
    from ray._private import services
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import autoscaler_pb2

    address = services.canonicalize_bootstrap_address_or_die(request["address"])
    client = GcsClient(address=address)
    node_ids, why = _own_nodes(client, request["node_id"], request["timeout"])
    if len(node_ids) != 1 or request["reason"] is None:
        return {"node_ids": node_ids, "why": why}
    # A node that is dead, or that it never knew, the GCS takes for drained: hence the look before.
    accepted, refusal = client.drain_node(
        node_ids[0],
        autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        request["reason"],
        request["deadline_ms"],
        timeout=request["timeout"],
    )
    return {"node_ids": node_ids, "why": why, "accepted": accepted, "refusal": refusal}


def _own_nodes(client: Any, wanted: str | None, timeout: float) -> tuple[list[str], str]:
    """Their ids, and if there are none, why not."""
    import ray.util
    from ray._private import services
    from ray.core.generated import gcs_pb2

    nodes = client.get_all_node_info(timeout=timeout)
    alive = {
        node_id.hex(): info
        for node_id, info in nodes.items()
        if info.state == gcs_pb2.GcsNodeInfo.ALIVE
    }
    if wanted is not None:
        return [wanted] * (wanted in alive), f"{wanted} is none of Ray's {len(alive)} living nodes"
    # The raylets that run here; from inside a container they may not be seen.
    own_ip = ray.util.get_node_ip_address()
    here = alive.keys() & services.find_node_ids() or {
        node_id for node_id, info in alive.items() if info.node_manager_address == own_ip
    }
    return sorted(here), f"none of Ray's {len(alive)} living nodes runs here, at {own_ip}"


if __name__ == "__main__":
    print("\n" + json.dumps(answered(json.load(sys.stdin))), flush=True)
