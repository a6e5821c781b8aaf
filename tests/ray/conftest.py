"""One local Ray cluster for all tests of the session."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
from ray.cluster_utils import Cluster

TRIES = 5


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A head with eight CPUs, which a test may add nodes to.

    Ray gives its raylet 30 s to start, which a busy machine may not make: try again.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray registers a report per poll; the default of 2 s only makes the tests longer.
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.3"
    os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "0.3"
    # For room only, which is there or not; starting processes may take longer.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "10"
    import ray

    for attempt in range(TRIES):
        started = Cluster()
        try:
            started.add_node(num_cpus=8, include_dashboard=False)
            ray.init(address=started.address, log_to_driver=False)
            break
        except Exception:
            _end(started)
            if attempt == TRIES - 1:
                raise
    yield started
    _end(started)


@pytest.fixture(scope="session")
def untouched(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each rank of a run ends with that nothing ever happened to."""
    from tests.ray.runs import digests, fit

    directory = tmp_path_factory.mktemp("untouched")
    fit(directory, "run")
    return digests(directory, "run")


def _end(cluster: Cluster) -> None:
    import ray

    for stop in (ray.shutdown, cluster.shutdown):
        with contextlib.suppress(Exception):
            stop()
