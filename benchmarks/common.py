"""What the benchmarks share: a state to save, and how a measurement is told."""

from __future__ import annotations

import argparse
import os
import platform
import socket
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

WIDTH = 512


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x)) / 16


def network(megabytes: float) -> nn.Module:
    """A model of about a third of `megabytes`; with Adam's two moments it is all of it."""
    layer_nbytes = 3 * 4 * (WIDTH * WIDTH + WIDTH)
    layers = max(1, round(megabytes * 1e6 / layer_nbytes))
    return nn.Sequential(*(Layer() for _ in range(layers)))


def spawn(work: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Do some work in `args.workers` processes, a gloo group on the host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    torch.multiprocessing.spawn(_worker, args=(work, args, port), nprocs=args.workers)


def _worker(
    rank: int, work: Callable[[argparse.Namespace], None], args: argparse.Namespace, port: int
) -> None:
    warnings.filterwarnings("ignore")
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(args.workers),
        "LOCAL_WORLD_SIZE": str(args.workers),
    }
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.workers))
    dist.init_process_group("gloo")
    work(args)
    dist.destroy_process_group()


def spread(seconds: list[float]) -> str:
    """Milliseconds: median (smallest-largest)."""
    low, high = min(seconds) * 1000, max(seconds) * 1000
    return f"{statistics.median(seconds) * 1000:.1f} ({low:.1f}-{high:.1f})"


def machine(directory: Path) -> str:
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}, "
        f"filesystem {filesystem_type(directory)}"
    )


def filesystem_type(directory: Path) -> str:
    """What the mount that `directory` lies on is, by /proc/mounts."""
    where = directory.resolve()
    best, kind = Path("/"), "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        mounted = Path(line.split()[1].replace("\\040", " "))
        if where.is_relative_to(mounted) and len(mounted.parts) >= len(best.parts):
            best, kind = mounted, line.split()[2]
    return kind
