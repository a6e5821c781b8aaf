"""What saving and loading cost as the state grows: in bytes, and in tensors.

One process, parameters only, in memory (tmpfs) unless told otherwise, so that what is
seen is the library and not a disk:

    python benchmarks/growth.py --rounds 5

See benchmarks/README.md for what is measured.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the host only, on any machine

import torch
from torch import nn

from benchmarks.common import machine, spread
from ray_accel_ckpt import Checkpointer, EverySteps, ProjectConfiguration

MEGABYTES = (1, 10, 100, 1000)
TENSORS = (10, 100, 1000, 10_000, 20_000)
OF_ONE_SIZE = 64
"""Megabytes that are cut into so many tensors."""
OF_ONE_NUMBER = 16
"""Tensors that so many megabytes are cut into."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A state, and what was measured of it, in seconds."""

    megabytes: float
    tensors: int
    ckpt: Checkpointer
    copies: tuple[torch.Tensor, ...]
    parameters: tuple[torch.Tensor, ...]
    memcpy: list[float] = field(default_factory=list)
    blocked: list[float] = field(default_factory=list)
    done: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)

    def measure(self, directory: Path, *, counts: bool) -> None:
        begin = time.perf_counter()
        for target, source in zip(self.copies, self.parameters, strict=True):
            target.copy_(source)
        copied = time.perf_counter() - begin
        begin = time.perf_counter()
        self.ckpt.step()
        blocked = time.perf_counter() - begin
        self.ckpt.flush()
        done = time.perf_counter() - begin
        begin = time.perf_counter()
        self.ckpt.load_state()
        load = time.perf_counter() - begin
        shutil.rmtree(directory / "checkpoints")
        if counts:
            for found, seconds in zip(
                (self.memcpy, self.blocked, self.done, self.load),
                (copied, blocked, done, load),
                strict=True,
            ):
                found.append(seconds)


def case(megabytes: float, tensors: int, directory: Path) -> Case:
    numel = max(1, round(megabytes * 1e6 / 4 / tensors))
    model = nn.ParameterList(torch.ones(numel) for _ in range(tensors))
    project = ProjectConfiguration(directory, automatic_checkpoint_naming=True)
    ckpt = Checkpointer(save=EverySteps(1), project_config=project)
    ckpt.prepare(model)
    parameters = tuple(p.detach() for p in model)
    return Case(
        megabytes=megabytes,
        tensors=tensors,
        ckpt=ckpt,
        copies=tuple(torch.zeros_like(p) for p in parameters),
        parameters=parameters,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--directory", default="/dev/shm", help="where to save")  # noqa: S108
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be positive")
    root = Path(tempfile.mkdtemp(prefix="growth-", dir=args.directory))
    print(f"{machine(root)}; 1 process, {args.rounds} rounds; ms, median (min-max)", flush=True)
    print(f"{'MB':>6}{'tensors':>9}{'memcpy':>24}{'blocked':>24}{'done':>24}{'load':>24}")
    sizes = [(mb, OF_ONE_NUMBER) for mb in MEGABYTES] + [(OF_ONE_SIZE, n) for n in TENSORS]
    try:
        cases = [case(mb, n, root / str(i)) for i, (mb, n) in enumerate(sizes)]
        # Round 0 makes buffers and imports what is imported late. It is not counted.
        for number in range(args.rounds + 1):
            for i in random.Random(number).sample(range(len(cases)), len(cases)):
                cases[i].measure(root / str(i), counts=number > 0)
        for each in cases:
            columns = "".join(
                f"{spread(found):>24}"
                for found in (each.memcpy, each.blocked, each.done, each.load)
            )
            print(f"{each.megabytes:>6g}{each.tensors:>9}{columns}", flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
