"""How long saving stalls training on an accelerator, beside a copy of the same bytes to the host.

One process, one device: a network in fp32 that computes in bf16 (autocast), with Adam.
Each way saves in turn, several times over:

    python benchmarks/gpu_stall.py --gigabytes 10 --rounds 5

With `--host` it runs where there is no accelerator, which shows that it runs and nothing more.
See benchmarks/README.md for what is measured.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import machine, spread
from ray_accel_ckpt import Checkpointer, EverySteps, ProjectConfiguration

WIDTH = 4096
BATCH = 4096
"""Rows: as many as make a step of the device's work, and not of the host's."""
STEPS = 5
"""Of training, timed with and without a save under way."""


def nothing() -> None:
    """The rest of a way that has no rest."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way of saving: `save` returns when training would go on, `rest` when all is done."""

    name: str
    save: Callable[[], object]
    rest: Callable[[], object] = nothing
    blocked: list[float] = field(default_factory=list)
    done: list[float] = field(default_factory=list)
    inflation: list[float] = field(default_factory=list)


class Training:
    """A network with Adam, where `prepare` puts it; its state takes 12 bytes a parameter."""

    def __init__(self, gigabytes: float, directory: Path) -> None:
        layers = max(1, round(gigabytes * 1e9 / (12 * WIDTH * WIDTH)))
        bare = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
        self.save, self.overlapping = (
            Checkpointer(
                save=EverySteps(1),
                overlap=overlap,
                project_config=ProjectConfiguration(
                    directory / name, automatic_checkpoint_naming=True, total_limit=1
                ),
            )
            for name, overlap in (("step", False), ("overlap", True))
        )
        self.model = self.save.prepare(bare)
        self.optimizer = self.save.prepare(torch.optim.Adam(self.model.parameters()))
        self.overlapping.prepare(self.model, self.optimizer)
        self.device = next(self.model.parameters()).device
        self.batch = torch.randn(BATCH, WIDTH, device=self.device)
        self.steps(1)

    def steps(self, number: int) -> float:
        """Seconds of so many steps, as the device counts them."""
        self.wait()
        begin = time.perf_counter()
        for _ in range(number):
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = self.model(self.batch).float().square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.wait()
        return time.perf_counter() - begin

    def tensors(self) -> list[torch.Tensor]:
        states = self.optimizer.state.values()
        moments = [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]
        return [*(p.detach() for p in self.model.parameters()), *moments]

    def wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def copy_to_host(training: Training) -> Way:
    """All of it into one pinned buffer, and waited for: the floor for what is not overlapped."""
    sources = [tensor.view(-1) for tensor in training.tensors()]
    pinned = training.device.type != "cpu"
    buffer = torch.zeros(sum(s.numel() for s in sources), device="cpu", pin_memory=pinned)

    def copy() -> None:
        for target, source in zip(buffer.split([s.numel() for s in sources]), sources, strict=True):
            target.copy_(source, non_blocking=True)
        training.wait()

    return Way(name="copy to pinned memory", save=copy)


def measure(way: Way, training: Training, *, counts: bool) -> None:
    training.wait()
    begin = time.perf_counter()
    way.save()
    blocked = time.perf_counter() - begin
    way.rest()
    done = time.perf_counter() - begin
    without = training.steps(STEPS)
    way.save()
    during = training.steps(STEPS)
    way.rest()
    if counts:
        way.blocked.append(blocked)
        way.done.append(done)
        way.inflation.append(during / without)


def print_table(ways: list[Way], nbytes: int) -> None:
    print(f"{'':26}{'blocked, ms':>28}{'until done, ms':>28}{'GB/s':>8}{f'{STEPS} steps':>10}")
    for way in ways:
        rate = nbytes / statistics.median(way.done) / 1e9
        print(
            f"{way.name:26}{spread(way.blocked):>28}{spread(way.done):>28}{rate:>8.1f}"
            f"{statistics.median(way.inflation):>9.3f}x",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=10, help="parameters and Adam's state")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument("--host", action="store_true", help="where there is no accelerator")
    parser.add_argument("--directory", default="/var/tmp", help="where to save")  # noqa: S108
    args = parser.parse_args()
    if args.rounds < 1 or args.gigabytes <= 0:
        parser.error("--rounds and --gigabytes must be positive")
    if args.host == torch.accelerator.is_available():
        parser.error("--host is for machines without an accelerator, and needed there")
    root = Path(tempfile.mkdtemp(prefix="gpu-stall-", dir=args.directory))
    try:
        training = Training(args.gigabytes, root)
        nbytes = sum(tensor.nbytes for tensor in training.tensors())
        named = torch.cuda.get_device_name() if training.device.type == "cuda" else "the host"
        print(f"{named}; {machine(root)}; {nbytes / 1e9:.1f} GB, {args.rounds} rounds", flush=True)
        ways = [
            copy_to_host(training),
            Way(name="ray_accel_ckpt step", save=training.save.step, rest=training.save.flush),
            Way(
                name="ray_accel_ckpt, overlap",
                save=training.overlapping.step,
                rest=training.overlapping.flush,
            ),
        ]
        # Round 0 makes buffers, which takes longest where they are pinned. It is not counted.
        for number in range(args.rounds + 1):
            for way in random.Random(number).sample(ways, len(ways)):
                measure(way, training, counts=number > 0)
        print_table(ways, nbytes)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
