"""How long saving stalls training, and how long until it is durable, beside other ways of saving.

Some processes (gloo, on the host) hold one data parallel model with Adam. Each
method saves model and optimizer, in turn, several times over:

    python benchmarks/save_stall.py --megabytes 600 --workers 2 --rounds 5

See benchmarks/README.md for what is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the host only, on any machine

import psutil
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from benchmarks.common import WIDTH, machine, network, spawn, spread
from ray_accel_ckpt import Checkpointer, EverySteps, ProjectConfiguration

STEPS = 3
"""Of training, timed with and without a save under way."""

# Begins a save into a directory. When it returns, training would go on; what it
# returns is called to wait for the rest.
Save = Callable[[Path], Callable[[], object]]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way of saving."""

    name: str
    fsync: bool | None
    save: Save


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is saved: as `Checkpointer.prepare` made it, and bare."""

    ckpt: Checkpointer
    overlapping: Checkpointer
    model: nn.Module
    bare: nn.Module
    optimizer: torch.optim.Optimizer


def train(megabytes: float, directory: Path) -> Training:
    torch.manual_seed(0)
    bare = network(megabytes)
    ckpt, overlapping = (
        Checkpointer(
            save=EverySteps(1),
            overlap=overlap,
            project_config=ProjectConfiguration(directory, automatic_checkpoint_naming=True),
        )
        for overlap in (False, True)
    )
    model, optimizer = ckpt.prepare(bare, torch.optim.Adam(bare.parameters()))
    overlapping.prepare(model, optimizer)
    ckpt.backward(model(torch.ones(1, WIDTH)).sum())
    optimizer.step()
    optimizer.zero_grad()
    return Training(ckpt=ckpt, overlapping=overlapping, model=model, bare=bare, optimizer=optimizer)


# --- the methods -----------------------------------------------------------------------


def nothing() -> None:
    """The rest of a method that has no rest."""


class RawCopy:
    """This rank's share of the tensors in one buffer: the floor for any save that copies."""

    def __init__(self, training: Training) -> None:
        tensors = list(training.bare.parameters())
        for state in training.optimizer.state.values():
            tensors += [state["exp_avg"], state["exp_avg_sq"]]
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self._mine = [t.detach().view(-1) for t in tensors[rank::world_size]]
        self._buffer = torch.zeros(sum(t.numel() for t in self._mine))

    def copy(self, directory: Path) -> Callable[[], object]:
        at = 0
        for tensor in self._mine:
            self._buffer[at : at + tensor.numel()].copy_(tensor)
            at += tensor.numel()
        return nothing

    def write(self, directory: Path) -> Callable[[], object]:
        directory.mkdir(parents=True, exist_ok=True)
        rest = memoryview(self._buffer.numpy()).cast("B")
        with open(directory / f"raw-{dist.get_rank()}", "wb", buffering=0) as file:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        return nothing


def ours(ckpt: Checkpointer) -> Save:
    def save(directory: Path) -> Callable[[], object]:
        ckpt.step()
        return ckpt.flush

    return save


def torch_save(training: Training) -> Save:
    def save(directory: Path) -> Callable[[], object]:
        if dist.get_rank() == 0:
            directory.mkdir(parents=True)
            torch.save(state_of(training), directory / "state.pt")
        return nothing

    return save


def dcp_save(training: Training) -> Save:
    def save(directory: Path) -> Callable[[], object]:
        dcp.save(state_of(training), checkpoint_id=directory)
        return nothing

    return save


def dcp_async_save(training: Training, kind: AsyncCheckpointerType) -> Save:
    # Its own: on that of the training, its words would mix with the gradients'.
    group = dist.new_group(backend="gloo")

    def save(directory: Path) -> Callable[[], object]:
        future: Any = dcp.async_save(
            state_of(training),
            checkpoint_id=directory,
            process_group=group,
            async_checkpointer_type=kind,
        )
        return lambda: future.result()

    return save


def torch_checkpointing_save(training: Training) -> Save:
    """Rank 0 saves all, as in its guide for state that is the same everywhere; staged at once,
    which is what it can do on the host."""
    from torch_checkpointing import CheckpointManager
    from torch_checkpointing.config import AsyncCheckpointSaverConfig
    from torch_checkpointing.staging import CheckpointStagerConfig

    staging = CheckpointStagerConfig(use_async_staging=False)
    manager = CheckpointManager.Config(
        save=AsyncCheckpointSaverConfig(staging_config=staging)
    ).build()

    def save(directory: Path) -> Callable[[], object]:
        future: Any = manager.save(str(directory), state_of(training))
        return lambda: future.result()

    return save


def accelerate_save_state(training: Training) -> Save:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    # The bare model: Accelerate wraps it in a DistributedDataParallel of its own. Two of them
    # around one model do no harm here, because nothing goes backward any more.
    accelerator.prepare(training.bare, training.optimizer)

    def save(directory: Path) -> Callable[[], object]:
        accelerator.save_state(str(directory))
        return nothing

    return save


def state_of(training: Training) -> dict[str, Any]:
    return {"model": training.bare.state_dict(), "optimizer": training.optimizer.state_dict()}


def methods_for(training: Training) -> list[Method]:
    raw = RawCopy(training)
    methods = [
        Method(name="memcpy of the share", fsync=None, save=raw.copy),
        Method(name="raw write + fsync of the share", fsync=True, save=raw.write),
        Method(name="ray_accel_ckpt step", fsync=True, save=ours(training.ckpt)),
        Method(name="ray_accel_ckpt, overlap", fsync=True, save=ours(training.overlapping)),
        Method(name="torch.save on rank 0", fsync=False, save=torch_save(training)),
        Method(name="DCP save", fsync=True, save=dcp_save(training)),
    ]
    for kind in AsyncCheckpointerType:
        saving = dcp_async_save(training, kind)
        methods.append(Method(name=f"DCP async_save, {kind.value}", fsync=True, save=saving))
    if importlib.util.find_spec("torch_checkpointing") is not None:
        saving = torch_checkpointing_save(training)
        methods.append(Method(name="torch_checkpointing", fsync=False, save=saving))
    if importlib.util.find_spec("accelerate") is not None:
        saving = accelerate_save_state(training)
        methods.append(Method(name="Accelerate save_state", fsync=False, save=saving))
    return methods


# --- measuring -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds, the slowest rank's; of the CPU, all ranks'; and bytes that lay in the directory."""

    blocked: float
    done: float
    cpu: float
    nbytes: int
    inflation: float


def measure(method: Method, directory: Path, training: Training) -> Measured:
    dist.barrier()
    cpu = cpu_seconds()
    begin = time.perf_counter()
    rest = method.save(directory)
    blocked = time.perf_counter() - begin
    rest()
    done = time.perf_counter() - begin
    cpu = cpu_seconds() - cpu
    dist.barrier()
    nbytes = sum(path.stat().st_size for path in files_under(directory))
    clear(directory)
    without = step(training)
    rest = method.save(directory)
    during = step(training)
    rest()
    clear(directory)
    slowest = torch.tensor([blocked, done, during / without], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    total = torch.tensor([cpu], dtype=torch.float64)
    dist.all_reduce(total)
    return Measured(
        blocked=float(slowest[0]),
        done=float(slowest[1]),
        cpu=float(total),
        nbytes=nbytes,
        inflation=float(slowest[2]),
    )


def step(training: Training) -> float:
    """Seconds of some steps of training."""
    begin = time.perf_counter()
    for _ in range(STEPS):
        training.model(torch.ones(8, WIDTH)).sum().backward()
        training.optimizer.step()
        training.optimizer.zero_grad()
    return time.perf_counter() - begin


def cpu_seconds() -> float:
    """Of this process and of those it has started and that live."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def clear(directory: Path) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(directory, ignore_errors=True)
    dist.barrier()


def files_under(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("*") if path.is_file())


def worker(args: argparse.Namespace) -> None:
    directory = Path(args.directory, "checkpoint")
    training = train(args.megabytes, directory)
    methods = [each for each in methods_for(training) if each.name not in args.without]
    if args.only is not None:
        print_peak(args.only, methods, directory)
        return
    found: dict[str, list[Measured]] = {method.name: [] for method in methods}
    # Round 0 makes buffers and imports what is imported late. It is not counted.
    for number in range(args.rounds + 1):
        for method in random.Random(number).sample(methods, len(methods)):
            measured = measure(method, directory, training)
            if number > 0:
                found[method.name].append(measured)
    if dist.get_rank() == 0:
        print_table(methods, found)


# --- printing --------------------------------------------------------------------------


def print_table(methods: list[Method], found: dict[str, list[Measured]]) -> None:
    fsync = {True: "yes", False: "no", None: "-"}
    print(
        f"{'':32}{'blocked, ms':>26}{'until done, ms':>26}{'CPU, s':>8}{'steps':>8}{'fsync':>7}"
        f"{'MB':>8}"
    )
    for method in methods:
        rounds = found[method.name]
        blocked = spread([each.blocked for each in rounds])
        done = spread([each.done for each in rounds])
        written = statistics.median(each.nbytes for each in rounds) / 1e6
        cpu = statistics.median(each.cpu for each in rounds)
        inflation = statistics.median(each.inflation for each in rounds)
        print(
            f"{method.name:32}{blocked:>26}{done:>26}{cpu:>8.2f}{inflation:>7.2f}x"
            f"{fsync[method.fsync]:>7}{written:>8.1f}",
            flush=True,
        )


def print_peak(name: str, methods: list[Method], directory: Path) -> None:
    """Memory that three saves of one method take at most, in a process that did nothing else."""
    method = next(method for method in methods if method.name == name)
    children = psutil.Process().children(recursive=True)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        method.save(directory)()
        clear(directory)
    peak = torch.tensor([resident("VmHWM") - before], dtype=torch.float64)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        more = f", and {len(children)} processes more" if children else ""
        print(
            f"{name:32}{float(peak) / 1e6:>10.0f} MB of the rank that takes most{more}", flush=True
        )


def resident(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--megabytes", type=float, default=600, help="parameters and Adam's state (default: 600)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--only", help="the name of one method: tell what memory it takes")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="NAME", help="methods to leave out, for memory"
    )
    parser.add_argument("--directory", help="where to save (default: a new one in /var/tmp)")
    args = parser.parse_args()
    if args.rounds < 1 or args.megabytes <= 0:
        parser.error("--rounds and --megabytes must be positive")
    parent = args.directory or "/var/tmp"  # noqa: S108 - a disk, where /tmp may be memory
    os.makedirs(parent, exist_ok=True)
    args.directory = tempfile.mkdtemp(prefix="save_stall-", dir=parent)
    print(
        f"{machine(Path(args.directory))}; {args.workers} processes, "
        f"{args.megabytes:g} MB of parameters and Adam's state, {args.rounds} rounds",
        flush=True,
    )
    print("median (min-max) of the slowest rank", flush=True)
    try:
        spawn(worker, args)
    finally:
        shutil.rmtree(args.directory, ignore_errors=True)


if __name__ == "__main__":
    main()
