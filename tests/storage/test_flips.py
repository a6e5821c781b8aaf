"""Any byte that is not the byte that was written is found before anything changes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import islice

import pytest
import torch
from torch import nn

from ray_accel_ckpt import Checkpointer, ProjectConfiguration
from ray_accel_ckpt.errors import CheckpointError, NoUsableCheckpointError
from ray_accel_ckpt.image.manifest import parse_name
from ray_accel_ckpt.storage.fakes import MemoryFilesystem
from ray_accel_ckpt.storage.filesystem import Filesystem
from tests.helpers_image import RUN, Small, newest, opened, save

OLD, NEW = 1, 2
NEWEST = f"{RUN}/checkpoint_{NEW}"


@pytest.fixture
def two(memory: MemoryFilesystem) -> MemoryFilesystem:
    """An older and a newer checkpoint, both good."""
    save(memory, OLD)
    save(memory, NEW)
    return memory


def _files(filesystem: MemoryFilesystem, path: str) -> dict[str, bytes]:
    return {n: data for n, data in filesystem.files.items() if n.startswith(f"{path}/")}


def _flips(data: bytes) -> Iterator[bytes]:
    """`data` with each of its bytes changed, one at a time, the bits taking turns."""
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        yield bytes(flipped)


def _damages(data: bytes) -> Iterator[bytes]:
    """Flips, every shorter length, and one byte too many."""
    yield from _flips(data)
    yield from (data[:length] for length in range(len(data)))
    yield data + b"\n"


def test_the_checkpoint_of_these_tests_is_small(two: MemoryFilesystem) -> None:
    kinds = {parse_name(name.rpartition("/")[2]) for name in _files(two, NEWEST)}
    assert kinds == {("shard", 0, 1), ("manifest", 0, 1)}
    assert 3000 < sum(map(len, _files(two, NEWEST).values())) < 8000


def test_loading_falls_back_whatever_byte_is_damaged(
    two: MemoryFilesystem, caplog: pytest.LogCaptureFixture
) -> None:
    into, old = Small(9), Small(OLD).bits()
    for name, data in _files(two, NEWEST).items():
        # That each one is found, the next two tests show. An odd number: the bits take turns.
        for damaged in islice(_damages(data), 0, None, 5):
            two.files[name] = damaged
            caplog.clear()
            restored = newest(two, into)
            assert restored is not None
            assert restored.snapshot.step == OLD
            assert into.bits() == old
            (record,) = caplog.records
            assert record.levelno == logging.WARNING
            assert name in record.getMessage()
        two.files[name] = data


def test_nothing_changes_when_the_only_checkpoint_is_damaged(memory: MemoryFilesystem) -> None:
    path = save(memory, NEW)
    into = Small(9)
    before = into.bits()
    for name, data in _files(memory, path).items():
        for damaged in _flips(data):
            memory.files[name] = damaged
            with pytest.raises(NoUsableCheckpointError, match=name):
                newest(memory, into)
            assert into.bits() == before
        memory.files[name] = data


def test_verify_finds_every_damaged_byte_of_every_rank(memory: MemoryFilesystem) -> None:
    path = save(memory, NEW, world_size=2)
    opened(memory, path).verify()
    for name, data in _files(memory, path).items():
        for damaged in _damages(data):
            memory.files[name] = damaged
            with pytest.raises(CheckpointError) as caught:
                opened(memory, path).verify()
            assert name in caught.value.where
        memory.files[name] = data


def test_a_missing_file_is_passed_over(
    two: MemoryFilesystem, caplog: pytest.LogCaptureFixture
) -> None:
    for name in _files(two, NEWEST):
        memory = MemoryFilesystem({n: data for n, data in two.files.items() if n != name})
        into = Small(9)
        restored = newest(memory, into)
        assert restored is not None
        assert into.bits() == Small(OLD).bits()
        if parse_name(name.rpartition("/")[2]) == ("shard", 0, 1):
            assert name in caplog.text


def test_a_missing_file_of_one_rank_is_named(memory: MemoryFilesystem) -> None:
    path = save(memory, NEW, world_size=2)
    for name in _files(memory, path):
        rest = MemoryFilesystem({n: data for n, data in memory.files.items() if n != name})
        with pytest.raises(CheckpointError) as caught:
            opened(rest, path)
        assert name in caught.value.where


def test_a_thousand_clean_loads_raise_no_alarm(
    memory: MemoryFilesystem, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(memory, NEW)
    expected = Small(NEW).bits()
    for _ in range(1000):
        into = Small(9)
        newest(memory, into)
        assert into.bits() == expected
        opened(memory, path).verify()
    assert not caplog.records


def _trainer() -> tuple[Checkpointer, nn.Module]:
    project = ProjectConfiguration("p", automatic_checkpoint_naming=True)
    ckpt = Checkpointer(project_config=project)
    model = ckpt.prepare(nn.Linear(3, 2))
    return ckpt, model


def test_load_state_names_the_file_and_takes_the_older_checkpoint(
    memory: MemoryFilesystem,
    route: Callable[[Filesystem], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The whole way through a `Checkpointer`: one byte out of every fifty."""
    route(memory)
    ckpt, model = _trainer()
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ckpt.save_state()
    with torch.no_grad():
        model.weight.add_(1)
    newer = ckpt.save_state()
    for name, data in _files(memory, newer).items():
        for position in range(0, len(data), 50):
            damaged = bytearray(data)
            damaged[position] ^= 0x10
            memory.files[name] = bytes(damaged)
            caplog.clear()
            other, into = _trainer()
            assert other.load_state()
            assert other.resumed_from == "p/checkpoints/checkpoint_0"
            assert all(torch.equal(old[n], t) for n, t in into.state_dict().items())
            assert name in caplog.text
        memory.files[name] = data
