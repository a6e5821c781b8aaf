"""What a run that loses a worker tells of itself: by its journal, and to Prometheus."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from torch import nn

from ray_accel_ckpt import Checkpointer, EverySteps, run_config
from ray_accel_ckpt.report.history import history_of
from ray_accel_ckpt.runtime.metrics import ALL
from ray_accel_ckpt.storage.filesystem import LocalFilesystem
from ray_accel_ckpt.storage.journal import Event, read_events

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    # Ray's own, of which there are many.
    pytest.mark.filterwarnings("ignore"),
]

STEPS, EVERY, LOST_AT = 10, 4, 6


def _loop(config: dict[str, Any]) -> None:
    rank = ray.train.get_context().get_world_rank()
    ckpt = Checkpointer(save=EverySteps(EVERY))
    model = ckpt.prepare(nn.Linear(2, 2))
    resumed = ckpt.load_state()
    while ckpt.global_step < STEPS:
        ckpt.backward(model(torch.ones(1, 2)).sum())
        ckpt.step(metrics={"step": ckpt.global_step})
        if ckpt.global_step == LOST_AT and not resumed:
            _told(ckpt, Path(config["run"]))
            torch.distributed.barrier()
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            _until(lambda: False)
    for _ in ckpt.epochs(1):
        pass
    if rank == 0:
        scraped = Path(config["scraped"])
        _until(lambda: scraped.write_text(_scraped()) and _all_in(scraped.read_text()))
    torch.distributed.barrier()


def _told(ckpt: Checkpointer, run: Path) -> None:
    """Wait until it is written down how far training has come, and that Ray knows the save."""
    _until(lambda: {"durable", "registered"} <= {event.kind for event in _events(run)})
    journal = ckpt._chronicle._journal
    if journal is not None:
        journal.add("heartbeat", step=LOST_AT)
        journal.flush(60)


def _until(condition: Any) -> None:
    """For as long as whoever waits for the test is patient."""
    while not condition():
        time.sleep(0.1)


def _events(run: Path) -> list[Event]:
    return read_events(LocalFilesystem(), str(run))


def _scraped() -> str:
    """What Prometheus would find on this node."""
    here = ray.get_runtime_context().get_node_id()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == here)
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=60) as answer:
        return str(answer.read().decode())


def _all_in(text: str) -> bool:
    return all(f"\n{name}{{" in text for metric in ALL for name in metric.exported)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that lost a worker; what was scraped lies beside it."""
    directory = tmp_path_factory.mktemp("events")
    path = directory / "run"
    TorchTrainer(
        _loop,
        train_loop_config={"run": str(path), "scraped": str(directory / "scraped")},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=run_config("run", directory, max_failures=5),
    ).fit()
    return path


def test_the_journal_tells_the_loss_and_the_return(run: Path) -> None:
    history = history_of(_events(run), where=str(run))
    first, second = history.attempts
    assert first.ending.startswith("failed: rank 1: ")
    assert (second.first, second.tier, second.ending) == (EVERY, "storage", "finished")
    assert history.lost == (LOST_AT - EVERY,)
    assert [save.step for save in history.saves] == [EVERY, 2 * EVERY, STEPS]
    assert all(save.registered and save.durable for save in history.saves)
    assert {attempt.world_size for attempt in history.attempts} == {2}


def test_prometheus_finds_what_the_dashboard_asks_for(run: Path) -> None:
    text = (run.parent / "scraped").read_text()
    for metric in ALL:
        for name in metric.exported:
            assert f"\n{name}{{" in text, name
    (restored,) = {
        line.rpartition(" ")[2]
        for line in text.splitlines()
        if line.startswith("ray_accel_ckpt_restores_total{") and 'tier="storage"' in line
    }
    assert float(restored) == 1.0
    (lost,) = [
        line for line in text.splitlines() if line.startswith("ray_accel_ckpt_steps_lost_total{")
    ]
    assert 'rank="0"' in lost
    assert 'run="run"' in lost
    assert float(lost.rpartition(" ")[2]) == LOST_AT - EVERY
