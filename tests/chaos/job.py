"""The training job: what a driver process runs, and what its workers do."""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import ray
import ray.train
import torch
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ray_accel_ckpt import Checkpointer, EverySteps, MemoryTier, run_config
from tests.chaos.records import Diary
from tests.chaos.seam import SwitchedFileSystem
from tests.training import train

Shape = Literal["fixed", "elastic"]

PACE = 0.04
"""Seconds that each step takes at least."""

FIXED_STEPS = 36
"""Of `tests.training.train` with two workers."""

SAMPLES, GLOBAL_BATCH, EPOCHS, SEED = 119, 8, 3, 3
EPOCH_STEPS = -(-SAMPLES // GLOBAL_BATCH)


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a driver needs to know. Started again with the same, it goes on.

    Attributes:
        workers: how many; for an elastic job the fewest and the most.
        every: steps from save to save.
        storage: a directory; the run is ``<storage>/run``.
        out: where workers write down what they do.
        control: the switch of the storage; None for the plain disk.
        epochs: of an elastic job.
        memory: whether each step is kept in memory too.

    It does not end before there is a file ``<out>/go``.
    """

    shape: Shape
    workers: tuple[int, int]
    every: int
    storage: str
    out: str
    control: str | None = None
    epochs: int = EPOCHS
    memory: bool = False


def drive(job: Job, address: str, log: str, environment: dict[str, str]) -> None:
    """Run the job to its end. In a process of its own, which may be killed."""
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    print(f"--- driver {os.getpid()}", flush=True)
    ray.init(address=address, log_to_driver=False)
    low, high = job.workers
    storage = {} if job.control is None else {"storage_filesystem": SwitchedFileSystem(job.control)}
    TorchTrainer(
        fixed if job.shape == "fixed" else elastic,
        train_loop_config=asdict(job),
        scaling_config=ScalingConfig(
            num_workers=high if job.shape == "fixed" else (low, high),
            resources_per_worker={"CPU": 1, "slot": 1},
            elastic_resize_monitor_interval_s=2,
        ),
        run_config=run_config("run", job.storage, **storage),
    ).fit()
    sys.stdout.flush()


def fixed(config: dict[str, Any]) -> None:
    """Everything that makes resuming hard; ends with a digest of all bits."""
    torch.set_num_threads(1)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    diary = Diary(Path(config["out"]), rank, world_size)
    ckpt = _checkpointer(config)

    def on_step(step: int) -> None:
        diary.write(step=step)
        _tarry(config, step, FIXED_STEPS)

    digest = train(
        ckpt,
        rank,
        on_step=on_step,
        on_loaded=lambda _: diary.loaded(ckpt.global_step, ckpt.resumed_from),
    )
    diary.write(digest=digest)


def _checkpointer(config: dict[str, Any]) -> Checkpointer:
    memory = MemoryTier() if config["memory"] else None
    return Checkpointer(save=EverySteps(config["every"]), memory=memory)


class Indices(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index)])


def elastic(config: dict[str, Any]) -> None:
    """Goes on with as many workers as there are nodes; writes down each sample."""
    torch.set_num_threads(1)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    diary = Diary(Path(config["out"]), rank, world_size)
    ckpt = _checkpointer(config)
    torch.manual_seed(SEED)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    model, optimizer = ckpt.prepare(model, optimizer)
    loader = ckpt.prepare(
        DataLoader(Indices(), batch_size=1, shuffle=True), global_batch_size=GLOBAL_BATCH
    )
    ckpt.load_state()
    diary.loaded(ckpt.global_step, ckpt.resumed_from)
    for epoch in ckpt.epochs(config["epochs"]):
        for batch in loader:
            ckpt.backward(model(batch).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            # Padding, of workers for which nothing is left, counts for nothing.
            indices = [] if loader.padding else [int(i) for i in batch.flatten()]
            # Before `step`: what is saved has been written down.
            diary.write(step=ckpt.global_step + 1, epoch=epoch, indices=indices)
            ckpt.step()
            _tarry(config, ckpt.global_step, config["epochs"] * EPOCH_STEPS)
    diary.write(digest="")


def _tarry(config: dict[str, Any], step: int, last: int) -> None:
    """The pace; and no job ends before all has struck that is to strike.

    It goes slower towards its end until then, and stands only at the last step:
    a loop that stands cannot hear of a drain.
    """
    time.sleep(PACE)
    go = Path(config["out"], "go")
    patience = 0.4 if step < last else math.inf
    until = time.monotonic() + (patience if step > last * 0.6 else 0)
    while time.monotonic() < until and not go.exists():
        time.sleep(0.02)
