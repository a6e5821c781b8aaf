"""FSDP2 and its like on real workers: saved once, read sparingly, refused if not readable."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.fs
import pytest
import torch
import torch.distributed as dist
from moto.server import ThreadedMotoServer
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from ray_accel_ckpt import Checkpointer, EverySteps, ProjectConfiguration, errors, open_checkpoint
from ray_accel_ckpt.image import copies
from ray_accel_ckpt.image import hashing as images
from ray_accel_ckpt.image.manifest import parse_name
from ray_accel_ckpt.storage.catalog import open_snapshot
from ray_accel_ckpt.storage.filesystem import ArrowFilesystem, LocalFilesystem
from tests.gloo.workers import smaller_group, spawn, write
from tests.training import train


def _sharded(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))


# --- exact --------------------------------------------------------------------------------


def _life(rank: int, world_size: int, directory: Path, name: str, die_at: int) -> None:
    def on_step(step: int) -> None:
        if step == die_at:
            # There has to be something to resume from, however slow the machine is.
            ckpt.flush()
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)

    project = ProjectConfiguration(directory / name, automatic_checkpoint_naming=True)
    overlap = name == "killed" and world_size == 3
    copies._SMALL = 0
    ckpt = Checkpointer(save=EverySteps(4), overlap=overlap, project_config=project)
    ended = train(ckpt, rank, on_step=on_step, shard=_sharded)
    write(directory / name / f"digest-{rank}", ended)
    write(directory / name / f"resumed-{rank}", str(ckpt.resumed_from))


@pytest.mark.parametrize("world_size", [2, 3])
def test_killed_workers_end_with_the_same_bits(tmp_path: Path, world_size: int) -> None:
    """300 rows over 3 ranks, and 8: uneven shards; buffers are each rank's own.

    With 3, the copies go on beside training, which must not be seen.
    """
    spawn(_life, world_size, tmp_path, "untouched", 0)
    for die_at in (6, 10):
        spawn(_life, world_size, tmp_path, "killed", die_at, kills=True)
    spawn(_life, world_size, tmp_path, "killed", 0)
    assert "checkpoint_" in (tmp_path / "killed" / "resumed-0").read_text()
    for rank in range(world_size):
        ends = [
            (tmp_path / name / f"digest-{rank}").read_text() for name in ("killed", "untouched")
        ]
        assert ends[0] == ends[1]


def _written_in_between(rank: int, world_size: int, directory: Path) -> None:
    copies._SMALL = 0
    for number, through in enumerate((lambda p: p, lambda p: p.to_local())):
        model = _sharded(_network())
        project = ProjectConfiguration(directory / str(number), automatic_checkpoint_naming=True)
        ckpt = Checkpointer(save=EverySteps(1), overlap=True, project_config=project)
        model, _ = ckpt.prepare(model, torch.optim.SGD(model.parameters()))
        ckpt.step()
        with torch.no_grad():
            through(next(model.parameters())).mul_(7)
        with pytest.raises(errors.TornSnapshotError, match="weight"):
            ckpt.flush()


def test_a_write_to_a_shard_in_between_is_seen(tmp_path: Path) -> None:
    spawn(_written_in_between, 2, tmp_path)


def _from_meta(rank: int, world_size: int, directory: Path) -> None:
    ckpt, model, _ = _made(_sharded(_network()))
    ckpt.save_state(directory / "a")
    dist.barrier()
    with torch.device("meta"):
        other = _network()
    ckpt, other, optimizer = _made(_sharded(other))
    assert ckpt.load_state(directory / "a")
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name].full_tensor(), tensor.full_tensor())
    other(torch.ones(2, 4)).sum().backward()
    optimizer.step()


def test_shards_on_the_meta_device_are_filled(tmp_path: Path) -> None:
    spawn(_from_meta, 2, tmp_path)


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))


def _made(model: nn.Module) -> tuple[Checkpointer, nn.Module, torch.optim.Optimizer]:
    ckpt = Checkpointer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model, optimizer = ckpt.prepare(model, optimizer)
    return ckpt, model, optimizer


def _backward(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    model(torch.randn(3, 4)).square().mean().backward()


def _shards(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.to_local().clone() for name, t in model.state_dict().items()}


def _saved(ckpt: Checkpointer, directory: Path) -> None:
    """By all ranks: whole."""
    ckpt.save_state(directory)
    dist.barrier()


def _situations(rank: int, world_size: int, directory: Path) -> None:
    """Moments that a save may fall into, in one set of processes."""
    _inside_a_window(rank, directory / "window")
    _inside_a_window_of_ddp(rank, directory / "window-of-ddp")
    _before_the_sum(rank, directory / "unreduced")
    _after_an_evaluation(rank, directory / "evaluated")
    _with_an_average(rank, directory / "average")
    _with_a_parameter_of_each_rank(rank, directory / "ignored", _beside_sharded_ones)
    _with_a_parameter_of_each_rank(rank, directory / "ignored-by-ddp", _ignored_by_ddp)
    _copies_that_differ_become_one(rank, directory / "ignored")
    _of_an_average_of_plain_weights(rank, directory / "plain-average")
    _an_object_of_each_rank(directory / "own")
    _a_scalar_parameter(rank, directory / "scalar")
    _ranks_that_want_different_tensors(rank, directory / "ignored")
    _of_copies_of_shards(rank, directory / "copies")
    _with_a_value_of_each_rank(rank, directory / "metric")
    for optimizer in ELEMENTWISE:
        _with(optimizer, rank, directory / optimizer)


def _inside_a_window(rank: int, directory: Path) -> None:
    """Gradients that are summed already are sharded like their parameters, and saved so."""
    ckpt, model, optimizer = _made(_sharded(_network()))
    _backward(model, rank)
    optimizer.step()
    optimizer.zero_grad()
    _backward(model, 10 + rank)
    _saved(ckpt, directory)
    _backward(model, 20 + rank)
    optimizer.step()
    expected = _shards(model)
    ckpt, model, optimizer = _made(_sharded(_network()))
    assert ckpt.load_state(directory)
    _backward(model, 20 + rank)
    optimizer.step()
    assert all(torch.equal(t, expected[name]) for name, t in _shards(model).items())


def _inside_a_window_of_ddp(rank: int, directory: Path) -> None:
    """Each rank's gradients are its own then, and no part of a sharded one."""
    ckpt, model, optimizer = _made(_network())
    _backward(model, rank)
    optimizer.step()
    optimizer.zero_grad()
    with model.no_sync():
        _backward(model, 10 + rank)
    _saved(ckpt, directory)
    for fresh, kept in ((_sharded(_network()), False), (_network(), True)):
        ckpt, model, _ = _made(fresh)
        assert ckpt.load_state(directory)
        assert all((p.grad is not None) == kept for p in model.parameters())


def _before_the_sum(rank: int, directory: Path) -> None:
    """Gradients that FSDP keeps to itself would be lost without a word."""
    ckpt, model, optimizer = _made(_sharded(_network()))
    model.set_requires_gradient_sync(False)
    _backward(model, rank)
    with pytest.raises(errors.UnsupportedStateError, match="not summed over the workers"):
        ckpt.save_state(directory)
    model.set_requires_gradient_sync(True)
    _backward(model, rank)
    optimizer.step()
    optimizer.zero_grad()
    ckpt.save_state(directory)


def _after_an_evaluation(rank: int, directory: Path) -> None:
    """A forward without a backward leaves the root's parameters gathered: other objects
    than those the optimizer knows, which here is captured first."""
    ckpt, model = Checkpointer(), _sharded(_network())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with torch.no_grad():
        model(torch.randn(3, 4))
    optimizer, model = ckpt.prepare(optimizer, model)
    _backward(model, rank)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        model(torch.randn(3, 4))
    _saved(ckpt, directory)
    assert set(open_checkpoint(directory).state_dict("optimizer")["state"]) == {
        f"model.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")
    }


def _with_an_average(rank: int, directory: Path) -> None:
    """A registered object whose state is sharded: a running average of the weights."""

    class Average:
        def __init__(self, model: nn.Module, factor: float) -> None:
            self.shadow = {n: p.detach() * factor for n, p in model.named_parameters()}

        def state_dict(self) -> dict[str, Any]:
            return dict(self.shadow)

        def load_state_dict(self, state: dict[str, Any]) -> None:
            for name, tensor in self.shadow.items():
                tensor.copy_(state[name])

    ckpt, model, _ = _made(_sharded(_network()))
    average = Average(model, 0.5)
    ckpt.register_for_checkpointing(average)
    expected = {name: t.to_local().clone() for name, t in average.shadow.items()}
    _saved(ckpt, directory)
    ckpt, model, _ = _made(_sharded(_network()))
    fresh = Average(model, 0.0)
    ckpt.register_for_checkpointing(fresh)
    assert ckpt.load_state(directory)
    for name, tensor in fresh.shadow.items():
        assert isinstance(tensor, DTensor)
        assert torch.equal(tensor.to_local(), expected[name])


def _beside_sharded_ones(model: nn.Module) -> nn.Module:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    return fully_shard(model, mesh=mesh, ignored_params={model[2].bias})


def _ignored_by_ddp(model: nn.Module) -> nn.Module:
    ignore = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(model, ["2.bias"])
    return model


def _with_a_parameter_of_each_rank(
    rank: int, directory: Path, distribute: Callable[[nn.Module], nn.Module]
) -> None:
    """Nobody keeps its copies equal: each rank's is its own, and so is its optimizer state."""
    ckpt, model, optimizer = _made(distribute(_network()))
    _backward(model, rank)
    optimizer.step()
    optimizer.zero_grad()
    own = getattr(model, "module", model)[2].bias
    others = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(others, own.detach())
    assert not torch.equal(*others)
    expected = own.detach().clone(), optimizer.state[own]["exp_avg"].clone()
    _saved(ckpt, directory)
    ckpt, model, optimizer = _made(distribute(_network()))
    assert ckpt.load_state(directory)
    own = getattr(model, "module", model)[2].bias
    assert torch.equal(own, expected[0])
    assert torch.equal(optimizer.state[own]["exp_avg"], expected[1])


def _copies_that_differ_become_one(rank: int, directory: Path) -> None:
    """What each rank had for itself, loaded where it is one tensor: rank 0's, on all ranks."""
    biases = open_checkpoint(directory)
    first, second = (biases.state_dict("model", rank=r)["2.bias"] for r in range(2))
    assert not torch.equal(first, second)
    moments = biases.state_dict("optimizer")["state"]["model.2.bias"]["exp_avg"]
    for fresh in (_sharded(_network()), _network()):
        ckpt, model, optimizer = _made(fresh)
        assert ckpt.load_state(directory, parts=("model", "optimizer"))
        bias = getattr(model, "module", model)[2].bias
        moment = optimizer.state[bias]["exp_avg"]
        for live, saved in ((bias, first), (moment, moments)):
            whole = live.full_tensor() if isinstance(live, DTensor) else live
            assert torch.equal(whole, saved)


def _of_an_average_of_plain_weights(rank: int, directory: Path) -> None:
    """An object of no known kind, saved when the model was not sharded."""

    class Average:
        def __init__(self, model: nn.Module) -> None:
            inner = getattr(model, "module", model)
            self.shadow = {n: p.detach().clone() for n, p in inner.named_parameters()}

        def state_dict(self) -> dict[str, Any]:
            return dict(self.shadow)

        def load_state_dict(self, state: dict[str, Any]) -> None:
            for name, tensor in self.shadow.items():
                tensor.copy_(state[name])

    ckpt, model, _ = _made(_network())
    average = Average(model)
    for tensor in average.shadow.values():
        tensor.mul_(3)
    ckpt.register_for_checkpointing(average)
    _saved(ckpt, directory)
    ckpt, model, _ = _made(_sharded(_network()))
    fresh = Average(model)
    ckpt.register_for_checkpointing(fresh)
    assert ckpt.load_state(directory)
    for name, tensor in fresh.shadow.items():
        assert torch.equal(tensor.full_tensor(), average.shadow[name])


def _an_object_of_each_rank(directory: Path) -> None:
    class Holder(nn.Module):
        pass

    ckpt, model, _ = _made(_sharded(_network()))
    holder = Holder()
    holder.weight = nn.Parameter(model[0].weight.detach().clone())
    ckpt.register_for_checkpointing(holder, per_rank=True)
    with pytest.raises(errors.UnsupportedStateError, match="no worker's own"):
        ckpt.save_state(directory)


def _a_scalar_parameter(rank: int, directory: Path) -> None:
    """A count of steps has its shape, and is still no sharded tensor."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))

    def made() -> tuple[Checkpointer, nn.Module, torch.optim.Optimizer]:
        model = nn.Module()
        model.scale = nn.Parameter(distribute_tensor(torch.tensor(2.0), mesh, [Replicate()]))
        return _made(model)

    ckpt, model, optimizer = made()
    model.scale.square().backward()
    optimizer.step()
    optimizer.zero_grad()
    _saved(ckpt, directory)
    ckpt, model, optimizer = made()
    assert ckpt.load_state(directory)
    state = optimizer.state[model.scale]
    assert not isinstance(state["step"], DTensor)
    assert isinstance(state["exp_avg"], DTensor)


def _ranks_that_want_different_tensors(rank: int, directory: Path) -> None:
    """A hook that takes the model out on one rank only: the other would wait for ever."""
    ckpt, *_ = _made(_network())
    if rank == 0:
        ckpt.register_load_state_pre_hook(lambda models, _: models.clear())
    with pytest.raises(errors.CorruptCheckpointError, match="do not say the same"):
        ckpt.load_state(directory, parts=("model", "optimizer"))


# Rprop and Adafactor cannot step on a DTensor: torch's operations for it lack some of theirs.
ELEMENTWISE = (
    *("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD"),
    *("NAdam", "RAdam", "RMSprop", "SGD"),
)


def _of_copies_of_shards(rank: int, directory: Path) -> None:
    """What `state_dict()` returns is no memory of the model: the model loads it itself."""

    def cloned(model: nn.Module) -> nn.Module:
        clone = lambda *given: given[1].update({n: t.clone() for n, t in given[1].items()})  # noqa: E731
        model.register_state_dict_post_hook(clone)
        return model

    ckpt, model, optimizer = _made(cloned(_sharded(_network())))
    _backward(model, rank)
    optimizer.step()
    optimizer.zero_grad()
    _saved(ckpt, directory)
    ckpt, other, _ = _made(cloned(_sharded(_network())))
    assert not torch.equal(_shards(other)["0.weight"], _shards(model)["0.weight"])
    assert ckpt.load_state(directory)
    assert all(torch.equal(t, _shards(model)[name]) for name, t in _shards(other).items())


def _with_a_value_of_each_rank(rank: int, directory: Path) -> None:
    """DDP hands out buffers: what a module saves beside them is each worker's own."""

    class Counted(nn.Linear):
        seen = torch.tensor(-1)

        def _save_to_state_dict(self, state: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(state, prefix, keep_vars)
            state[prefix + "seen"] = self.seen.clone()

        def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
            self.seen = state.pop(prefix + "seen", self.seen)
            super()._load_from_state_dict(state, prefix, *rest)

    ckpt, model, _ = _made(Counted(4, 4))
    model.module.seen = torch.tensor(rank)
    _saved(ckpt, directory)
    ckpt, model, _ = _made(Counted(4, 4))
    assert ckpt.load_state(directory)
    assert model.module.seen == rank


def _optimized(kind: str) -> tuple[Checkpointer, nn.Module, torch.optim.Optimizer]:
    ckpt, model = Checkpointer(), _sharded(_network())
    options = {"momentum": 0.9} if kind in ("SGD", "RMSprop") else {}
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1, **options)
    model, optimizer = ckpt.prepare(model, optimizer)
    return ckpt, model, optimizer


def _with(kind: str, rank: int, directory: Path) -> None:
    ckpt, model, optimizer = _optimized(kind)

    def step(seed: int) -> None:
        _backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()

    step(rank)
    _saved(ckpt, directory)
    step(10 + rank)
    expected = _shards(model)
    ckpt, model, optimizer = _optimized(kind)
    assert ckpt.load_state(directory)
    step(10 + rank)
    wrong = [n for n, t in _shards(model).items() if not torch.equal(t, expected[n])]
    assert not wrong, f"{kind}: {wrong}"


def test_saves_at_any_moment(tmp_path: Path) -> None:
    spawn(_situations, 2, tmp_path)


# --- bytes --------------------------------------------------------------------------------


def _wide(columns: int = 512) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(columns, 64 + i, bias=False) for i in range(8)))


def _save_hybrid(rank: int, world_size: int, directory: Path) -> None:
    """Two copies of two shards, and the same replicated by DDP."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    ckpt, *_ = _made(fully_shard(_wide(), mesh=mesh))
    ckpt.save_state(directory / "hybrid")
    ckpt, *_ = _made(_wide())
    ckpt.save_state(directory / "ddp")


def test_each_byte_is_written_once_and_each_rank_writes_about_as_many(tmp_path: Path) -> None:
    spawn(_save_hybrid, 4, tmp_path)
    total = sum(p.numel() * 4 for p in _wide().parameters())
    for name in ("hybrid", "ddp"):
        snapshot = open_snapshot(LocalFilesystem(), str(tmp_path / name))
        shares = [
            sum(i.end - i.begin for i in manifest.slices if i.name.startswith("model/"))
            for manifest in snapshot.manifests
        ]
        assert sum(shares) == total
        # Rows of 2 KB; FSDP's own shards of 65, 67, ... rows differ by one row each.
        uneven = 4 if name == "hybrid" else 0
        assert max(shares) - total / 4 <= (1 + uneven) * 512 * 4


class Counted:
    """How many bytes of shards were asked for, through the seam to any object store."""

    def __init__(self) -> None:
        self.nbytes = 0

    def counting(self) -> Any:
        read = ArrowFilesystem.read_into

        def counted(filesystem: Any, path: str, offset: int, buffer: memoryview) -> None:
            name = parse_name(path.rpartition("/")[2])
            if name is not None and name[0] == "shard":
                self.nbytes += len(buffer)
            read(filesystem, path, offset, buffer)

        return mock.patch.object(ArrowFilesystem, "read_into", counted)


BLOCK = 2048


CASES = [("fsdp", 2, 3), ("fsdp", 3, 2), ("ddp", 2, 3)]


def _through_a_bucket(rank: int, world_size: int, bucket: str, query: str, directory: Path) -> None:
    for kind, before, after in CASES:
        name = f"{kind}-{before}-{after}"
        uri = f"s3://{bucket}/{name}?{query}"
        with smaller_group(rank, before, directory / f"saving-{name}") as member:
            if member:
                _save_to_bucket(uri, kind)
        with smaller_group(rank, after, directory / f"loading-{name}") as member:
            if member:
                write(directory / f"read-{name}-{rank}", _load_from_bucket(uri))


def _save_to_bucket(uri: str, kind: str) -> None:
    with mock.patch.object(images, "BLOCK", BLOCK):
        ckpt, *_ = _made(_sharded(_wide()) if kind == "fsdp" else _wide())
        ckpt.save_state(uri)


def _load_from_bucket(uri: str) -> str:
    model = _sharded(_wide())
    expected = _shards(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    ckpt, model, _ = _made(model)
    counted = Counted()
    with counted.counting():
        assert ckpt.load_state(uri, parts=("model",))
    assert all(torch.equal(t, expected[name]) for name, t in _shards(model).items())
    needed = sum(t.numel() * 4 for t in expected.values())
    return f"{counted.nbytes} {needed}"


def test_each_rank_reads_only_what_it_needs_from_a_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        query = f"scheme=http&endpoint_override={host}:{port}&region=us-east-1"
        uri = f"s3://sharded?allow_bucket_creation=true&{query}"
        bucket, path = pyarrow.fs.FileSystem.from_uri(uri)
        bucket.create_dir(path)
        spawn(_through_a_bucket, 3, path, query, tmp_path)
    finally:
        server.stop()
    for kind, before, after in CASES:
        for rank in range(after):
            file = tmp_path / f"read-{kind}-{before}-{after}-{rank}"
            read, needed = map(int, file.read_text().split())
            # Rounded to blocks at both ends of each of 8 tensors in each of the old shards,
            # and the headers of these.
            slack = 8 * before * 2 * BLOCK + before * 4096
            assert needed <= read <= needed + slack
            assert slack < needed / 2


# --- what cannot be read ------------------------------------------------------------------


def _refusals(rank: int, world_size: int, directory: Path) -> None:
    # Here, because torch warns of itself when they are imported.
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.optim import ZeroRedundancyOptimizer

    ckpt = Checkpointer()
    flat = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    with pytest.raises(errors.ConfigurationError, match="cannot be read") as caught:
        ckpt.prepare(flat)
    assert "fully_shard" in caught.value.remedy
    zero = ZeroRedundancyOptimizer(nn.Linear(4, 4).parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(errors.ConfigurationError, match="on other workers"):
        ckpt.prepare(zero)
    with pytest.raises(errors.ConfigurationError, match="deepspeed's own tools"):
        ckpt.prepare(_engine(nn.Linear(4, 4)))
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    over_some = nn.parallel.DistributedDataParallel(nn.Linear(4, 4), process_group=pairs[rank // 2])
    with pytest.raises(errors.ConfigurationError, match="over some of the workers only"):
        ckpt.prepare(nn.Sequential(over_some))
    _hybrid_before_its_sum(directory)
    # A mesh of its own over half of the ranks: nothing says what the other half holds.
    halves = [dist.DeviceMesh("cpu", [0, 1]), dist.DeviceMesh("cpu", [2, 3])]
    with pytest.raises(errors.UnsupportedStateError, match="some of the workers only"):
        ckpt.prepare(fully_shard(nn.Linear(4, 4), mesh=halves[rank // 2]))
    mesh = dist.init_device_mesh("cpu", (world_size,))
    summed = nn.Linear(4, 4)
    summed.weight = nn.Parameter(
        DTensor.from_local(summed.weight.detach(), mesh, [Partial()], run_check=False)
    )
    with pytest.raises(errors.UnsupportedStateError, match="not yet summed"):
        ckpt.prepare(summed)
    _odd_optimizer(mesh)


def _hybrid_before_its_sum(directory: Path) -> None:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    ckpt, model, _ = _made(fully_shard(_network(), mesh=mesh))
    model.set_requires_all_reduce(False)
    _backward(model, 0)
    with pytest.raises(errors.UnsupportedStateError, match="not summed over the workers"):
        ckpt.save_state(directory / "hybrid")


def _engine(model: nn.Module) -> nn.Module:
    """As DeepSpeed's, which is recognised by where its class is from."""
    kind = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})
    engine = kind()
    engine.module = model
    return engine


def _odd_optimizer(mesh: dist.DeviceMesh) -> None:
    """Its state of a sharded parameter is a plain tensor: whose rows are they?"""
    model = nn.Linear(4, 4, bias=False)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ckpt = Checkpointer()
    ckpt.prepare(model, optimizer)
    optimizer.state[model.weight]["rows"] = torch.zeros(4)
    with pytest.raises(errors.UnsupportedStateError, match="this optimizer's state") as caught:
        ckpt.save_state("/nowhere")
    assert "optimizer/state/model.weight/rows" in str(caught.value)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    spawn(_refusals, 4, tmp_path)
