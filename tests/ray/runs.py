"""A Ray Train run of the loop in `tests.training`, that faults strike and tests look at."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from ray_accel_ckpt import Checkpointer, EverySteps, run_config
from ray_accel_ckpt.image import copies
from ray_accel_ckpt.runtime.record import Record, read_record
from ray_accel_ckpt.storage.catalog import candidates
from ray_accel_ckpt.storage.filesystem import LocalFilesystem
from tests.ray.faults import Fault
from tests.training import train

EVERY = 4


def loop(config: dict[str, Any]) -> None:
    """Config: `out`, and as wanted `epochs`, `every`, `faults`, `overlap`.

    `run`: at each save rank 0 waits until Ray has registered it.
    `swept_at`: at this step, rank 0 waits until nothing is in `run` that Ray does not name.
    `hold_at`: at this step, all wait to be killed.
    """
    torch.set_num_threads(1)
    rank = ray.train.get_context().get_world_rank()
    faults = [Fault(**fault) for fault in config.get("faults", ())]
    every = config.get("every", EVERY)
    copies._SMALL = 0
    ckpt = Checkpointer(save=EverySteps(every), overlap=config.get("overlap", False))
    for fault in faults:
        fault.install(rank, lambda: ckpt.global_step)

    def on_step(step: int) -> None:
        for fault in faults:
            fault.on_step(rank, step)
        if "run" in config and rank == 0 and step % every == 0:
            until(lambda: record(config["run"]).step >= step)
        if step == config.get("swept_at") and rank == 0:
            until(lambda: unnamed(config["run"]) == set())
        if step == config.get("hold_at"):
            until(lambda: False)

    def on_epoch_end(epoch: int) -> None:
        for fault in faults:
            fault.on_epoch_end(rank, ckpt.global_step)

    ended = train(
        ckpt, rank, epochs=config.get("epochs", 3), on_step=on_step, on_epoch_end=on_epoch_end
    )
    found = {"digest": ended, "resumed_from": ckpt.resumed_from, "step": ckpt.global_step}
    Path(config["out"], f"rank-{rank}.json").write_text(json.dumps(found))


def fit(directory: Path, name: str, workers: int = 2, **config: Any) -> Any:
    out = directory / f"{name}-out"
    out.mkdir(exist_ok=True)
    trainer = TorchTrainer(
        loop,
        train_loop_config={"out": str(out), **config},
        scaling_config=ScalingConfig(num_workers=workers),
        # More than any test needs. What fails each time must not be tried a thousand times.
        run_config=run_config(name, directory, max_failures=20),
    )
    return trainer.fit()


def records(directory: Path, name: str, workers: int = 2) -> list[dict[str, Any]]:
    out = directory / f"{name}-out"
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(workers)]


def digests(directory: Path, name: str) -> list[str]:
    return [each["digest"] for each in records(directory, name)]


def record(run: str | Path) -> Record:
    """Ray's, of the run at this directory."""
    found: list[Record] = []

    def understood() -> bool:
        read = read_record(LocalFilesystem(), str(run))
        found.extend([read] if read is not None else [])
        return bool(found)

    until(understood)
    return found[0]


def directories(run: str | Path) -> set[str]:
    return {candidate.name for candidate in candidates(LocalFilesystem(), str(run))}


def unnamed(run: str | Path) -> set[str]:
    """Checkpoints in the run's directory that Ray does not name."""
    return directories(run) - record(run).names


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Poll; a test that waits in vain fails."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
