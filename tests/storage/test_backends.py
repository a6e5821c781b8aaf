"""The whole way, saving to loading, over real protocols: what comes back is what was saved."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import gcsfs
import pytest
import torch
from torch import nn

from ray_accel_ckpt import Checkpointer, ProjectConfiguration, open_checkpoint
from ray_accel_ckpt.errors import CheckpointExistsError, CorruptCheckpointError, StorageError
from ray_accel_ckpt.storage.filesystem import Filesystem, resolve, to_arrow
from tests.helpers_image import bytes_of
from tests.storage.conftest import ANONYMOUS, BUCKET

Uri = Callable[[str], str]


def _local(request: pytest.FixtureRequest) -> Uri:
    root = request.getfixturevalue("tmp_path")
    return lambda path: f"{root}/{path}"


BACKENDS = ["local", "s3", "gcs", "memory"]


@pytest.fixture(params=BACKENDS)
def uri(request: pytest.FixtureRequest) -> Uri:
    """Makes a location of a path: each test has a place of its own."""
    if request.param == "local":
        return _local(request)
    return request.getfixturevalue(f"{request.param}_uri")  # type: ignore[no-any-return]


def _checkpointer(seed: int) -> tuple[Checkpointer, nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    ckpt = Checkpointer(storage_timeout=20.0)
    model = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20), nn.Linear(20, 3))
    model, optimizer = ckpt.prepare(model, torch.optim.AdamW(model.parameters()))
    for _ in range(2):
        model(torch.rand(4, 30)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ckpt.step()
    return ckpt, model, optimizer


def _bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[bytes]:
    moments = [each for state in optimizer.state.values() for each in state.values()]
    return [bytes_of(tensor) for tensor in (*model.state_dict().values(), *moments)]


def test_what_is_saved_comes_back(uri: Uri) -> None:
    ckpt, model, optimizer = _checkpointer(1)
    ckpt.save_state(uri("run/a"))
    bits, stream = _bits(model, optimizer), torch.get_rng_state()
    ckpt, model, optimizer = _checkpointer(2)
    assert _bits(model, optimizer) != bits
    assert ckpt.load_state(uri("run/a"))
    assert _bits(model, optimizer) == bits
    assert torch.equal(torch.get_rng_state(), stream)


def test_what_is_saved_can_be_opened(uri: Uri) -> None:
    ckpt, model, _ = _checkpointer(1)
    ckpt.save_state(uri("run/a"))
    saved = open_checkpoint(uri("run/a"))
    saved.verify()
    assert saved.step == 2
    found = saved.state_dict("model")
    assert [*found] == [*model.state_dict()]
    assert all(torch.equal(found[n], t) for n, t in model.state_dict().items())


def test_a_damaged_byte_is_found(uri: Uri) -> None:
    _checkpointer(1)[0].save_state(uri("run/a"))
    filesystem, path = resolve(uri("run/a"))
    (shard,) = (e for e in filesystem.list(path) if e.name.startswith("shard"))
    data = bytearray(shard.nbytes or 0)
    filesystem.read_into(f"{path}/{shard.name}", 0, memoryview(data))
    data[-7] ^= 4
    filesystem.write(f"{path}/{shard.name}", [bytes(data)])
    ckpt, model, optimizer = _checkpointer(2)
    before = _bits(model, optimizer)
    with pytest.raises(CorruptCheckpointError, match=shard.name):
        ckpt.load_state(uri("run/a"))
    assert _bits(model, optimizer) == before


def test_another_checkpoint_is_not_overwritten(uri: Uri) -> None:
    _checkpointer(1)[0].save_state(uri("run/a"))
    with pytest.raises(CheckpointExistsError, match="already holds"):
        _checkpointer(2)[0].save_state(uri("run/a"))
    open_checkpoint(uri("run/a")).verify()


class _Routed:
    """Projects name their directory without URI options: the filesystem is put in their place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, uri: Uri) -> None:
        filesystem, self.root = resolve(uri("project"))
        for module in ("session", "sinks"):
            target = f"ray_accel_ckpt.runtime.{module}.resolve"
            monkeypatch.setattr(target, lambda path: (filesystem, str(path)))
        self.filesystem: Filesystem = filesystem

    def trainer(self, value: float) -> tuple[Checkpointer, nn.Module]:
        project = ProjectConfiguration(self.root, automatic_checkpoint_naming=True, total_limit=2)
        ckpt = Checkpointer(project_config=project)
        model = ckpt.prepare(nn.Linear(3, 3))
        for parameter in model.parameters():
            nn.init.constant_(parameter, value)
        return ckpt, model


def test_the_newest_is_found_and_the_oldest_removed(
    uri: Uri, monkeypatch: pytest.MonkeyPatch
) -> None:
    routed = _Routed(monkeypatch, uri)
    for value in range(3):
        routed.trainer(value)[0].save_state()
    names = [e.name for e in routed.filesystem.list(f"{routed.root}/checkpoints")]
    assert names == ["checkpoint_1", "checkpoint_2"]
    ckpt, model = routed.trainer(9)
    assert ckpt.load_state()
    assert all(torch.equal(p, torch.full_like(p, 2)) for p in model.parameters())


def test_what_is_frozen_is_sent_once(
    uri: Uri, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    routed = _Routed(monkeypatch, uri)
    project = ProjectConfiguration(routed.root, automatic_checkpoint_naming=True)
    ckpt = Checkpointer(project_config=project)
    model = ckpt.prepare(nn.Linear(600, 600).requires_grad_(False))
    *earlier, last = [ckpt.save_state() for _ in range(3)]
    assert "in full" not in caplog.text
    for path in earlier:
        routed.filesystem.delete(path)
    again = Checkpointer(project_config=project)
    other = again.prepare(nn.Linear(600, 600).requires_grad_(False))
    assert again.load_state()
    assert again.resumed_from == last
    assert torch.equal(other.weight, model.weight)
    # The life that resumed links to what the one before it wrote.
    again.save_state()
    assert "in full" not in caplog.text


def test_gcsfs_that_pyarrow_wraps(gcs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    del gcs
    wrapped = to_arrow(gcsfs.GCSFileSystem(project="p", **ANONYMOUS))
    place = f"{BUCKET}/{secrets.token_hex(4)}/run"
    monkeypatch.setattr("ray_accel_ckpt.runtime.sinks.resolve", lambda path: resolve(path, wrapped))
    ckpt, model, _ = _checkpointer(1)
    ckpt.save_state(place)

    class RayCheckpoint:
        path, filesystem = place, wrapped

    saved = open_checkpoint(RayCheckpoint())
    saved.verify()
    found = saved.state_dict("model")
    assert all(torch.equal(found[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("scheme", ["s3", "gcs"])
def test_a_bucket_that_is_not_there(request: pytest.FixtureRequest, scheme: str) -> None:
    uri = request.getfixturevalue(f"{scheme}_uri")("a").replace(f"{BUCKET}/", "no-such-bucket/")
    with pytest.raises(StorageError, match="could not write a shard") as caught:
        _checkpointer(1)[0].save_state(uri)
    assert "no-such-bucket" in caught.value.where
    assert "bucket" in str(caught.value).lower()
