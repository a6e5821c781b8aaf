"""How long it takes from files to a model and an optimizer that can go on, beside other ways.

One process or several (gloo, on the host) that hold one data parallel model. Each way
loads what it has saved itself, model and Adam, in turn, several times over:

    python benchmarks/restore.py --megabytes 600 --workers 1 --rounds 5 --cold

See benchmarks/README.md for what is measured.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the host only, on any machine

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.common import WIDTH, machine, network, spawn, spread
from ray_accel_ckpt import Checkpointer


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way of loading what lies in a directory.

    Attributes:
        proves: whether every byte is compared with a checksum.
    """

    name: str
    proves: bool
    save: Callable[[Path], object]
    load: Callable[[Path], object]


@dataclass(frozen=True, kw_only=True)
class Live:
    """What is saved, and loaded into."""

    ckpt: Checkpointer
    alone: Checkpointer
    model: nn.Module
    bare: nn.Module
    optimizer: torch.optim.Optimizer

    def state(self) -> dict[str, Any]:
        return {"model": self.bare.state_dict(), "optimizer": self.optimizer.state_dict()}

    def set(self, state: dict[str, Any]) -> None:
        self.bare.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def digest(self) -> float:
        return sum(float(p.detach().double().sum()) for p in self.bare.parameters())


def live(megabytes: float) -> Live:
    torch.manual_seed(0)
    bare = network(megabytes)
    ckpt, alone = Checkpointer(), Checkpointer(broadcast=False)
    model, optimizer = ckpt.prepare(bare, torch.optim.Adam(bare.parameters()))
    ckpt.backward(model(torch.ones(1, WIDTH)).sum())
    optimizer.step()
    optimizer.zero_grad()
    alone.prepare(model, optimizer)
    return Live(ckpt=ckpt, alone=alone, model=model, bare=bare, optimizer=optimizer)


def methods_for(live: Live) -> list[Method]:
    nbytes = sum(t.nbytes for t in _tensors(live))
    kept = bytearray(nbytes)

    def raw_save(directory: Path) -> None:
        directory.mkdir()
        (directory / "raw").write_bytes(os.urandom(1 << 20) * (nbytes >> 20))

    def raw_load(directory: Path, buffer: Any) -> None:
        with open(directory / "raw", "rb", buffering=0) as file:
            view, done = memoryview(buffer), 0
            while got := file.readinto(view[done:]):
                done += got

    def raw_load_fresh(directory: Path) -> None:
        # No bytearray: that would be zeroed first.
        raw_load(directory, torch.empty(nbytes, dtype=torch.uint8).numpy())

    def torch_save(directory: Path) -> None:
        directory.mkdir()
        torch.save(live.state(), directory / "state.pt")

    def torch_load(directory: Path, **options: Any) -> None:
        live.set(torch.load(directory / "state.pt", weights_only=True, **options))

    def safetensors_save(directory: Path) -> None:
        directory.mkdir()
        tensors = {str(n): t.clone() for n, t in enumerate(_tensors(live))}
        save_file(tensors, directory / "state.safetensors")

    def safetensors_load(directory: Path) -> None:
        loaded = load_file(directory / "state.safetensors")
        with torch.no_grad():
            for n, tensor in enumerate(_tensors(live)):
                tensor.copy_(loaded[str(n)])

    def dcp_load(directory: Path) -> None:
        state = live.state()
        dcp.load(state, checkpoint_id=directory)
        live.set(state)

    def dcp_save(directory: Path) -> None:
        dcp.save(live.state(), checkpoint_id=directory)

    def named(name: str, save: Any, load: Any, *, proves: bool = False) -> Method:
        return Method(name=name, proves=proves, save=save, load=load)

    methods = [
        named("raw read into a buffer", by_one(raw_save), lambda d: raw_load(d, kept)),
        named("raw read into fresh memory", by_one(raw_save), raw_load_fresh),
        named("ray_accel_ckpt load_state", live.ckpt.save_state, live.ckpt.load_state, proves=True),
        named("safetensors load_file + copy", by_one(safetensors_save), safetensors_load),
        named("torch.load", by_one(torch_save), torch_load),
        named("torch.load(mmap=True)", by_one(torch_save), lambda d: torch_load(d, mmap=True)),
        named("DCP load", dcp_save, dcp_load),
    ]
    if dist.get_world_size() > 1:
        name = "ray_accel_ckpt, broadcast=False"
        apart = named(name, live.ckpt.save_state, live.alone.load_state, proves=True)
        methods.insert(3, apart)
    return methods


def by_one(save: Callable[[Path], object]) -> Callable[[Path], object]:
    """As files are written that all read: by rank 0."""
    return lambda directory: save(directory) if dist.get_rank() == 0 else None


def _tensors(live: Live) -> list[torch.Tensor]:
    moments = [s[k] for s in live.optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    return [p.detach() for p in live.bare.parameters()] + moments


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds, the slowest rank's; and bytes that all ranks read from files."""

    seconds: float
    nbytes: int


def measure(method: Method, directory: Path, live: Live, *, cold: bool) -> Measured:
    expected = live.digest()
    with torch.no_grad():
        for parameter in live.bare.parameters():
            parameter.zero_()
    if cold:
        forget(directory)
    dist.barrier()
    read, begin = bytes_read(), time.perf_counter()
    method.load(directory)
    seconds, read = time.perf_counter() - begin, bytes_read() - read
    if not method.name.startswith("raw"):
        assert live.digest() == expected, method.name
    else:
        live.ckpt.load_state(directory.parent / "2")
    slowest = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    total = torch.tensor([read])
    dist.all_reduce(total)
    return Measured(seconds=float(slowest), nbytes=int(total))


def bytes_read() -> int:
    """What this process has asked of files; not what it saw through memory maps."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def forget(directory: Path) -> None:
    """Have the system drop what it caches of the files."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def worker(args: argparse.Namespace) -> None:
    made = live(args.megabytes)
    methods = methods_for(made)
    places = [Path(args.directory, str(n)) for n in range(len(methods))]
    for method, place in zip(methods, places, strict=True):
        method.save(place)
        dist.barrier()
    found: dict[str, list[Measured]] = {method.name: [] for method in methods}
    # Round 0 makes buffers and imports what is imported late. It is not counted.
    for number in range(args.rounds + 1):
        for n in random.Random(number).sample(range(len(methods)), len(methods)):
            measured = measure(methods[n], places[n], made, cold=args.cold)
            if number > 0:
                found[methods[n].name].append(measured)
    if dist.get_rank() == 0:
        print_table(methods, found)


def print_table(methods: list[Method], found: dict[str, list[Measured]]) -> None:
    print(f"{'':32}{'ms, median (min-max)':>28}{'proved':>8}{'MB read':>10}")
    for method in methods:
        proved = "yes" if method.proves else "no"
        took = spread([each.seconds for each in found[method.name]])
        mapped = "mmap" in method.name or method.name.startswith("safetensors")
        read = statistics.median(each.nbytes for each in found[method.name]) / 1e6
        read_text = "by a map" if mapped else f"{read:.0f}"
        print(f"{method.name:32}{took:>28}{proved:>8}{read_text:>10}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=600, help="parameters and Adam's state")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache")
    parser.add_argument("--directory", default="/var/tmp", help="where to save")  # noqa: S108
    args = parser.parse_args()
    if args.rounds < 1 or args.megabytes <= 0 or args.workers < 1:
        parser.error("--rounds, --megabytes and --workers must be positive")
    args.directory = tempfile.mkdtemp(prefix="restore-", dir=args.directory)
    print(
        f"{machine(Path(args.directory))}; {args.workers} processes, {args.megabytes:g} MB of "
        f"parameters and Adam's state, {args.rounds} rounds, files "
        f"{'not ' if args.cold else ''}in the page cache; of the slowest rank",
        flush=True,
    )
    try:
        spawn(worker, args)
    finally:
        shutil.rmtree(args.directory, ignore_errors=True)


if __name__ == "__main__":
    main()
