"""Runs as Ray Train leaves them, made without one: what the commands are tried on and shown with.

All of it follows from step, rank and number of workers, so two makings are the same bits.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ray_accel_ckpt.runtime.heal import empty_state
from ray_accel_ckpt.runtime.record import SNAPSHOT
from ray_accel_ckpt.state.bundle import StateBundle
from ray_accel_ckpt.state.loader import PreparedLoader
from ray_accel_ckpt.state.parts import ProgressPart
from ray_accel_ckpt.storage.catalog import checkpoint_name
from ray_accel_ckpt.storage.filesystem import Filesystem, LocalFilesystem
from ray_accel_ckpt.storage.writer import write_image
from tests.helpers_image import image_of

SAVED_AT = 1_700_000_000.0
"""When step 0 was saved; a step took a second."""
ATTEMPT = "5d8e3f"


class Worker:
    """One rank's objects at a step."""

    def __init__(self, step: int, rank: int, world_size: int, *, frozen: bool = False) -> None:
        random.seed(rank)
        np.random.seed(rank)
        torch.manual_seed(rank)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        if frozen:
            self.model.insert(0, nn.Embedding(4096, 64))
            self.model[0].requires_grad_(False)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        with torch.no_grad():
            for i, tensor in enumerate(self.model.state_dict().values()):
                tensor.copy_((torch.arange(tensor.numel()) + i).reshape(tensor.shape))
            for parameter in trained:
                parameter += step
        self.optimizer = torch.optim.SGD(trained, lr=0.5, momentum=0.9)
        for parameter in trained:
            parameter.grad = torch.full_like(parameter, 0.5)
        self.optimizer.step()
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 10, gamma=0.5)
        loader: Any = DataLoader(TensorDataset(torch.arange(640)), batch_size=8, shuffle=True)
        place = {"rank": rank, "world_size": world_size, "device": torch.device("cpu")}
        self.loader = PreparedLoader(loader, name="loader", seed=7, **place)
        batches = iter(self.loader)
        for _ in range(step % 20):
            next(batches)
        self.bundle = StateBundle()
        self.bundle.add_model(self.model)
        self.bundle.add_optimizer(self.optimizer)
        self.bundle.add(self.loader)
        self.bundle.add_scheduler(self.scheduler)
        progress = {"global_step": step, "epoch": step // 40, "seed": 7}
        self.bundle.add(ProgressPart(lambda: progress, lambda **_: None))


def save(
    filesystem: Filesystem,
    path: str,
    step: int,
    *,
    world_size: int = 2,
    ranks: int | None = None,
    attempt: str = ATTEMPT,
    library: str = "test",
    frozen: bool = False,
) -> None:
    """A checkpoint of `world_size` ranks, of which only `ranks` came to their end.

    Args:
        frozen: with 1 MiB of parameters that are not trained, in a file of their own.
    """
    for rank in range(world_size if ranks is None else ranks):
        worker = Worker(step, rank, world_size, frozen=frozen)
        captured = worker.bundle.capture()
        image = image_of(
            captured,
            rank=rank,
            world_size=world_size,
            step=step,
            attempt=attempt,
            run="digits",
            epoch=step // 40,
            saved_at=SAVED_AT + step,
            library=library,
            frozen=worker.bundle.frozen(captured),
        )
        write_image(filesystem, path, image, timeout=1.0)


def saved(run: Path, step: int, *, attempt: str = ATTEMPT, **options: Any) -> str:
    """A checkpoint of a run on this disk; its name."""
    name = checkpoint_name(step, attempt)
    save(LocalFilesystem(), str(run / name), step, attempt=attempt, **options)
    return name


def register(run: Path, *names: str) -> None:
    """Ray's record of a run, in which these are registered in this order."""
    results = [{"version": 0, "checkpoint_dir_name": n, "metrics": {"loss": 1.0}} for n in names]
    state = {
        **empty_state(),
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(names))),
        "latest_checkpoint_result": results[-1] if results else None,
        "current_report_index": len(names),
    }
    (run / SNAPSHOT).write_text(json.dumps(state))


def damage(file: Path) -> None:
    """Turn one bit in the middle of a file's second half, where the tensors of a shard lie."""
    data = bytearray(file.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    file.write_bytes(data)
