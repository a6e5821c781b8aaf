"""One training loop under Ray Train, saved in several ways, that writes down each step it made."""

from __future__ import annotations

import itertools
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import WIDTH, network


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way of saving and coming back.

    Attributes:
        kind: "nothing", "recipe" or "ours".
        every: steps between saves to storage.
        memory: whether each step is kept in memory too.
    """

    name: str
    kind: str
    every: int = 0
    memory: bool = False


@dataclass(frozen=True, kw_only=True)
class Made:
    """One step of rank 0: when it was done, in seconds since the epoch, and by which process."""

    at: float
    step: int
    life: int


def fit(way: Way, directory: Path, *, megabytes: float, step_seconds: float) -> None:
    """Train with two workers until `end`, however often they are killed."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    directory.mkdir(parents=True)
    TorchTrainer(
        _loop,
        train_loop_config={
            "way": way.__dict__,
            "out": str(directory),
            "megabytes": megabytes,
            "step_seconds": step_seconds,
        },
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name="run",
            storage_path=str(directory / "storage"),
            failure_config=FailureConfig(max_failures=-1),
        ),
    ).fit()


def made(directory: Path) -> list[Made]:
    """The steps of a run, those that were made twice too, in the order they were made."""
    lines = (directory / "steps").read_text().splitlines()
    return [Made(**json.loads(line)) for line in lines]


def end(directory: Path) -> None:
    """Let a run end with the step that is under way."""
    (directory / "end").touch()


def kill(directory: Path, rank: int) -> float:
    """Kill a worker as a machine that vanishes would. Returns when, in seconds since the epoch."""
    pid = int((directory / f"pid-{rank}").read_text())
    now = time.time()
    os.kill(pid, signal.SIGKILL)
    return now


# --- in a worker -----------------------------------------------------------------------


def _loop(config: dict[str, Any]) -> None:
    import ray.train

    torch.set_num_threads(1)
    way, out = Way(**config["way"]), Path(config["out"])
    rank = ray.train.get_context().get_world_rank()
    torch.manual_seed(0)
    model = network(config["megabytes"])
    begin = {"nothing": _nothing, "recipe": _recipe, "ours": _ours}[way.kind]
    model, optimizer, first, after_step = begin(way, model)
    (out / f"pid-{rank}").write_text(str(os.getpid()))
    log = (out / "steps").open("a")
    x = torch.ones(1, WIDTH)
    for step in itertools.count(first + 1):
        if _ended(out):
            break
        with _lasting(config["step_seconds"]):
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        after_step(step)
        if rank == 0:
            line = {"at": time.time(), "step": step, "life": os.getpid()}
            print(json.dumps(line), file=log, flush=True)


def _ended(out: Path) -> bool:
    """Whether the run shall end, as rank 0 sees it: the same on each rank."""
    ended = torch.tensor((out / "end").exists())
    torch.distributed.broadcast(ended, src=0)
    return bool(ended)


Begun = tuple[nn.Module, torch.optim.Optimizer, int, Callable[[int], None]]


def _nothing(way: Way, model: nn.Module) -> Begun:
    """Begins anew each time: what Ray itself and making the model take."""
    import ray.train.torch

    model = ray.train.torch.prepare_model(model)
    return model, torch.optim.Adam(model.parameters()), 0, lambda step: None


def _recipe(way: Way, model: nn.Module) -> Begun:
    """As Ray's guide to saving and loading checkpoints has it: rank 0 saves, all report."""
    import ray.train
    import ray.train.torch

    model = ray.train.torch.prepare_model(model)
    optimizer = torch.optim.Adam(model.parameters())
    first = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as directory:
            state = torch.load(Path(directory, "state.pt"), weights_only=True)
            model.module.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first = state["step"]

    def after_step(step: int) -> None:
        if step % way.every:
            return
        with tempfile.TemporaryDirectory() as directory:
            saved = None
            if ray.train.get_context().get_world_rank() == 0:
                state = {
                    "model": model.module.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                }
                torch.save(state, Path(directory, "state.pt"))
                saved = ray.train.Checkpoint.from_directory(directory)
            ray.train.report({"step": step}, checkpoint=saved)

    return model, optimizer, first, after_step


def _ours(way: Way, model: nn.Module) -> Begun:
    from ray_accel_ckpt import Checkpointer, EverySteps, MemoryTier

    ckpt = Checkpointer(
        save=EverySteps(way.every), memory=MemoryTier(replicas=0) if way.memory else None
    )
    prepared, optimizer = ckpt.prepare(model, torch.optim.Adam(model.parameters()))
    ckpt.load_state()
    return prepared, optimizer, ckpt.global_step, lambda step: ckpt.step()


@contextmanager
def _lasting(seconds: float) -> Iterator[None]:
    """As long as a step on an accelerator would take: the rest of it, the host is idle."""
    end = time.monotonic() + seconds
    yield
    time.sleep(max(0.0, end - time.monotonic()))
