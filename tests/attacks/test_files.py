"""Files that are not what their names say: pickles, links, pipes, directories."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_accel_ckpt import open_checkpoint
from ray_accel_ckpt.errors import CheckpointError, NotACheckpointError
from ray_accel_ckpt.storage.catalog import candidates
from ray_accel_ckpt.storage.filesystem import LocalFilesystem
from ray_accel_ckpt.storage.writer import write_image
from tests.attacks.conftest import MANIFEST, PATH, SHARD, Victim
from tests.helpers_image import Small, edited, image_of, newest, opened, part_of, save

LOCAL = LocalFilesystem()


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    return tmp_path / "code was run"


def _pickles(proof: Path, tmp_path: Path) -> list[bytes]:
    torch.save({"model": Payload(proof)}, tmp_path / "saved")
    plain = [pickle.dumps(Payload(proof), protocol) for protocol in range(6)]
    return [*plain, (tmp_path / "saved").read_bytes()]


def test_the_payload_works(proof: Path) -> None:
    pickle.loads(pickle.dumps(Payload(proof)))
    assert proof.exists()


@pytest.mark.parametrize("name", [MANIFEST, SHARD])
def test_a_pickle_under_our_name(victim: Victim, proof: Path, tmp_path: Path, name: str) -> None:
    for data in _pickles(proof, tmp_path):
        victim.memory.files[name] = data
        victim.refuses()
    assert not proof.exists()


def test_a_pickle_as_long_as_the_shard(victim: Victim, proof: Path) -> None:
    length = len(victim.memory.files[SHARD])
    victim.memory.files[SHARD] = pickle.dumps(Payload(proof)).ljust(length, b"\0")
    victim.refuses("header|not those that were written")
    assert not proof.exists()


def test_a_pickle_with_right_checksums_stays_bytes(victim: Victim, proof: Path) -> None:
    """An attacker may call a pickle a tensor; then it is one."""
    data = pickle.dumps(Payload(proof))
    captured = part_of({"x": torch.frombuffer(bytearray(data), dtype=torch.uint8)})
    write_image(victim.memory, "run/checkpoint_2", image_of(captured), timeout=1.0)
    found = opened(victim.memory, "run/checkpoint_2").state_dict("part")["x"]
    assert bytes(found.numpy()) == data
    assert not proof.exists()


def test_a_pickle_in_a_value_stays_text(victim: Victim, proof: Path) -> None:
    text = pickle.dumps(Payload(proof), 0).decode("ascii")
    victim.edit(lambda body: body["parts"]["shared"]["value"].update(number=text))
    victim.loads()
    assert not proof.exists()


def _local(tmp_path: Path) -> Path:
    return Path(save(LOCAL, 1, directory=str(tmp_path / "run")))


def _refused(checkpoint: Path) -> None:
    into = Small(9)
    before = into.bits()
    with pytest.raises(CheckpointError):
        into.restorer(LOCAL).exactly(str(checkpoint))
    assert into.bits() == before
    with pytest.raises(CheckpointError):
        open_checkpoint(checkpoint).verify()


def _manifest(checkpoint: Path) -> Path:
    return checkpoint / MANIFEST.rpartition("/")[2]


def _shard(checkpoint: Path) -> Path:
    return checkpoint / SHARD.rpartition("/")[2]


@pytest.mark.parametrize("of", [_manifest, _shard])
def test_a_pipe_under_our_name_does_not_hang(tmp_path: Path, of: Any) -> None:
    checkpoint = _local(tmp_path)
    of(checkpoint).unlink()
    os.mkfifo(of(checkpoint))
    _refused(checkpoint)


@pytest.mark.parametrize("of", [_manifest, _shard])
@pytest.mark.parametrize("target", ["/dev/zero", "/dev/full", "/etc/hostname", "/", "gone", "."])
def test_a_link_to_something_else(tmp_path: Path, of: Any, target: str) -> None:
    checkpoint = _local(tmp_path)
    of(checkpoint).unlink()
    of(checkpoint).symlink_to(target)
    _refused(checkpoint)


@pytest.mark.parametrize("of", [_manifest, _shard])
def test_a_link_to_itself(tmp_path: Path, of: Any) -> None:
    checkpoint = _local(tmp_path)
    of(checkpoint).unlink()
    of(checkpoint).symlink_to(of(checkpoint).name)
    _refused(checkpoint)


def test_a_stray_link_to_itself_does_not_keep_a_run_from_loading(tmp_path: Path) -> None:
    checkpoint = _local(tmp_path)
    (checkpoint.parent / "loop").symlink_to("loop")
    (checkpoint / "loop").symlink_to("loop")
    assert newest(LOCAL, Small(9), str(checkpoint.parent)) is not None


def test_a_huge_sparse_shard_that_is_all_header(tmp_path: Path) -> None:
    checkpoint = _local(tmp_path)
    os.truncate(_shard(checkpoint), 2**40)

    def change(body: dict[str, Any]) -> None:
        body["shard"].update(nbytes=2**40, header_nbytes=2**40)
        body["slices"], body["parts"] = [], {}

    _manifest(checkpoint).write_bytes(edited(_manifest(checkpoint).read_bytes(), change))
    _refused(checkpoint)


def test_a_huge_sparse_manifest(tmp_path: Path) -> None:
    checkpoint = _local(tmp_path)
    os.truncate(_manifest(checkpoint), 2**40)
    _refused(checkpoint)


def test_deleting_a_linked_checkpoint_leaves_what_it_points_to(tmp_path: Path) -> None:
    """`total_limit` must not reach out of the run's directory."""
    checkpoint = _local(tmp_path)
    link = tmp_path / "other" / "checkpoint_7"
    link.parent.mkdir()
    link.symlink_to(checkpoint, target_is_directory=True)
    LOCAL.delete(str(link))
    assert not link.is_symlink()
    open_checkpoint(checkpoint).verify()


def test_deleting_a_checkpoint_does_not_follow_links_in_it(tmp_path: Path) -> None:
    checkpoint = _local(tmp_path)
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("x")
    (checkpoint / "link").symlink_to(kept, target_is_directory=True)
    LOCAL.delete(str(checkpoint))
    assert not checkpoint.exists()
    assert (kept / "file").read_text() == "x"


@pytest.mark.parametrize("link", [True, False])
def test_writing_replaces_a_link_and_not_its_target(tmp_path: Path, link: bool) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    place = tmp_path / "place"
    if link:
        place.symlink_to(target)
    else:
        place.hardlink_to(target)
    LOCAL.write(str(place), [b"new"])
    assert place.read_bytes() == b"new"
    assert target.read_bytes() == b"precious"


@pytest.mark.parametrize(
    "name",
    [
        "manifest-00000-of-00000.json",
        "manifest-00005-of-00002.json",
        "manifest-00000-of-99999.json",
        "manifest-00000-of-00001.json\n",
        "manifest-0000\N{FULLWIDTH DIGIT ZERO}-of-00001.json",
    ],
)
def test_names_that_are_nearly_ours(victim: Victim, name: str) -> None:
    victim.memory.files = {f"{PATH}/{name}": victim.memory.files[MANIFEST]}
    with pytest.raises(NotACheckpointError):
        victim.looks()
    with pytest.raises(NotACheckpointError):
        victim.loads()


@pytest.mark.parametrize(
    "number", ["9" * 5000, "\N{FULLWIDTH DIGIT ONE}", "-1", "1\n", "1_", "1_x"]
)
def test_numbers_that_are_none(victim: Victim, number: str) -> None:
    victim.memory.files[f"run/checkpoint_{number}/x"] = b""
    assert [c.path for c in candidates(victim.memory, "run")] == [PATH]
