"""References to checkpoints: followed, damaged, and what they name gone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ray_accel_ckpt import Checkpointer, open_checkpoint
from ray_accel_ckpt.errors import (
    CorruptCheckpointError,
    NotACheckpointError,
    NoUsableCheckpointError,
)
from ray_accel_ckpt.storage.catalog import inherited
from ray_accel_ckpt.storage.fakes import MemoryFilesystem
from ray_accel_ckpt.storage.reference import MAX_NBYTES, ORIGIN, REFERENCE, encode
from tests.helpers_image import Small, newest, opened, save

DONOR = "experiment/donor/run"


def _refer(memory: MemoryFilesystem, directory: str, checkpoint: str, name: str = REFERENCE) -> str:
    memory.write(f"{directory}/{name}", [encode(directory, checkpoint)])
    return directory


def test_a_reference_is_opened_as_what_it_names(memory: MemoryFilesystem) -> None:
    path = save(memory, 3, world_size=2, directory=DONOR)
    reference = _refer(memory, "experiment/donor/checkpoint_000001", path)
    saved = opened(memory, reference)
    assert (saved.path, saved.step) == (path, 3)
    weight = Small(3).model.state_dict()["0.weight"]
    assert torch.equal(saved.state_dict("model")["0.weight"], weight)
    saved.verify()


def test_an_experiment_can_be_moved(memory: MemoryFilesystem) -> None:
    path = save(memory, 3, directory=DONOR)
    _refer(memory, "experiment/donor/checkpoint_000001", path)
    for name in [*memory.files]:
        memory.files[f"bucket/moved/{name}"] = memory.files.pop(name)
    moved = opened(memory, "bucket/moved/experiment/donor/checkpoint_000001")
    assert moved.path == f"bucket/moved/{path}"


def test_a_reference_on_disk_is_opened_and_loaded(tmp_path: Path) -> None:
    ckpt = Checkpointer()
    ckpt.prepare(torch.nn.Linear(2, 2))
    path = ckpt.save_state(tmp_path / "run" / "checkpoint_1")
    reference = tmp_path / "trial" / "checkpoint_000000"
    reference.mkdir(parents=True)
    (reference / REFERENCE).write_bytes(encode(str(reference), path))
    assert open_checkpoint(reference).path == path
    other = Checkpointer()
    model = other.prepare(torch.nn.Linear(2, 2))
    assert other.load_state(reference)
    saved = open_checkpoint(path).state_dict("model")["weight"]
    assert torch.equal(model.state_dict()["weight"], saved)


def test_manifests_win_over_a_file_of_the_same_name(memory: MemoryFilesystem) -> None:
    path = save(memory, 3)
    memory.write(f"{path}/{REFERENCE}", [b"the user's own"])
    assert opened(memory, path).step == 3


def test_what_is_gone_is_named(memory: MemoryFilesystem) -> None:
    reference = _refer(memory, "experiment/trial/checkpoint_000001", f"{DONOR}/checkpoint_7")
    with pytest.raises(NotACheckpointError, match=r"is gone\n  where: experiment/donor/run/checkp"):
        opened(memory, reference)


def test_a_reference_to_a_reference_is_none(memory: MemoryFilesystem) -> None:
    first = _refer(memory, "a/checkpoint_000001", save(memory, 1))
    second = _refer(memory, "b/checkpoint_000001", first)
    with pytest.raises(NotACheckpointError, match="no manifest there"):
        opened(memory, second)


def _with(**members: object) -> bytes:
    body = {"format": "ray_accel_ckpt.reference", "version": 1, "checkpoint": "../run/checkpoint_1"}
    return json.dumps({**body, **members}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b'{"format":"ray_accel_ckpt.reference"',
        _with(version=2),
        _with(format="other"),
        _with(more=1),
        _with(checkpoint=1),
        _with(checkpoint=""),
        _with(checkpoint="/etc"),
        _with(checkpoint=".."),
        _with(checkpoint="."),
        _with(checkpoint="../../../../etc"),
        _with(checkpoint="../run//checkpoint_1"),
        _with(checkpoint="../run/x/../checkpoint_1"),
        _with(checkpoint="../run/check\0point_1"),
        _with(checkpoint="x" * 5000),
        b" " * MAX_NBYTES + _with(),
    ],
)
def test_a_damaged_reference_is_refused(memory: MemoryFilesystem, data: bytes) -> None:
    save(memory, 1)
    directory = "experiment/trial"
    memory.files[f"{directory}/{REFERENCE}"] = data
    with pytest.raises(CorruptCheckpointError, match="reference to a checkpoint is damaged"):
        opened(memory, directory)
    memory.files["run/" + ORIGIN] = data
    del memory.files["run/checkpoint_1/manifest-00000-of-00001.json"]
    with pytest.raises(CorruptCheckpointError, match="reference to a checkpoint is damaged"):
        newest(memory, Small(9))


def test_a_run_begins_from_its_origin(memory: MemoryFilesystem) -> None:
    for number in (3, 4):
        save(memory, number, directory=DONOR)
    _refer(memory, "run", f"{DONOR}/checkpoint_3", ORIGIN)
    paths = [f"{DONOR}/checkpoint_3", f"{DONOR}/checkpoint_4"]
    assert inherited(memory, "run") == paths
    restored = newest(memory, into := Small(9))
    assert restored is not None
    assert restored.path == paths[0]
    assert into.bits() == Small(3).bits()


def test_a_run_goes_on_from_its_own_checkpoints(memory: MemoryFilesystem) -> None:
    _refer(memory, "run", save(memory, 3, directory=DONOR), ORIGIN)
    save(memory, 1)
    restored = newest(memory, into := Small(9))
    assert restored is not None
    assert restored.path == "run/checkpoint_1"
    assert into.bits() == Small(1).bits()


def test_an_origin_that_is_gone_is_replaced_by_the_newest_of_its_run(
    memory: MemoryFilesystem, caplog: pytest.LogCaptureFixture
) -> None:
    _refer(memory, "run", f"{DONOR}/checkpoint_3", ORIGIN)
    for number in (2, 4, 5, 6):
        save(memory, number, directory=DONOR)
    del memory.files[f"{DONOR}/checkpoint_6/manifest-00000-of-00001.json"]
    restored = newest(memory, into := Small(9))
    assert restored is not None
    assert into.bits() == Small(5).bits()
    assert f"{DONOR}/checkpoint_3" in caplog.text
    assert f"{DONOR}/checkpoint_6" in caplog.text


def test_a_run_whose_origin_is_lost_does_not_start_anew(memory: MemoryFilesystem) -> None:
    _refer(memory, "run", f"{DONOR}/checkpoint_3", ORIGIN)
    with pytest.raises(NoUsableCheckpointError, match="none of 1 checkpoints"):
        newest(memory, Small(9))
