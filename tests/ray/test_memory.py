"""Snapshots in memory: workers, nodes and drivers are lost, and storage is not read."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from ray_accel_ckpt import open_checkpoint
from ray_accel_ckpt.runtime.keepers import NAMESPACE
from ray_accel_ckpt.runtime.memory import SHARED_MEMORY
from ray_accel_ckpt.storage.catalog import step_of
from tests.ray.runs import digests, directories, fit, until

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    pytest.mark.filterwarnings("ignore"),
]

NEVER = 10_000


@pytest.fixture(scope="module")
def untouched_shards(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """As `untouched`, of a model that is sharded."""
    directory = tmp_path_factory.mktemp("untouched-shards")
    fit(directory, "run", sharded=True)
    return digests(directory, "run")


@pytest.mark.parametrize(
    ("rank", "options"),
    [(0, {"overlap": True}), (1, {"sharded": True})],
)
# In `make test`, a worker is lost among what strikes at random: tests/chaos.
@pytest.mark.long
def test_a_lost_worker_comes_back_from_memory(
    tmp_path: Path, request: pytest.FixtureRequest, rank: int, options: dict[str, Any]
) -> None:
    marker = tmp_path / "killed"
    fault = {"point": "mid-epoch", "rank": rank, "after": 5, "marker": str(marker)}
    fit(tmp_path, "run", every=NEVER, memory={}, faults=[fault], **options)
    assert marker.read_text() == "7"
    _went_on_from_memory(tmp_path, step=7)
    whole = "untouched_shards" if "sharded" in options else "untouched"
    assert digests(tmp_path, "run") == request.getfixturevalue(whole)
    # Written by the keepers, when the workers were gone.
    written = next(name for name in directories(tmp_path / "run") if step_of(name) == 7)
    open_checkpoint(tmp_path / "run" / written).verify()
    until(_nothing_is_left)


def test_a_lost_node_comes_back_from_its_replica(
    cluster: Cluster, tmp_path: Path, untouched: list[str]
) -> None:
    with _two_nodes(cluster, tmp_path, every=NEVER) as nodes:
        cluster.remove_node(nodes.pop(), allow_graceful=False)
        nodes.append(cluster.add_node(num_cpus=1, resources={"kept": 1}))
    _went_on_from_memory(tmp_path, step=9)
    assert digests(tmp_path, "run") == untouched


@pytest.mark.long
def test_fewer_nodes_go_on_from_memory(cluster: Cluster, tmp_path: Path) -> None:
    with _two_nodes(cluster, tmp_path, every=NEVER, workers=(1, 2)) as nodes:
        cluster.remove_node(nodes.pop(), allow_graceful=False)
    assert _lives(tmp_path, rank=0)[-1][2] == 1
    _went_on_from_memory(tmp_path, step=9)


@pytest.mark.long
def test_after_all_nodes_are_lost_storage_is_read(
    cluster: Cluster, tmp_path: Path, untouched: list[str]
) -> None:
    with _two_nodes(cluster, tmp_path, every=4) as nodes:
        saved = next(name for name in directories(tmp_path / "run") if step_of(name) == 8)
        for node in list(nodes):
            cluster.remove_node(node, allow_graceful=False)
            nodes.remove(node)
        nodes += [cluster.add_node(num_cpus=1, resources={"kept": 1}) for _ in range(2)]
    assert _lives(tmp_path, rank=0)[-1] == [str(tmp_path / "run" / saved), 8, 2]
    assert _shards_read(tmp_path) != set()
    assert digests(tmp_path, "run") == untouched


DRIVER = """
import sys
from pathlib import Path
import ray
from tests.ray.runs import fit
ray.init(address=sys.argv[1], log_to_driver=False)
fit(Path(sys.argv[2]), "run", every=10_000, memory={}, hold_at=5)
"""


@pytest.mark.long
def test_after_a_lost_driver_storage_has_what_memory_had(
    tmp_path: Path, untouched: list[str]
) -> None:
    address = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, address, str(tmp_path)])
    until(lambda: _held(tmp_path))
    assert directories(tmp_path / "run") == set()
    driver.kill()
    driver.wait()
    until(_nothing_is_left)
    (written,) = directories(tmp_path / "run")
    open_checkpoint(tmp_path / "run" / written).verify()
    fit(tmp_path, "run", every=NEVER)
    assert _lives(tmp_path, rank=0)[-1] == [str(tmp_path / "run" / written), 5, 2]
    assert digests(tmp_path, "run") == untouched


@pytest.mark.long
def test_without_room_for_it_nothing_is_kept_in_memory(
    tmp_path: Path, untouched: list[str]
) -> None:
    fit(tmp_path, "run", memory={}, free=64_000)
    warning = (tmp_path / "run-out/warnings-0").read_text()
    assert "no snapshots are kept in memory" in warning
    assert "/dev/shm is too small" in warning
    assert "has 0.00 GB for it and needs 0.0" in warning
    assert not (tmp_path / "run-out/warnings-1").read_text()
    assert digests(tmp_path, "run") == untouched
    until(_nothing_is_left)


@contextmanager
def _two_nodes(cluster: Cluster, directory: Path, **options: Any) -> Iterator[list[Any]]:
    """A run with a worker on each of two nodes, all of which wait at step 9.

    The nodes, for the test to remove some and add some; the run ends after it.
    """
    nodes = [cluster.add_node(num_cpus=1, resources={"kept": 1}) for _ in range(2)]
    scaling = {"resources_per_worker": {"CPU": 1, "kept": 1}}
    run = threading.Thread(
        target=fit,
        args=(directory, "run"),
        kwargs={"memory": {}, "hold_at": 9, "scaling": scaling, **options},
    )
    run.start()
    try:
        _until(lambda: _held(directory), run)
        yield nodes
        run.join()
        until(_nothing_is_left)
    finally:
        for node in nodes:
            cluster.remove_node(node, allow_graceful=False)


def _until(condition: Callable[[], bool], run: threading.Thread) -> None:
    until(lambda: condition() or not run.is_alive())
    assert run.is_alive(), "the run ended before its time"


def _held(directory: Path) -> bool:
    return all((directory / f"run-out/held-{rank}").exists() for rank in range(2))


def _went_on_from_memory(directory: Path, *, step: int) -> None:
    """All that was done was kept, and nothing came from storage."""
    first, *_, last = _lives(directory, rank=0)
    assert first[:2] == [None, 0]
    assert last[0].startswith(f"memory://run/checkpoint_{step:08d}_")
    assert last[1] == step
    assert _shards_read(directory) == set()


def _lives(directory: Path, *, rank: int) -> list[list[Any]]:
    """What each life of a rank resumed from, at which step, and of how many workers."""
    return [json.loads(line) for line in (directory / f"run-out/lives-{rank}").open()]


def _shards_read(directory: Path) -> set[str]:
    """Of the run's directory in storage."""
    logs = (directory / "run-out").glob("reads-*")
    paths = {line for log in logs for line in log.read_text().splitlines()}
    return {p for p in paths if p.startswith(str(directory / "run")) and "shard" in p}


def _nothing_is_left() -> bool:
    actors = ray.util.list_named_actors(all_namespaces=True)
    keepers = [actor for actor in actors if actor["namespace"] == NAMESPACE]
    return not keepers and not list(SHARED_MEMORY.glob("ray_accel_ckpt-*"))
