"""`open_checkpoint`: looking into a checkpoint without a training loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ray_accel_ckpt import Checkpointer, open_checkpoint
from ray_accel_ckpt.errors import ConfigurationError, CorruptCheckpointError
from ray_accel_ckpt.storage.fakes import MemoryFilesystem, RecordingFilesystem
from ray_accel_ckpt.storage.filesystem import Filesystem
from tests.helpers_image import Small, opened, save


def _read_of_shards(recording: RecordingFilesystem) -> int:
    return sum(read.nbytes for read in recording.reads if "shard" in read.path)


def test_what_is_in_it(memory: MemoryFilesystem) -> None:
    path = save(memory, 5, world_size=3)
    saved = opened(memory, path)
    assert (saved.path, saved.step, saved.epoch, saved.world_size) == (path, 5, 0, 3)
    assert saved.parts == ("model", "shared", "own")
    assert "step=5" in repr(saved)


def test_opening_reads_no_tensor(memory: MemoryFilesystem) -> None:
    recording = RecordingFilesystem(memory)
    saved = opened(recording, save(memory, 1, world_size=2))
    saved.state_dict("model")
    assert _read_of_shards(recording) == 0


def test_only_the_bytes_asked_for_are_read(memory: MemoryFilesystem) -> None:
    recording = RecordingFilesystem(memory)
    model = opened(recording, save(memory, 1, world_size=2)).state_dict("model")
    read = 0
    for name in ("0.weight", "0.bias", "1.running_var", "1.num_batches_tracked"):
        tensor = model[name]
        read += tensor.numel() * tensor.element_size()
        assert _read_of_shards(recording) == read


def test_tensors_come_whole_from_any_number_of_ranks(memory: MemoryFilesystem) -> None:
    for world_size in (1, 2, 3, 7):
        path = save(memory, world_size, world_size=world_size)
        found = opened(memory, path).state_dict("model")
        expected = Small(world_size).model.state_dict()
        assert [*found] == [*expected]
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_model_takes_the_lazy_dict_as_it_is(memory: MemoryFilesystem) -> None:
    state = opened(memory, save(memory, 4, world_size=2)).state_dict("model")
    into = Small(9).model
    into.load_state_dict(state)
    expected = Small(4).model.state_dict()
    assert all(torch.equal(tensor, expected[n]) for n, tensor in into.state_dict().items())


def test_what_is_looked_up_is_a_copy(memory: MemoryFilesystem) -> None:
    state = opened(memory, save(memory, 4)).state_dict("model")
    state["0.bias"].zero_()
    assert torch.equal(state["0.bias"], Small(4).model[0].bias)


def test_each_worker_has_its_own(memory: MemoryFilesystem) -> None:
    saved = opened(memory, save(memory, 4, world_size=3))
    for rank in range(3):
        own = saved.state_dict("own", rank=rank)
        assert own["rank"] == rank
        assert torch.equal(own["noise"], torch.full((3,), 40 + rank))
        assert saved.state_dict("shared", rank=rank)["number"] == 4


def test_the_lazy_dict_is_a_mapping(memory: MemoryFilesystem) -> None:
    shared = opened(memory, save(memory, 4)).state_dict("shared")
    assert len(shared) == 2
    assert "moments" in shared
    assert "other" not in shared
    assert repr(shared) == "LazyDict('number', 'moments')"
    with pytest.raises(KeyError):
        shared["other"]


def test_a_part_or_rank_that_is_not_there(memory: MemoryFilesystem) -> None:
    saved = opened(memory, save(memory, 4, world_size=2))
    with pytest.raises(ConfigurationError, match="it has: model, shared, own"):
        saved.state_dict("optimizer")
    for rank in (-1, 2):
        with pytest.raises(ConfigurationError, match="2 workers"):
            saved.state_dict("own", rank=rank)


def test_verify_reads_every_byte_once(memory: MemoryFilesystem) -> None:
    recording = RecordingFilesystem(memory)
    path = save(memory, 4, world_size=2)
    opened(recording, path).verify()
    shards = [data for name, data in memory.files.items() if "shard" in name]
    assert _read_of_shards(recording) == sum(map(len, shards))


def test_a_damaged_tensor_is_found_when_it_is_looked_up(memory: MemoryFilesystem) -> None:
    path = save(memory, 4)
    name = f"{path}/shard-00000-of-00001.safetensors"
    data = bytearray(memory.files[name])
    data[8 + int.from_bytes(data[:8], "little")] ^= 1
    memory.files[name] = bytes(data)
    model = opened(memory, path).state_dict("model")
    damaged = []
    for key in model:
        try:
            model[key]
        except CorruptCheckpointError as e:
            assert f"model/{key}" in str(e)
            damaged.append(key)
    assert len(damaged) == 1


def test_a_path_of_any_kind(tmp_path: Path) -> None:
    ckpt = Checkpointer()
    model = ckpt.prepare(nn.Linear(2, 2))
    ckpt.save_state(tmp_path / "a")
    for place in (tmp_path / "a", str(tmp_path / "a"), f"file://{tmp_path}/a"):
        saved = open_checkpoint(place)
        saved.verify()
        assert torch.equal(saved.state_dict("model")["weight"], model.weight)


def test_saving_and_opening_on_a_routed_filesystem(
    memory: MemoryFilesystem, route: Callable[[Filesystem], None]
) -> None:
    route(memory)
    ckpt = Checkpointer()
    model = ckpt.prepare(nn.Linear(2, 2))
    ckpt.save_state("a")
    assert torch.equal(opened(memory, "a").state_dict("model")["bias"], model.bias)
