"""Saves by N workers and loads by M, for all pairs, in one set of processes.

Starting a process costs seconds and forming a group milliseconds. So eight are
started once; the first N of them form a group and save, then the first M form
another and load everything that was saved.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ray_accel_ckpt import Checkpointer
from tests.gloo.workers import smaller_group, write

SIZES = (1, 2, 3, 4, 5, 8)
"""Numbers of workers, all paired with all."""
PLAIN, SHARDED = ("ddp", "fsdp"), ("hsdp", "tp", "fsdp+tp")
"""Ways to train that are tried with each number, and those tried with 4 and 8."""


def kinds_of(world_size: int) -> tuple[str, ...]:
    return (*PLAIN, *SHARDED) if world_size in (4, 8) else PLAIN


class Network(nn.Module):
    """Parameters of every awkward size: fewer rows than workers, one row, uneven rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.down = nn.Linear(16, 8)
        self.odd = nn.Linear(8, 7)
        self.head = nn.Linear(7, 1)
        self.frozen = nn.Linear(3, 5).requires_grad_(False)
        self.register_buffer("steps", torch.zeros(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        hidden = self.embed(tokens)
        hidden = hidden + self.down(torch.relu(self.norm(self.up(hidden))))
        return self.head(torch.tanh(self.odd(hidden)))


def build(kind: str, world_size: int, seed: int) -> nn.Module:
    """The network, distributed as `kind` says over a group of `world_size`."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    torch.manual_seed(seed)
    model = Network()
    if kind == "ddp":
        return model
    shape = {"fsdp": (world_size,), "tp": (world_size,)}.get(kind, (world_size // 2, 2))
    if kind == "hsdp":
        shape = (2, world_size // 2)
    mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])
    if kind in ("tp", "fsdp+tp"):
        plan = {
            "up": ColwiseParallel(output_layouts=Replicate()),
            "down": RowwiseParallel(input_layouts=Replicate()),
        }
        parallelize_module(model, mesh["b"] if kind == "fsdp+tp" else mesh, plan)
    if kind == "tp":
        return model
    over = mesh["a"] if kind == "fsdp+tp" else mesh
    for layer in (model.up, model.odd):
        fully_shard(layer, mesh=over)
    return fully_shard(model, mesh=over)


def made(kind: str, world_size: int, seed: int) -> tuple[Checkpointer, nn.Module, Any]:
    """Prepared, with an optimizer that has not stepped."""
    ckpt = Checkpointer()
    model = build(kind, world_size, seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, foreach=False)
    model, optimizer = ckpt.prepare(model, optimizer)
    return ckpt, model, optimizer


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every tensor of the state, sharded as it is."""
    inner = getattr(model, "module", model)
    names = {id(p): name for name, p in inner.named_parameters()}
    found = {name: t for name, t in inner.state_dict().items() if isinstance(t, torch.Tensor)}
    for group in optimizer.param_groups:
        for p in group["params"]:
            for key, value in optimizer.state[p].items():
                found[f"{names[id(p)]}:{key}"] = value
    return found


def mine(whole: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What this rank must hold of `whole`, as torch itself reckons, and what it holds."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(like, DTensor):
        return whole, like
    shape, offset = compute_local_shape_and_global_offset(
        like.shape, like.device_mesh, like.placements
    )
    index = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
    return whole[index] if 0 not in shape else whole.new_empty(shape), like.to_local()


def _save(kind: str, rank: int, world_size: int, directory: Path) -> None:
    ckpt, model, optimizer = made(kind, world_size, seed=1)
    for step in range(2):
        # Ranks of one tensor parallel group see the same data.
        seen = {"tp": 0, "fsdp+tp": rank // 2}.get(kind, rank)
        torch.manual_seed(10 * step + seen)
        loss = model(torch.randint(0, 11, (6,))).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ckpt.save_state(directory / f"{kind}-{world_size}")
    state = {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in tensors_of(model, optimizer).items()
    }
    if rank == 0:
        torch.save(state, directory / f"{kind}-{world_size}.reference")


def _load(kind: str, source: Path, world_size: int) -> None:
    ckpt, model, optimizer = made(kind, world_size, seed=2)
    assert ckpt.load_state(source, parts=("model", "optimizer"))
    expected = torch.load(source.with_name(source.name + ".reference"))
    state = tensors_of(model, optimizer)
    assert state.keys() == expected.keys()
    wrong = [name for name, t in state.items() if not torch.equal(*mine(expected[name], t))]
    assert not wrong, f"these differ: {wrong}"


def run(rank: int, world_size: int, directory: Path) -> None:
    """What each of the processes does. `directory` then holds a result for each case."""
    saved = [f"{kind}-{n}" for n in SIZES for kind in kinds_of(n)]
    for n in SIZES:
        cases = {f"save {kind}-{n}": kind for kind in kinds_of(n)}
        _group(
            rank,
            n,
            directory / f"saving-{n}",
            cases,
            lambda kind, n=n: _save(kind, rank, n, directory),
        )
    for m in SIZES:
        cases = {
            f"{source} to {kind}-{m}": (kind, source) for kind in kinds_of(m) for source in saved
        }
        _group(
            rank,
            m,
            directory / f"loading-{m}",
            cases,
            lambda case, m=m: _load(case[0], directory / case[1], m),
        )


def _group(
    rank: int, size: int, store: Path, cases: dict[str, Any], work: Callable[[Any], None]
) -> None:
    with smaller_group(rank, size, store) as member:
        results = {}
        for name, case in cases.items() if member else ():
            try:
                work(case)
                problem = ""
            except Exception:
                problem = traceback.format_exc()
            results[name] = problem
        write(store.with_name(f"{store.name}-{rank}.json"), json.dumps(results))
