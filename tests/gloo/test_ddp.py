"""Several real workers under DDP: what they end with is what they would have ended with."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ray_accel_ckpt import Checkpointer, EverySteps, ProjectConfiguration, errors, open_checkpoint
from ray_accel_ckpt.image import copies
from tests.gloo.workers import spawn, write
from tests.training import train


def _checkpointer(directory: Path, every: int, **options: object) -> Checkpointer:
    project = ProjectConfiguration(directory / "project", automatic_checkpoint_naming=True)
    return Checkpointer(save=EverySteps(every), project_config=project, **options)  # type: ignore[arg-type]


def _life(
    rank: int,
    world_size: int,
    directory: Path,
    name: str,
    die_at: int,
    workers: int,
    overlap: bool,
) -> None:
    """One life of a worker group; at step `die_at` every worker is gone at once."""

    def on_step(step: int) -> None:
        if step == die_at:
            # There has to be something to resume from, however slow the machine is.
            ckpt.flush()
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)

    copies._SMALL = 0
    ckpt = _checkpointer(directory / name, 4, overlap=overlap)
    resumed: list[bool] = []
    ended = train(ckpt, rank, on_step=on_step, on_loaded=resumed.append, loader_workers=workers)
    write(directory / name / f"digest-{rank}", ended)
    write(directory / name / f"resumed-{rank}", str(ckpt.resumed_from))


def _digests(directory: Path, name: str, world_size: int) -> list[str]:
    return [(directory / name / f"digest-{rank}").read_text() for rank in range(world_size)]


@pytest.mark.parametrize(
    ("world_size", "workers", "overlap"),
    [(2, 0, False), (2, 2, False), (3, 0, True), (4, 0, False)],
)
def test_killed_workers_end_with_the_same_bits(
    tmp_path: Path, world_size: int, workers: int, overlap: bool
) -> None:
    """Buffers differ between ranks when the save falls; three and more workers need pinned
    buckets; the second kill falls into the epoch that the first resumed into."""
    spawn(_life, world_size, tmp_path, "untouched", 0, workers, False)
    for die_at in (6, 10):
        spawn(_life, world_size, tmp_path, "killed", die_at, workers, overlap, kills=True)
    spawn(_life, world_size, tmp_path, "killed", 0, workers, overlap)
    assert "checkpoint_" in (tmp_path / "killed" / "resumed-0").read_text()
    assert _digests(tmp_path, "killed", world_size) == _digests(tmp_path, "untouched", world_size)


def _uneven_models(rank: int, world_size: int, directory: Path) -> None:
    ckpt = _checkpointer(directory, 1)
    ckpt.prepare(nn.Linear(4, 4 + rank).requires_grad_(False))
    with pytest.raises(errors.StateMismatchError, match="do not train the same model"):
        ckpt.save_state(directory / "explicit")


def test_workers_with_different_models_are_refused_at_the_first_save(tmp_path: Path) -> None:
    spawn(_uneven_models, 2, tmp_path)


def _save_then_damage_then_load(rank: int, world_size: int, directory: Path) -> None:
    ckpt = _checkpointer(directory, 1)
    torch.manual_seed(0)
    model = ckpt.prepare(nn.Linear(300, 300))
    for value in (1.0, 2.0):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        ckpt.save_state()
    torch.distributed.barrier()
    if rank == 0:
        # Only rank 1 reads this shard; rank 0 must hear of it and pass the checkpoint over too.
        shard = directory / "project/checkpoints/checkpoint_1/shard-00001-of-00002.safetensors"
        data = bytearray(shard.read_bytes())
        data[-5] ^= 1
        shard.write_bytes(data)
    torch.distributed.barrier()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    assert ckpt.load_state()
    assert ckpt.resumed_from is not None
    assert ckpt.resumed_from.endswith("checkpoint_0")
    for parameter in model.parameters():
        assert torch.equal(parameter, torch.ones_like(parameter))


def test_all_ranks_pass_over_a_shard_that_one_finds_damaged(tmp_path: Path) -> None:
    spawn(_save_then_damage_then_load, 2, tmp_path)


def _explicit(rank: int, world_size: int, directory: Path) -> None:
    ckpt = Checkpointer()
    torch.manual_seed(rank)
    model = ckpt.prepare(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)))
    own = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    ckpt.register_for_checkpointing(own, per_rank=True)
    kept = {n: t.clone() for n, t in own.state_dict().items()}
    path = ckpt.save_state(directory / "there")
    torch.distributed.barrier()
    for tensor in own.state_dict().values():
        tensor.zero_()
    assert ckpt.load_state(path)
    assert all(torch.equal(t, kept[n]) for n, t in own.state_dict().items())
    del model


def test_explicit_directory_and_per_rank_objects(tmp_path: Path) -> None:
    spawn(_explicit, 2, tmp_path)
    saved = open_checkpoint(tmp_path / "there")
    saved.verify()
    first, second = (saved.state_dict("AveragedModel", rank=rank) for rank in range(2))
    assert not torch.equal(first["module.weight"], second["module.weight"])
    assert saved.state_dict("model")["0.weight"].shape == (7, 5)


def _other_world(rank: int, world_size: int, directory: Path) -> None:
    ckpt = _checkpointer(directory, 3)
    loaded: list[bool] = []
    write(directory / f"digest-{world_size}-{rank}", train(ckpt, rank, on_loaded=loaded.append))
    write(directory / f"step-{world_size}-{rank}", f"{ckpt.global_step} {loaded[0]}")


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1)])
def test_another_number_of_workers_goes_on(tmp_path: Path, before: int, after: int) -> None:
    spawn(_life, before, tmp_path, "run", 9, 0, False, kills=True)
    spawn(_other_world, after, tmp_path / "run")
    for rank in range(after):
        assert (tmp_path / "run" / f"step-{after}-{rank}").read_text().endswith("True")
