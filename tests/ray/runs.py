"""A Ray Train run of the loop in `tests.training`, that faults strike and tests look at."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any
from unittest import mock

import ray.train
import torch
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ray_accel_ckpt import Checkpointer, EverySteps, MemoryTier, run_config
from ray_accel_ckpt.image import copies
from ray_accel_ckpt.runtime.record import Record, read_record
from ray_accel_ckpt.storage.catalog import candidates
from ray_accel_ckpt.storage.filesystem import LocalFilesystem
from tests.ray.faults import Fault
from tests.training import train

EVERY = 4


def loop(config: dict[str, Any]) -> None:
    """Config: `out`, and as wanted `epochs`, `every`, `faults`, `overlap`, `sharded`.

    `memory`: what its `MemoryTier` is given. Then nothing happens at a step before all
    ranks' snapshots are kept, and it is written down which files each rank reads.
    `free`: bytes that are free in shared memory, as it is told.

    `run`: at each save rank 0 waits until Ray has registered it.
    `swept_at`: at this step, rank 0 waits until nothing is in `run` that Ray does not name.
    `hold_at`: at this step, all wait to be killed, and say so; in the first life only.
    """
    torch.set_num_threads(1)
    rank = ray.train.get_context().get_world_rank()
    faults = [Fault(**fault) for fault in config.get("faults", ())]
    every = config.get("every", EVERY)
    copies._SMALL = 0
    memory = MemoryTier(**config["memory"]) if "memory" in config else None
    ckpt = Checkpointer(save=EverySteps(every), overlap=config.get("overlap", False), memory=memory)
    out = Path(config["out"])
    if memory is not None:
        _write_down_reads(out / f"reads-{rank}")
        _write_down_warnings(out / f"warnings-{rank}")
    if "free" in config:
        usage = SimpleNamespace(free=config["free"])
        mock.patch("ray_accel_ckpt.runtime.room.shutil.disk_usage", return_value=usage).start()
    for fault in faults:
        fault.install(rank, lambda: ckpt.global_step)

    def on_loaded(resumed: bool) -> None:
        world_size = ray.train.get_context().get_world_size()
        with (out / f"lives-{rank}").open("a") as lives:
            print(json.dumps([ckpt.resumed_from, ckpt.global_step, world_size]), file=lives)

    def on_step(step: int) -> None:
        if memory is not None:
            ckpt.flush()
            torch.distributed.barrier()
        for fault in faults:
            fault.on_step(rank, step)
        if "run" in config and rank == 0 and step % every == 0:
            until(lambda: record(config["run"]).step >= step)
        if step == config.get("swept_at") and rank == 0:
            until(lambda: unnamed(config["run"]) == set())
        if step == config.get("hold_at") and not ckpt.resumed_from:
            (out / f"held-{rank}").touch()
            until(lambda: False)

    def on_epoch_end(epoch: int) -> None:
        for fault in faults:
            fault.on_epoch_end(rank, ckpt.global_step)

    ended = train(
        ckpt,
        rank,
        epochs=config.get("epochs", 3),
        on_step=on_step,
        on_epoch_end=on_epoch_end,
        on_loaded=on_loaded,
        shard=_sharded if config.get("sharded") else lambda model: model,
    )
    found = {"digest": ended, "resumed_from": ckpt.resumed_from, "step": ckpt.global_step}
    (out / f"rank-{rank}.json").write_text(json.dumps(found))


def _sharded(model: nn.Module) -> nn.Module:
    workers = ray.train.get_context().get_world_size()
    return fully_shard(model, mesh=init_device_mesh("cpu", (workers,)))


def _write_down_warnings(log: Path) -> None:
    handler = logging.FileHandler(log)
    handler.setLevel(logging.WARNING)
    logging.getLogger("ray_accel_ckpt").addHandler(handler)


def _write_down_reads(log: Path) -> None:
    read = LocalFilesystem.read_into

    def reading(filesystem: LocalFilesystem, path: str, offset: int, buffer: memoryview) -> None:
        with log.open("a") as file:
            print(path, file=file)
        read(filesystem, path, offset, buffer)

    mock.patch.object(LocalFilesystem, "read_into", reading).start()


def fit(
    directory: Path,
    name: str,
    workers: int | tuple[int, int] = 2,
    scaling: Mapping[str, Any] = MappingProxyType({}),
    max_failures: int = 20,
    **config: Any,
) -> Any:
    out = directory / f"{name}-out"
    out.mkdir(exist_ok=True)
    trainer = TorchTrainer(
        loop,
        train_loop_config={"out": str(out), **config},
        scaling_config=ScalingConfig(num_workers=workers, **scaling),
        # More than any test needs. What fails each time must not be tried a thousand times.
        run_config=run_config(name, directory, max_failures=max_failures),
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
