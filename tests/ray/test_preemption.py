"""Nodes that are announced to go: what was done is not done again."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ray.cluster_utils import Cluster
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from ray_accel_ckpt import Checkpointer, EverySteps, run_config
from ray_accel_ckpt.runtime.fake_metadata import FakeMetadata
from ray_accel_ckpt.storage.catalog import step_of
from ray_accel_ckpt.storage.filesystem import LocalFilesystem
from tests.ray.drains import drain
from tests.ray.runs import record, until
from tests.training import train

# Ray's own handling of files and deprecated calls is not what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
EVERY, LAST = 20, 36


def _loop(config: dict[str, Any]) -> None:
    import ray.train

    torch.set_num_threads(1)
    rank = ray.train.get_context().get_world_rank()
    out = Path(config["out"])
    ckpt = Checkpointer(save=EverySteps(EVERY))

    def limit() -> int:
        """What the test allows, the same on each rank."""
        allowed = torch.tensor(int((out / "limit").read_text()))
        torch.distributed.broadcast(allowed, src=0)
        return int(allowed)

    def on_loaded(resumed: bool) -> None:
        life = len(list(out.glob("life-*")))
        begun = {"resumed": ckpt.global_step if resumed else 0}
        torch.distributed.barrier()
        node = ray.get_runtime_context().get_node_id()
        (out / f"node-{life}-{rank}").write_text(node)
        torch.distributed.barrier()
        if rank == 0:
            (out / f"life-{life}").write_text(json.dumps(begun))

    def on_step(step: int) -> None:
        (out / f"at-{rank}").write_text(str(step))
        while step >= limit():
            ckpt.heartbeat()

    with _held(out / "hold"):
        digest = train(ckpt, rank, on_step=on_step, on_loaded=on_loaded)
    (out / f"ended-{rank}").write_text(digest)


@contextlib.contextmanager
def _held(flag: Path) -> Iterator[None]:
    """Writes of shards wait while the flag is there."""
    write = LocalFilesystem.write

    def slow(filesystem: LocalFilesystem, path: str, chunks: Iterable[Any]) -> None:
        while flag.exists() and "shard" in path:
            time.sleep(0.05)
        write(filesystem, path, chunks)

    with mock.patch.object(LocalFilesystem, "write", slow):
        yield


class Run:
    """A run on two nodes of one worker each, driven by what it is allowed to do."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.cluster, self.directory = cluster, directory
        self.out = directory / "out"
        self.out.mkdir()
        self.allow(0)
        self.nodes: dict[str, Any] = {}
        self.results: list[Any] = []
        trainer = TorchTrainer(
            _loop,
            train_loop_config={"out": str(self.out)},
            scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1, "slot": 1}),
            run_config=run_config("run", directory),
        )
        self.fit = threading.Thread(target=lambda: self.results.append(trainer.fit()))

    def allow(self, step: int) -> None:
        new = self.out / "limit.new"
        new.write_text(str(step))
        new.rename(self.out / "limit")

    def add_node(self) -> None:
        node = self.cluster.add_node(num_cpus=1, resources={"slot": 1})
        self.nodes[node.node_id] = node

    def remove_node(self, node_id: str) -> None:
        self.cluster.remove_node(self.nodes.pop(node_id), allow_graceful=False)

    def drain(self, node_id: str, *, seconds: float) -> None:
        drain(self.cluster.address, node_id, seconds=seconds)

    def resumed(self, life: int) -> int:
        """Wait for a life to begin; the step it begins with."""
        begun = self.out / f"life-{life}"
        self.until(lambda: begun.exists() and begun.read_text() != "")
        return int(json.loads(begun.read_text())["resumed"])

    def node(self, life: int, rank: int) -> str:
        return (self.out / f"node-{life}-{rank}").read_text()

    def reach(self, step: int) -> None:
        self.allow(step)
        at = [self.out / f"at-{rank}" for rank in range(2)]
        self.until(lambda: all(a.exists() and a.read_text() == str(step) for a in at))

    def registered(self, step: int) -> None:
        """Wait until Ray has registered a checkpoint of this very step."""
        self.until(lambda: step in map(step_of, record(self.directory / "run").names))

    def digests(self) -> list[str]:
        """What each rank ended with."""
        return [(self.out / f"ended-{rank}").read_text() for rank in range(2)]

    def until(self, condition: Callable[[], bool]) -> None:
        def met() -> bool:
            if condition():
                return True
            assert self.fit.is_alive(), "the run ended before its time"
            return False

        until(met)


@contextlib.contextmanager
def _watched(run: Run, node_id: str) -> Iterator[FakeMetadata]:
    """`ray-accel-ckpt watch-node` at its work, and the cloud that it asks."""
    with FakeMetadata("aws") as cloud:
        options = ["--address", run.cluster.address, "--node-id", node_id]
        command = [sys.executable, "-m", "ray_accel_ckpt.cli", "watch-node", *options]
        daemon = subprocess.Popen([*command, "--metadata-url", cloud.url], cwd=ROOT)
        try:
            yield cloud
        finally:
            daemon.kill()
            daemon.wait()


@contextlib.contextmanager
def _driven(cluster: Cluster, directory: Path) -> Iterator[Run]:
    """A run whose nodes come and go as the block says; afterwards it has ended."""
    run = Run(cluster, directory)
    run.add_node()
    run.add_node()
    run.fit.start()
    try:
        yield run
    except BaseException:
        # Some may be gone, or going, and without nodes it does not end.
        run.add_node()
        run.add_node()
        raise
    finally:
        run.allow(LAST + 1)
        run.fit.join()
        for node in run.nodes.values():
            cluster.remove_node(node, allow_graceful=False)
    assert run.results


def test_a_node_that_the_cloud_takes_away_costs_no_step(
    cluster: Cluster, tmp_path: Path, untouched: list[str]
) -> None:
    """From a cloud's notice to the end: the node dies long before its deadline."""
    with _driven(cluster, tmp_path) as run:
        assert run.resumed(0) == 0
        run.reach(7)
        with _watched(run, run.node(0, 1)) as cloud:
            cloud.preempt(time.time() + 300)
            run.registered(7)
        run.add_node()
        run.remove_node(run.node(0, 1))
        assert run.resumed(1) == 7
    assert run.digests() == untouched


@pytest.mark.long
def test_announced_losses_cost_no_step(
    cluster: Cluster, tmp_path: Path, untouched: list[str]
) -> None:
    with _driven(cluster, tmp_path) as run:
        # Rank 0's node, then the other one too before the first is gone.
        assert run.resumed(0) == 0
        run.reach(13)
        run.drain(run.node(0, 0), seconds=300)
        run.registered(13)
        run.reach(16)
        run.drain(run.node(0, 1), seconds=300)
        run.registered(16)
        run.add_node()
        run.add_node()
        for rank in range(2):
            run.remove_node(run.node(0, rank))

        # While a periodic save is being written.
        assert run.resumed(1) == 16
        (run.out / "hold").touch()
        run.reach(22)
        run.drain(run.node(1, 0), seconds=300)
        (run.out / "hold").unlink()
        run.registered(22)
        run.add_node()
        run.remove_node(run.node(1, 0))

        # Announced and not taken away: the last save comes shortly before the deadline.
        assert run.resumed(2) == 22
        run.reach(26)
        run.drain(run.node(2, 1), seconds=25)
        run.registered(26)
        run.reach(29)
        run.registered(29)
        run.add_node()
        assert run.resumed(3) == 29
    assert run.digests() == untouched
