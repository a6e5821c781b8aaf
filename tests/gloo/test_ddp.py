"""Several real workers under DDP: what they end with is what they would have ended with."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ray_accel_ckpt import Checkpointer, EverySteps, ProjectConfiguration, errors, open_checkpoint
from ray_accel_ckpt.image import copies
from ray_accel_ckpt.runtime import session
from ray_accel_ckpt.storage import background
from ray_accel_ckpt.storage.filesystem import Claim, Entry, LocalFilesystem
from tests.gloo.workers import form, spawn, write
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
    for name in ("explicit", "again"):
        with pytest.raises(errors.StateMismatchError, match="do not train the same model"):
            ckpt.save_state(directory / name)


def test_workers_with_different_models_are_refused_at_each_save(tmp_path: Path) -> None:
    spawn(_uneven_models, 2, tmp_path)


def _changing_group(rank: int, world_size: int, directory: Path) -> None:
    joined = _checkpointer(directory, 1)
    joined.prepare(nn.Linear(1, 1))
    dist.barrier()
    dist.destroy_process_group()
    early = _checkpointer(directory, 1)
    early.prepare(nn.Linear(1, 1))
    with pytest.raises(errors.ConfigurationError, match="were 2 workers, and now there are 1"):
        joined.step()
    form(rank, world_size, directory / "store")
    with pytest.raises(errors.ConfigurationError, match="were 1 workers, and now there are 2"):
        early.save_state()
    assert not (directory / "project/checkpoints").exists()
    dist.barrier()
    # Where the peers are those that it knows, it goes on.
    joined.save_state()


def test_workers_that_join_late_or_part_early_are_refused(tmp_path: Path) -> None:
    """Each would save as if it were alone, and nothing would be a checkpoint of all."""
    spawn(_changing_group, 2, tmp_path)
    open_checkpoint(tmp_path / "project/checkpoints/checkpoint_0").verify()


class _OwnDisk(LocalFilesystem):
    """What each node has under one path if it is not shared."""

    def _at(self, path: str) -> str:
        return f"{path}-of-{dist.get_rank()}"

    def claim(self, path: str) -> Claim:
        return super().claim(self._at(path))

    def list(self, path: str) -> list[Entry]:
        return super().list(self._at(path))

    def delete(self, path: str) -> None:
        super().delete(self._at(path))


def _unshared(rank: int, world_size: int, directory: Path) -> None:
    place = (_OwnDisk(), str(directory / "project/checkpoints"))
    with mock.patch.object(session, "resolve", lambda _: place):
        ckpt = _checkpointer(directory, 1)
        ckpt.prepare(nn.Linear(1, 1))
        with pytest.raises(errors.ConfigurationError, match="not shared by all ranks"):
            ckpt.save_state()
        # One of another run is there, but not the one that rank 0 makes.
        if rank == 1:
            write(directory / "project/checkpoints/checkpoint_1-of-1/a", "a")
        dist.barrier()
        with pytest.raises(errors.ConfigurationError, match="not shared by all ranks"):
            ckpt.save_state()
    made = sorted(path.name for path in (directory / "project/checkpoints").iterdir())
    assert made == ["checkpoint_0-of-0", "checkpoint_1-of-0", "checkpoint_1-of-1"]


def test_a_project_directory_that_is_not_shared_is_refused_at_the_first_save(
    tmp_path: Path,
) -> None:
    spawn(_unshared, 2, tmp_path)


class _Failing:
    """A registered object that one worker cannot save, or cannot load, for once."""

    def __init__(self, *, fails: str) -> None:
        self.fails = fails

    def _fail(self, where: str) -> None:
        if where == self.fails:
            self.fails = ""
            raise RuntimeError(f"out of memory: {where}")

    def state_dict(self) -> dict[str, Any]:
        self._fail("state_dict")
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._fail("load_state_dict")


def _failed_by(rank: int, failing: int) -> Any:
    """The failing worker raises its own error, the others one that names it."""
    if rank == failing:
        return pytest.raises(RuntimeError, match=r"^out of memory")
    words = rf"(?s)rank {failing} failed.*RuntimeError: out of memory"
    return pytest.raises(errors.AccelCkptError, match=words)


def _fail_alone(rank: int, world_size: int, directory: Path) -> None:
    # Without a word from the one that failed, the others wait for so long.
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=30))  # type: ignore[attr-defined]
    ckpt = _checkpointer(directory, 1)
    ckpt.prepare(nn.Linear(4, 4))
    failing = _Failing(fails="state_dict" if rank == 1 else "")
    ckpt.register_for_checkpointing(failing, per_rank=True)
    with _failed_by(rank, 1):
        ckpt.save_state()

    def save_hook(models: Any, weights: Any, output_dir: str) -> None:
        if rank == 0:
            raise RuntimeError("out of memory: save hook")

    removed = ckpt.register_save_state_pre_hook(save_hook)
    with _failed_by(rank, 0):
        ckpt.save_state()
    removed.remove()
    ckpt.save_state()
    dist.barrier()

    def load_hook(models: Any, input_dir: str) -> None:
        if rank == 1:
            raise RuntimeError("out of memory: load hook")

    removed = ckpt.register_load_state_pre_hook(load_hook)
    with _failed_by(rank, 1):
        ckpt.load_state()
    removed.remove()
    failing.fails = "load_state_dict" if rank == 1 else ""
    with _failed_by(rank, 1):
        ckpt.load_state()
    assert ckpt.load_state()


def test_what_fails_on_one_worker_fails_on_all_and_leaves_nobody_waiting(tmp_path: Path) -> None:
    spawn(_fail_alone, 2, tmp_path)


def _last_save_fails_alone(rank: int, world_size: int, directory: Path) -> None:
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=30))  # type: ignore[attr-defined]
    ckpt = _checkpointer(directory, 1)
    ckpt.prepare(nn.Linear(4, 4))

    def write_image(*args: Any, **options: Any) -> None:
        if rank == 1:
            raise errors.StorageError("no space")
        background_write(*args, **options)

    background_write = background.write_image
    with mock.patch.object(background, "write_image", write_image):
        ckpt.step()
        # Told before the others have a chance to hear of it.
        with contextlib.ExitStack() as told:
            if rank == 1:
                told.enter_context(pytest.raises(errors.StorageError, match="no space"))
            ckpt.flush()
        with pytest.raises(errors.StorageError, match="no space"):
            ckpt.finish()
    ckpt.finish()
    assert open_checkpoint(directory / "project/checkpoints/checkpoint_2").step == 1
    dist.barrier()
    ckpt.finish()
    assert not (directory / "project/checkpoints/checkpoint_3").exists()


def test_an_end_that_one_worker_could_not_save_is_saved_again_by_all(tmp_path: Path) -> None:
    spawn(_last_save_fails_alone, 2, tmp_path)


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


def _reads(rank: int, world_size: int, directory: Path) -> None:
    def made(broadcast: bool) -> tuple[Checkpointer, nn.Module]:
        torch.manual_seed(int(broadcast))
        model = nn.Linear(512, 512)
        ckpt = Checkpointer(broadcast=broadcast)
        prepared, _ = ckpt.prepare(model, torch.optim.Adam(model.parameters()))
        return ckpt, prepared

    ckpt, saved = made(True)
    ckpt.save_state(directory / "there")
    dist.barrier()
    for broadcast in (True, False):
        ckpt, model = made(broadcast)
        with counted_reads() as read:
            ckpt.load_state(directory / "there")
        for name, tensor in saved.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name])
        write(directory / f"read-{broadcast}-{rank}", str(sum(read)))
    ckpt, _ = made(rank == 0)
    with pytest.raises(errors.ConfigurationError, match="broadcast=False") as caught:
        ckpt.load_state(directory / "there")
    write(directory / f"refused-{rank}", str(caught.value.where))


@contextlib.contextmanager
def counted_reads() -> Iterator[list[int]]:
    """The bytes of shards that this process asks for."""
    read, lengths = LocalFilesystem.read_into, []

    def counted(filesystem: Any, path: str, offset: int, buffer: memoryview) -> None:
        if path.endswith(".safetensors") and offset > 0:
            lengths.append(len(buffer))
        read(filesystem, path, offset, buffer)

    with mock.patch.object(LocalFilesystem, "read_into", counted):
        yield lengths


def test_workers_read_together_or_each_for_itself(tmp_path: Path) -> None:
    spawn(_reads, 3, tmp_path)
    parameters = (512 * 512 + 512) * 4
    together = [int((tmp_path / f"read-True-{rank}").read_text()) for rank in range(3)]
    alone = [int((tmp_path / f"read-False-{rank}").read_text()) for rank in range(3)]
    # Of what each has for itself, its random streams, there are some KB.
    small = 100_000
    assert parameters <= sum(together) < parameters + small
    assert all(read < parameters for read in together)
    assert all(parameters <= read < parameters + small for read in alone)
    for rank in range(3):
        assert "rank 0: True, rank 1: False" in (tmp_path / f"refused-{rank}").read_text()
