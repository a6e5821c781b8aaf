"""A node's snapshots: what counts as there, replicas, and what is removed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ray_accel_ckpt.errors import CorruptCheckpointError, NotACheckpointError
from ray_accel_ckpt.image.staging import Slot
from ray_accel_ckpt.runtime import keeper
from ray_accel_ckpt.runtime.group import Group
from ray_accel_ckpt.runtime.keepers import attempt_of, newest_whole, whole
from ray_accel_ckpt.runtime.kept import Kept, held_of
from ray_accel_ckpt.runtime.restore import Restorer
from ray_accel_ckpt.runtime.room import Share, needs, peers_of
from ray_accel_ckpt.runtime.shelf import PREFIX, Files, Shelf
from ray_accel_ckpt.storage.filesystem import Entry, LocalFilesystem

SHARD = "shard-00001-of-00002.safetensors"
FROZEN = "frozen-00001-of-00002.safetensors"
MANIFEST = "manifest-00001-of-00002.json"


def _name(step: int, attempt: str = "aaaaaa") -> str:
    return f"checkpoint_{step:08d}_{attempt}"


def _publish(shelf: Shelf, step: int, *, frozen: Path | None = None) -> dict[str, bytes]:
    """What a worker of rank 1 publishes."""
    directory = shelf.own(1, _name(step))
    directory.mkdir(parents=True)
    content = {SHARD: bytes([step]) * 1000, MANIFEST: f"manifest {step}".encode()}
    for file, data in content.items():
        (directory / file).write_bytes(data)
    if frozen is not None:
        (directory / FROZEN).hardlink_to(frozen)
        content[FROZEN] = frozen.read_bytes()
    return content


class _Copy:
    """Replicates rank 1 of one shelf to another, and says what it had to fetch."""

    def __init__(self, source: Shelf, target: Shelf) -> None:
        self.source, self.target = source, target

    def __call__(self, step: int, *, stays: int | None = None) -> list[str]:
        fetched = []

        def fetch(file: str, nbytes: int) -> Iterator[bytes]:
            fetched.append(file)
            data = (self.source.own(1, _name(step)) / file).read_bytes()
            yield data[: nbytes // 2]
            yield data[nbytes // 2 :]

        files = self.source.files_of(1, _name(step))
        kept = "" if stays is None else _name(stays)
        self.target.receive(1, _name(step), files, fetch, stays=lambda name: name == kept)
        return fetched


@pytest.fixture
def copy(tmp_path: Path) -> _Copy:
    return _Copy(Shelf(root=tmp_path / "a"), Shelf(root=tmp_path / "b"))


def _content(shelf: Shelf, step: int) -> dict[str, bytes]:
    files = shelf.snapshots().get(_name(step), {})
    paths = {file: shelf.path(_name(step), file) for file in files}
    return {file: path.read_bytes() for file, path in paths.items() if path is not None}


def test_a_replica_has_the_same_files(copy: _Copy) -> None:
    content = _publish(copy.source, 1)
    assert copy(1) == [SHARD, MANIFEST]
    assert _content(copy.target, 1) == content
    assert _content(copy.source, 1) == content


def test_without_its_manifest_nothing_is_there(copy: _Copy) -> None:
    _publish(copy.source, 1)
    (copy.source.own(1, _name(1)) / MANIFEST).unlink()
    assert copy.source.snapshots() == {}
    assert copy.source.files_of(1, _name(1)) == {}


def test_of_replicas_the_newest_are_kept(copy: _Copy) -> None:
    contents = {}
    for step in range(1, 7):
        contents[step] = _publish(copy.source, step)
        copy(step)
    assert sorted(copy.target.snapshots()) == [_name(4), _name(5), _name(6)]
    assert all(_content(copy.target, step) == contents[step] for step in (4, 5, 6))


def test_memory_of_replicas_is_used_again(copy: _Copy, tmp_path: Path) -> None:
    inodes = []
    for step in range(1, 5):
        _publish(copy.source, step)
        copy(step)
        path = copy.target.path(_name(step), SHARD)
        assert path is not None
        inodes.append(path.stat().st_ino)
    assert len(set(inodes[:3])) == 3
    assert inodes[3] == inodes[0]


def test_what_is_frozen_is_fetched_once(copy: _Copy, tmp_path: Path) -> None:
    frozen = tmp_path / "frozen"
    frozen.write_bytes(b"frozen" * 100)
    contents = {}
    fetched = []
    for step in range(1, 6):
        contents[step] = _publish(copy.source, step, frozen=frozen)
        fetched.append(FROZEN in copy(step))
    assert fetched == [True, False, False, False, False]
    assert all(_content(copy.target, step) == contents[step] for step in (3, 4, 5))
    # Other bytes, of the same length.
    other = tmp_path / "other"
    other.write_bytes(b"FROZEN" * 100)
    contents[6] = _publish(copy.source, 6, frozen=other)
    assert FROZEN in copy(6)
    assert all(_content(copy.target, step) == contents[step] for step in (4, 5, 6))


def test_a_copy_that_was_cut_off_is_not_there_and_can_be_made_again(copy: _Copy) -> None:
    content = _publish(copy.source, 1)
    files: Files = copy.source.files_of(1, _name(1))

    def cut_off(file: str, nbytes: int) -> Iterator[bytes]:
        yield bytes(nbytes - 1)

    with pytest.raises(CorruptCheckpointError, match="a replica is not what it is a copy of"):
        copy.target.receive(1, _name(1), files, cut_off)
    assert copy.target.snapshots() == {}
    assert list((copy.target.root / "replicas/00001").iterdir()) == []
    copy(1)
    assert _content(copy.target, 1) == content


def test_what_is_not_wanted_goes_and_what_others_use_stays(copy: _Copy) -> None:
    for step in (1, 2):
        _publish(copy.source, step)
        copy(step)
    slot = copy.source.slot("aaaaaa", 1, 0)
    other = copy.source.slot("bbbbbb", 1, 0)
    slot.parent.mkdir()
    slot.touch()
    other.touch()
    for shelf in (copy.source, copy.target):
        shelf.keep(lambda name: name == _name(2), lives=lambda attempt: attempt == "aaaaaa")
        assert list(shelf.snapshots()) == [_name(2)]
    assert slot.exists()
    assert not other.exists()


def test_memory_that_is_taken(copy: _Copy) -> None:
    copy.source.make()
    assert copy.source.taken("aaaaaa") == 0
    copy.source.slot("aaaaaa", 1, 0).write_bytes(bytes(4096))
    copy.source.slot("bbbbbb", 1, 0).write_bytes(bytes(8192))
    assert copy.source.taken("aaaaaa") == 4096


def test_what_nobody_keeps_any_more_is_removed(tmp_path: Path) -> None:
    """A container that is started again has the memory of the one before, and not its processes."""
    roots = [Shelf(root=tmp_path / f"{PREFIX}{name}") for name in "abc"]
    kept = [shelf.make() for shelf in roots[:2]]
    (tmp_path / "ours").mkdir()
    os.close(kept[0])
    roots[2].make()
    assert {path.name for path in tmp_path.iterdir()} == {f"{PREFIX}b", f"{PREFIX}c", "ours"}
    assert roots[1].is_there()
    assert not roots[0].is_there()


def test_nobody_else_can_look(copy: _Copy) -> None:
    copy.source.make()
    assert copy.source.root.stat().st_mode & 0o777 == 0o700
    copy.source.clear()
    assert not copy.source.root.exists()


def test_what_has_to_stay_is_not_used_again(copy: _Copy) -> None:
    contents = {}
    for step in range(1, 8):
        contents[step] = _publish(copy.source, step)
        copy(step, stays=2)
    assert sorted(copy.target.snapshots()) == [_name(2), _name(5), _name(6), _name(7)]
    assert all(_content(copy.target, step) == contents[step] for step in (2, 5, 6, 7))


def test_nothing_goes_for_a_snapshot_that_is_gone(copy: _Copy) -> None:
    for step in (1, 2, 3):
        _publish(copy.source, step)
        copy(step)
    with pytest.raises(NotACheckpointError, match="is gone"):
        copy(4)
    assert sorted(copy.target.snapshots()) == [_name(1), _name(2), _name(3)]


# --- of all nodes -------------------------------------------------------------------------


def _held(**nodes: dict[str, list[int]]) -> dict[str, dict[str, dict[str, tuple[int, int]]]]:
    """By node and name, which of two ranks' parts are held."""
    return {
        node: {
            name: {f"manifest-{rank:05d}-of-00002.json": (10, 0) for rank in ranks}
            for name, ranks in snapshots.items()
        }
        for node, snapshots in nodes.items()
    }


def test_a_snapshot_is_whole_if_all_ranks_parts_are_somewhere() -> None:
    held = _held(
        a={_name(1): [0], _name(2): [0], _name(3): [0]},
        b={_name(1): [1], _name(2): [1, 0], _name(4): [1]},
    )
    assert whole(held) == [_name(2), _name(1)]
    assert newest_whole(held, lambda name: True) == _name(2)
    assert newest_whole(held, lambda name: name != _name(2)) == _name(1)
    assert newest_whole(_held(a={_name(1): [0]}), lambda name: True) is None


def test_the_last_of_several_of_one_step_is_the_newest() -> None:
    second = f"{_name(2)}01"
    assert whole(_held(a={_name(2): [0, 1], second: [0, 1]})) == [second, _name(2)]
    assert attempt_of(second) == attempt_of(_name(2)) == "aaaaaa"
    assert attempt_of("mine") == ""


def test_what_travelled_as_json_is_what_was_held() -> None:
    assert held_of({"a": {"x": {"file": [1, 2]}}}) == {"a": {"x": {"file": (1, 2)}}}


def test_kept_files_read_like_a_directory(copy: _Copy, tmp_path: Path) -> None:
    content = _publish(copy.source, 1)
    held = {"a": copy.source.snapshots()}
    kept = Kept("run", str(copy.source.root), keepers=None, held=held)  # type: ignore[arg-type]
    path = f"memory://run/{_name(1)}"
    assert kept.list(path) == [
        Entry(name=MANIFEST, nbytes=len(content[MANIFEST])),
        Entry(name=SHARD, nbytes=1000),
    ]
    buffer = bytearray(10)
    kept.read_into(f"{path}/{SHARD}", 990, memoryview(buffer))
    assert buffer == content[SHARD][990:]
    assert kept.near(f"{path}/{SHARD}")
    assert kept.list(f"memory://run/{_name(2)}") == []
    with pytest.raises(FileNotFoundError, match="no node has"):
        kept.read_into(f"memory://run/{_name(2)}/{SHARD}", 0, memoryview(buffer))


# --- who reads ----------------------------------------------------------------------------


class _Told(Group):
    """This is rank 0, and the others have said what is near them."""

    def __init__(self, *others: list[int]) -> None:
        self.others = others

    world_size = property(lambda self: 1 + len(self.others))  # type: ignore[assignment]

    def gather(self, value: Any) -> list[Any]:
        return [value, *self.others]


@pytest.mark.parametrize(
    ("near", "others", "readers"),
    [
        # Each its own; those of both in turn; what is near nobody, in turn too.
        ([0], [[1]], {0: 0, 1: 1, 2: 0, 3: 1}),
        ([0, 1], [[2, 3]], {0: 0, 1: 0, 2: 1, 3: 1}),
        ([0, 1, 2, 3], [[0, 1, 2, 3]], {0: 0, 1: 1, 2: 0, 3: 1}),
    ],
)
def test_a_rank_reads_what_is_on_its_node(
    near: list[int], others: list[list[int]], readers: dict[int, int]
) -> None:
    shards = {number: SimpleNamespace(file=f"{number}") for number in range(4)}
    snapshot: Any = SimpleNamespace(shards=shards, where="memory://run/name")
    kept: Any = SimpleNamespace(near=lambda path: int(path.rpartition("/")[2]) in near)
    restorer = Restorer(
        filesystem=LocalFilesystem(),
        group=_Told(*others),
        slot=Slot(),
        device=torch.device("cpu"),
        decide=lambda snapshot: None,  # type: ignore[arg-type,return-value]
    )
    assert restorer._readers(snapshot, kept) == readers
    assert restorer._readers(snapshot, None) == {0: 0, 1: 1, 2: 0, 3: 1}


# --- room ---------------------------------------------------------------------------------


def test_the_next_nodes_have_the_copies() -> None:
    nodes = ["a", "a", "b", "c"]
    assert peers_of("a", nodes, 1) == ["b"]
    assert peers_of("c", nodes, 2) == ["a", "b"]
    assert peers_of("a", nodes, 9) == ["b", "c"]
    assert peers_of("a", ["a", "a"], 1) == []
    assert peers_of("a", nodes, 0) == []


def test_what_a_node_needs_is_for_its_own_ranks_and_for_others_copies() -> None:
    shares = [Share("a", 100, 0), Share("a", 50, 7), Share("b", 10, 0)]
    assert needs(shares, replicas=0, copies=4) == {"a": 4 * 150 + 2 * 7, "b": 40}
    both = needs(shares, replicas=1, copies=4)
    assert both == {"a": 4 * 150 + 2 * 7 + 3 * 10, "b": 40 + 3 * 150 + 2 * 7}


def test_a_worker_that_does_not_end_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for its snapshots asks for those of others after it."""
    monkeypatch.setattr(keeper, "GONE", 0.0)
    monkeypatch.setattr(keeper.Keeper, "_watch", lambda self: None)
    nobody: Any = SimpleNamespace(held=dict)
    kept = keeper.Keeper(str(tmp_path / "kept"), "node", nobody, nobody, nobody)
    kept.open("aaaaaa")
    # Ends with its input.
    command = [sys.executable, "-S", "-c", "input()"]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE)
    kept.begin("aaaaaa", None, worker.pid)
    with pytest.raises(NotACheckpointError, match="does not end"):
        kept.write(_name(1), [1])
    worker.communicate(b"\n")
    with pytest.raises(NotACheckpointError, match="is gone before it was written"):
        kept.write(_name(1), [1])
    assert kept._guardian.stdin is not None
    kept._guardian.stdin.close()
