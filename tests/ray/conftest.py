"""One local Ray cluster for all tests of the session."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

TRIES = 5


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Ray gives its raylet 30 s to start, which a busy machine may not make: try again."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray registers a report per poll; the default of 2 s only makes the tests longer.
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.3"
    import ray

    for attempt in range(TRIES):
        try:
            ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
            break
        except Exception:
            with contextlib.suppress(Exception):
                ray.shutdown()
            if attempt == TRIES - 1:
                raise
    yield
    ray.shutdown()
