"""The daemon as it is, beside a real Ray: what a cloud announces is what Ray is told."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from ray_accel_ckpt.errors import DrainError, NodeNotFoundError
from ray_accel_ckpt.runtime.fake_metadata import FakeMetadata
from ray_accel_ckpt.runtime.ray_node import RayNode
from tests.node.helpers import until

ROOT = Path(__file__).parents[2]


# Ray's own handling of files is not what is tested here.
@pytest.mark.filterwarnings("ignore")
def test_a_notice_becomes_a_drain_with_its_deadline(cluster: Cluster, tmp_path: Path) -> None:
    import ray

    head = ray.get_runtime_context().get_node_id()
    assert RayNode().find() == head, "alone on its machine, a node is found by itself"
    node = cluster.add_node(num_cpus=1, resources={"slot": 1})

    @ray.remote(num_cpus=0, resources={"slot": 1})
    class Busy:
        """A draining node without work would end itself before it is seen to drain."""

        def ready(self) -> bool:
            return True

    busy = Busy.remote()
    assert ray.get(busy.ready.remote())
    # Of the nodes on this one machine none can be guessed, and a stranger is not "drained".
    with pytest.raises(DrainError, match="several nodes"):
        RayNode(address=cluster.address).find()
    with pytest.raises(NodeNotFoundError, match="is none of Ray's"):
        RayNode(address=cluster.address, node_id="ab" * 28).drain("test", None)

    def draining() -> dict[str, int]:
        found: dict[str, int] = ray._private.state.state.get_draining_nodes()
        return found

    options = ["--address", cluster.address, "--node-id", node.node_id, "--margin", "5"]
    log = tmp_path / "log"
    # Clouds give whole seconds.
    deadline = int(time.time()) + 900
    with FakeMetadata("azure") as cloud, log.open("w") as stderr:
        command = [sys.executable, "-m", "ray_accel_ckpt.cli", "watch-node", *options]
        daemon = subprocess.Popen([*command, "--metadata-url", cloud.url], cwd=ROOT, stderr=stderr)
        try:
            until(lambda: f"watching over Ray node {node.node_id}" in log.read_text(), "no watch")
            assert draining() == {}
            cloud.schedule("Reboot", deadline)
            until(lambda: draining() == {node.node_id: (deadline - 5) * 1000}, "no drain")
            cloud.schedule("Preempt", deadline - 600, event_id="event-2")
            until(lambda: draining() == {node.node_id: (deadline - 605) * 1000}, "not sooner")
            assert ray.get(busy.ready.remote()), "what runs there has its time"
            daemon.terminate()
            cluster.remove_node(node, allow_graceful=False)
            assert daemon.wait(60) == 0
        finally:
            daemon.kill()
            daemon.wait()
    assert "the node is gone" in log.read_text()
