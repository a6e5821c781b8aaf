"""A local Ray cluster whose nodes come and go. Each has one slot, for one worker."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

TRIES = 5
"""Ray gives a raylet 30 s to start, which a busy machine may not make."""

_TAG = "RAY_ACCEL_CKPT_CHAOS"

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray registers a report per poll, and sees a dead worker in one.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
    # A group that waits for a node that is gone looks for another one after this.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
}

# Ray's defaults take 15 s and more to call a node dead.
_SYSTEM = {
    "health_check_initial_delay_ms": 2000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 3,
}


class Nodes:
    """The nodes of one cluster: a head for drivers and controllers, and those for workers."""

    def __init__(self, cluster: Cluster, tag: str) -> None:
        self._cluster = cluster
        self._tag = tag
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nodes")
        self._coming: list[Future[None]] = []
        self._there: list[Any] = []
        self.address: str = cluster.address

    def count(self) -> int:
        """Nodes that are there or on their way."""
        self._coming = [future for future in self._coming if not future.done()]
        return len(self._there) + len(self._coming)

    def add(self) -> None:
        """Have a node come; returns before it is there."""
        self._coming.append(self._pool.submit(self._add))

    def lose(self, node_id: str) -> bool:
        """SIGKILL of a node's raylet, which its workers do not outlive; False if it is gone."""
        for node in [node for node in self._there if node.node_id == node_id]:
            self._there.remove(node)
            node.kill_raylet(check_alive=False)
            # The rest of its processes, and what the cluster remembers of it.
            self._pool.submit(self._cluster.remove_node, node, allow_graceful=False)
            return True
        return False

    def lose_any(self) -> None:
        """The youngest node goes."""
        self.settle()
        if self._there:
            self.lose(self._there[-1].node_id)

    def drain(self, node_id: str, seconds: float) -> None:
        """Tell Ray that the cloud takes a node back in `seconds`. Taking it is the caller's."""
        accepted, why = GcsClient(address=self.address).drain_node(
            node_id,
            autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "chaos",
            int((time.time() + seconds) * 1000),
        )
        if not accepted:
            raise RuntimeError(f"the drain was not accepted: {why}")

    def settle(self) -> None:
        """Wait for nodes on their way; raises what kept one from coming."""
        coming, self._coming = self._coming, []
        for future in coming:
            future.result()

    def have(self, count: int) -> None:
        """Exactly so many nodes; waits for them."""
        while self.count() < count:
            self.add()
        self.settle()
        while len(self._there) > count:
            self.lose_any()

    def processes(self) -> dict[int, str]:
        """Processes that Ray runs for jobs in this cluster, by pid: what each calls itself."""
        found = self._processes().items()
        return {pid: title for pid, title in found if not title.startswith(_STANDING)}

    def forget(self) -> None:
        """End all that Ray still runs for jobs, or remembers of them.

        Nodes that a dead driver's job held stay reserved for 180 s otherwise, and an
        elastic job waits so long. Ray starts the actor that reserves them anew.
        """
        for pid, title in self._processes().items():
            if title.startswith((_COORDINATOR, _CLEANER)) or not title.startswith(_STANDING):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _processes(self) -> dict[int, str]:
        found = {}
        for directory in Path("/proc").iterdir():
            if not directory.name.isdigit():
                continue
            # Gone between listing and reading.
            with contextlib.suppress(OSError):
                if self._tag in (directory / "environ").read_bytes():
                    title = (directory / "cmdline").read_bytes().rstrip(b"\0 ").decode()
                    if title.startswith("ray::"):
                        found[int(directory.name)] = title
        return found

    def end(self) -> None:
        self._pool.shutdown(wait=True)
        with contextlib.suppress(Exception):
            self._cluster.shutdown()

    def _add(self) -> None:
        for attempt in range(TRIES):
            try:
                node = self._cluster.add_node(num_cpus=1, resources={"slot": 1})
            except Exception:
                if attempt == TRIES - 1:
                    raise
            else:
                self._there.append(node)
                return


# Ray's own: spare workers, agents, and detached actors that serve the whole cluster, or that
# watch over a controller (by the dashboard, which is not there).
_COORDINATOR = "ray::_AutoscalingCoordinatorActor"
_CLEANER = "ray::PlacementGroupCleaner"
_STANDING = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", _COORDINATOR, _CLEANER)


@contextlib.contextmanager
def started() -> Iterator[Nodes]:
    """A cluster without nodes for workers yet."""
    tag = secrets.token_hex(8)
    os.environ.update(_ENVIRONMENT)
    os.environ[_TAG] = tag
    for attempt in range(TRIES):
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=8, include_dashboard=False, _system_config=_SYSTEM)
            # The head's handlers of signals are enough, and only the main thread may set more.
            cluster._shutdown_at_exit = False
            break
        except Exception:
            with contextlib.suppress(Exception):
                cluster.shutdown()
            if attempt == TRIES - 1:
                raise
    nodes = Nodes(cluster, f"{_TAG}={tag}".encode())
    try:
        yield nodes
    finally:
        nodes.end()
        nodes.forget()
        del os.environ[_TAG]
