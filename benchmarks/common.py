"""What the benchmarks share: a state to save, and how a measurement is told."""

from __future__ import annotations

import os
import platform
import statistics
from pathlib import Path

import torch
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
