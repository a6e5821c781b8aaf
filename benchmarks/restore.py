"""How long it takes from files to a model and an optimizer that can go on, beside other ways.

One process. Each way loads what it has saved itself, model and Adam, in turn,
several times over:

    python benchmarks/restore.py --megabytes 600 --rounds 5 --cold

See benchmarks/README.md for what is measured.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the host only, on any machine

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.common import WIDTH, machine, network, spread
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
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def set(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def digest(self) -> float:
        return sum(float(p.detach().double().sum()) for p in self.model.parameters())


def live(megabytes: float) -> Live:
    torch.manual_seed(0)
    ckpt, bare = Checkpointer(), network(megabytes)
    model, optimizer = ckpt.prepare(bare, torch.optim.Adam(bare.parameters()))
    ckpt.backward(model(torch.ones(1, WIDTH)).sum())
    optimizer.step()
    optimizer.zero_grad()
    return Live(ckpt=ckpt, model=model, optimizer=optimizer)


def methods_for(live: Live) -> list[Method]:
    buffer = bytearray()

    def raw_save(directory: Path) -> None:
        directory.mkdir()
        nbytes = sum(t.nbytes for t in _tensors(live))
        (directory / "raw").write_bytes(os.urandom(1 << 20) * (nbytes >> 20))
        buffer.extend(bytes(nbytes))

    def raw_load(directory: Path) -> None:
        with open(directory / "raw", "rb", buffering=0) as file:
            view, done = memoryview(buffer), 0
            while got := file.readinto(view[done:]):
                done += got

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
        dcp.load(state, checkpoint_id=directory, no_dist=True)
        live.set(state)

    def named(name: str, save: Any, load: Any, *, proves: bool = False) -> Method:
        return Method(name=name, proves=proves, save=save, load=load)

    return [
        named("raw read into a buffer", raw_save, raw_load),
        named("ray_accel_ckpt load_state", live.ckpt.save_state, live.ckpt.load_state, proves=True),
        named("safetensors load_file + copy", safetensors_save, safetensors_load),
        named("torch.load", torch_save, torch_load),
        named("torch.load(mmap=True)", torch_save, lambda d: torch_load(d, mmap=True)),
        named(
            "DCP load", lambda d: dcp.save(live.state(), checkpoint_id=d, no_dist=True), dcp_load
        ),
    ]


def _tensors(live: Live) -> list[torch.Tensor]:
    moments = [s[k] for s in live.optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    return [p.detach() for p in live.model.parameters()] + moments


def measure(method: Method, directory: Path, live: Live, *, cold: bool) -> float:
    expected = live.digest()
    with torch.no_grad():
        for parameter in live.model.parameters():
            parameter.zero_()
    if cold:
        forget(directory)
    begin = time.perf_counter()
    method.load(directory)
    seconds = time.perf_counter() - begin
    if not method.name.startswith("raw"):
        assert live.digest() == expected, method.name
    else:
        live.ckpt.load_state(directory.parent / "1")
    return seconds


def forget(directory: Path) -> None:
    """Have the system drop what it caches of the files."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=600, help="parameters and Adam's state")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache")
    parser.add_argument("--directory", default="/var/tmp", help="where to save")  # noqa: S108
    args = parser.parse_args()
    if args.rounds < 1 or args.megabytes <= 0:
        parser.error("--rounds and --megabytes must be positive")
    directory = Path(tempfile.mkdtemp(prefix="restore-", dir=args.directory))
    try:
        made = live(args.megabytes)
        methods = methods_for(made)
        print(
            f"{machine(directory)}; 1 process, {args.megabytes:g} MB of parameters and Adam's "
            f"state, {args.rounds} rounds, files {'not ' if args.cold else ''}in the page cache",
            flush=True,
        )
        places = [directory / str(n) for n in range(len(methods))]
        for method, place in zip(methods, places, strict=True):
            method.save(place)
        found: dict[str, list[float]] = {method.name: [] for method in methods}
        # Round 0 makes buffers and imports what is imported late. It is not counted.
        for number in range(args.rounds + 1):
            for n in random.Random(number).sample(range(len(methods)), len(methods)):
                seconds = measure(methods[n], places[n], made, cold=args.cold)
                if number > 0:
                    found[methods[n].name].append(seconds)
        print(f"{'':32}{'ms, median (min-max)':>28}{'proved':>8}")
        for method in methods:
            proved = "yes" if method.proves else "no"
            print(f"{method.name:32}{spread(found[method.name]):>28}{proved:>8}", flush=True)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
