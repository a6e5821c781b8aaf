"""Frozen parameters of several workers: shared out, linked to, dealt out to other numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from ray_accel_ckpt import Checkpointer, EverySteps, ProjectConfiguration, open_checkpoint
from tests.gloo.workers import spawn
from tests.pure.test_frozen import WIDTH, Adapted


def _sharded(model: Adapted) -> Adapted:
    fully_shard(model.base)
    fully_shard(model)
    return model


def _train(rank: int, world_size: int, directory: Path, sharded: bool, until: int) -> None:
    torch.manual_seed(3)
    model = Adapted()
    whole = {name: t.clone() for name, t in model.base.state_dict().items()}
    if world_size == 3:
        # What is loaded is to be seen.
        nn.init.zeros_(model.base.weight)
    model = _sharded(model) if sharded else model
    trained = [p for p in model.parameters() if p.requires_grad]
    project = ProjectConfiguration(directory, automatic_checkpoint_naming=True)
    ckpt = Checkpointer(save=EverySteps(1), project_config=project)
    model, optimizer = ckpt.prepare(model, torch.optim.AdamW(trained, lr=0.01))
    ckpt.load_state()
    while ckpt.global_step < until:
        ckpt.backward(model(torch.ones(1, WIDTH)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        ckpt.step()
    ckpt.flush()
    base = model.base if sharded else model.module.base
    for name, tensor in base.state_dict().items():
        full = tensor.full_tensor() if sharded else tensor
        assert torch.equal(full, whole[name])


class Rows(nn.Module):
    """One row each, so that one of two ranks holds none of either."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        still = distribute_tensor(torch.ones(1, 2**18), mesh, [Shard(0)])
        moving = distribute_tensor(torch.ones(1, 5), mesh, [Shard(0)])
        self.still = nn.Parameter(still, requires_grad=False)
        self.moving = nn.Parameter(moving)


def _empty_shards(rank: int, world_size: int, directory: Path) -> None:
    ckpt = Checkpointer()
    model = ckpt.prepare(Rows(init_device_mesh("cpu", (world_size,))))
    ckpt.save_state(directory / "a")
    dist.barrier()
    with torch.no_grad():
        model.still.zero_()
    ckpt.load_state(directory / "a")
    assert torch.equal(model.still.full_tensor(), torch.ones(1, 2**18))


def test_ranks_that_hold_nothing_agree_on_what_is_frozen(tmp_path: Path) -> None:
    spawn(_empty_shards, 2, tmp_path)
    assert len(list((tmp_path / "a").glob("frozen-*"))) == 1


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_each_rank_writes_its_share_once(tmp_path: Path, sharded: bool) -> None:
    spawn(_train, 2, tmp_path, sharded, 2)
    spawn(_train, 2, tmp_path, sharded, 3)
    for rank in range(2):
        files = sorted((tmp_path / "checkpoints").glob(f"*/frozen-{rank:05d}-of-00002.*"))
        assert len(files) == 3
        # The life that resumed links to what the one before it wrote.
        assert len({file.stat().st_ino for file in files}) == 1
        base = 4 * WIDTH * (WIDTH + 1)
        assert abs(files[0].stat().st_size - base / 2) < 4 * WIDTH + 1000
    spawn(_train, 3, tmp_path, sharded, 5)
    saved = open_checkpoint(tmp_path / "checkpoints" / "checkpoint_4")
    saved.verify()
    assert saved.world_size == 3
