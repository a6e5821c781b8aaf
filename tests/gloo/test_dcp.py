"""torch.distributed.checkpoint on real workers: into any mesh, and back into ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from ray_accel_ckpt import errors
from ray_accel_ckpt.integrations.dcp import CheckpointReader, from_dcp
from ray_accel_ckpt.integrations.export import export_safetensors
from tests.gloo.matrix import build, made, mine, tensors_of
from tests.gloo.workers import smaller_group, spawn
from tests.helpers_image import flip

TARGETS = [("fsdp", 2), ("fsdp", 4), ("hsdp", 4), ("tp", 2), ("fsdp+tp", 4), ("ddp", 2)]
"""Ways to be trained further, each with a number of workers; ours were 3 with FSDP2."""


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    model(torch.randint(0, 11, (6,))).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _fresh(kind: str, world_size: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """As a user of DCP has them, without this library."""
    model = build(kind, world_size, seed=2)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=0.5, foreach=False)


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }


def _whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        name: t.full_tensor() if hasattr(t, "full_tensor") else t.clone()
        for name, t in tensors_of(model, optimizer).items()
    }


def _assert_holds(
    model: nn.Module, optimizer: torch.optim.Optimizer, expected: dict[str, torch.Tensor]
) -> None:
    found = tensors_of(model, optimizer)
    assert found.keys() == expected.keys()
    wrong = [name for name, t in found.items() if not torch.equal(*mine(expected[name], t))]
    assert not wrong, f"these differ: {wrong}"
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}


def _run(rank: int, world_size: int, directory: Path) -> None:
    def case(name: str, size: int, function: Callable[..., None], *args: Any) -> None:
        with smaller_group(rank, size, directory / name) as member:
            if member:
                function(directory, *args)

    case("ours", 3, _save_ours)
    for kind, size in TARGETS:
        case(f"{kind}-{size}", size, _load_through_dcp, kind, size)
    case("exported", 1, _export)
    case("theirs", 2, _save_with_dcp)
    case("converted", 3, _load_converted)
    case("damaged", 4, _notice_damage)


def _save_ours(directory: Path) -> None:
    rank = dist.get_rank()
    ckpt, model, optimizer = made("fsdp", 3, seed=1)
    _step(model, optimizer, rank)
    _step(model, optimizer, 10 + rank)
    ckpt.save_state(directory / "saved")
    expected = _whole(model, optimizer)
    if rank == 0:
        torch.save(expected, directory / "reference")


def _load_through_dcp(directory: Path, kind: str, world_size: int) -> None:
    model, optimizer = _fresh(kind, world_size)
    state = _states(model, optimizer)
    dcp.load(state, storage_reader=CheckpointReader(directory / "saved"))
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    _assert_holds(model, optimizer, torch.load(directory / "reference"))


def _export(directory: Path) -> None:
    path, _ = export_safetensors(directory / "saved", directory / "weights")
    expected, found = torch.load(directory / "reference"), load_file(path)
    assert found.keys() == {name for name in expected if ":" not in name}
    assert all(torch.equal(t, expected[name]) for name, t in found.items())


def _save_with_dcp(directory: Path) -> None:
    rank = dist.get_rank()
    model, optimizer = _fresh("fsdp", 2)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    _step(model, optimizer, 20 + rank)
    dcp.save(_states(model, optimizer), checkpoint_id=directory / "dcp")
    expected = _whole(model, optimizer)
    if rank == 0:
        torch.save(expected, directory / "their-reference")
        from_dcp(directory / "dcp", directory / "converted-checkpoint")


def _load_converted(directory: Path) -> None:
    ckpt, model, optimizer = made("fsdp", 3, seed=3)
    source = directory / "converted-checkpoint"
    assert ckpt.load_state(source, parts=("model", "optimizer"))
    _assert_holds(model, optimizer, torch.load(directory / "their-reference"))


def _notice_damage(directory: Path) -> None:
    """Every process learns of it, also those that do not read the damaged shard."""
    if dist.get_rank() == 0:
        flip(directory / "saved", "model/odd.weight")
    dist.barrier()
    model, _ = _fresh("fsdp", dist.get_world_size())
    state = {"model": get_model_state_dict(model)}
    with pytest.raises(CheckpointException, match=r"model/odd\.weight") as caught:
        dcp.load(state, storage_reader=CheckpointReader(directory / "saved"))
    causes = [cause for cause, _ in caught.value.failures.values()]
    assert causes
    assert all(isinstance(cause, errors.CorruptCheckpointError) for cause in causes)


def test_dcp_loads_ours_into_any_mesh_and_ours_loads_what_dcp_wrote(tmp_path: Path) -> None:
    spawn(_run, 4, tmp_path)
