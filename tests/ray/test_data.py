"""Ray Data in a run that loses a worker: rows once, in an order that is checked."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray.data
import ray.train
import torch
from ray.data import ExecutionOptions
from ray.train import DataConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import nn

from ray_accel_ckpt import Checkpointer, EverySteps, errors, run_config

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    # Ray's own handling of files and deprecated calls is not what is tested here.
    pytest.mark.filterwarnings("ignore"),
]

ROWS, BATCH, EPOCHS, DIE_AT = 96, 5, 2, 7


def _loop(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    rank = ray.train.get_context().get_world_rank()
    ckpt = Checkpointer(save=EverySteps(3))
    shard = ray.train.get_dataset_shard("train")
    if config.get("unprepared"):
        with pytest.raises(errors.ConfigurationError, match="no batches yet"):
            ckpt.prepare(shard)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    model, optimizer, batches = ckpt.prepare(
        model, optimizer, shard.iter_torch_batches(batch_size=BATCH)
    )
    ckpt.load_state()
    killed = Path(config["out"], "killed")
    with Path(config["out"], f"rank-{rank}-from-{ckpt.global_step:03d}").open("w") as seen:
        for epoch in ckpt.epochs(EPOCHS):
            for batch in batches:
                ckpt.backward(model(batch["id"].float().unsqueeze(1)).mean())
                optimizer.step()
                optimizer.zero_grad()
                ckpt.step()
                record = {"step": ckpt.global_step, "epoch": epoch, "ids": batch["id"].tolist()}
                print(json.dumps(record), file=seen, flush=True)
                if config["die"] and ckpt.global_step == DIE_AT and not killed.exists():
                    _die(rank, Path(config["run"]), killed)


def _die(rank: int, run: Path, killed: Path) -> None:
    """Rank 1, as soon as there is something to resume from."""
    while rank != 1 or len(list(run.glob(f"checkpoint_{DIE_AT - 1:08d}_*/manifest-*.json"))) < 2:
        time.sleep(0.05)
    killed.touch()
    os.kill(os.getpid(), signal.SIGKILL)


def _fit(directory: Path, name: str, **config: Any) -> dict[tuple[int, int], tuple[int, list[int]]]:
    """By rank and step: the epoch, and the rows that counted in the end."""
    out = directory / f"{name}-out"
    out.mkdir()
    TorchTrainer(
        _loop,
        train_loop_config={"out": str(out), "run": str(directory / name), "die": False, **config},
        datasets={"train": ray.data.range(ROWS, override_num_blocks=6)},
        dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True)),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=run_config(name, directory),
    ).fit()
    found = {}
    for rank in range(2):
        for file in sorted(out.glob(f"rank-{rank}-from-*")):
            for line in file.read_text().splitlines():
                record = json.loads(line)
                found[rank, record["step"]] = record["epoch"], record["ids"]
    return found


@pytest.mark.long
def test_a_killed_worker_reads_each_row_once(tmp_path: Path) -> None:
    untouched = _fit(tmp_path, "untouched", unprepared=True)
    killed = _fit(tmp_path, "killed", die=True)
    assert (tmp_path / "killed-out" / "killed").exists(), "the worker was not killed"
    starts = sorted(int(f.name[-3:]) for f in (tmp_path / "killed-out").glob("rank-0-from-*"))
    assert len(starts) == 2
    assert starts[1] == DIE_AT - 1
    assert killed == untouched
    for epoch in range(EPOCHS):
        rows = [row for of, rows in killed.values() if of == epoch for row in rows]
        assert sorted(rows) == list(range(ROWS))
