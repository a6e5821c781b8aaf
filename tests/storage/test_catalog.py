"""Which checkpoint is chosen, and what is said of those that are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ray_accel_ckpt import open_checkpoint
from ray_accel_ckpt.errors import (
    ConfigurationError,
    CorruptCheckpointError,
    FormatVersionError,
    NotACheckpointError,
    NoUsableCheckpointError,
)
from ray_accel_ckpt.storage.catalog import candidates, checkpoint_name, open_snapshot
from ray_accel_ckpt.storage.fakes import MemoryFilesystem
from ray_accel_ckpt.storage.writer import write_image
from tests.helpers_image import RUN, Small, edited, image_of, newest, save, small_image

MANIFEST = "manifest-00000-of-00001.json"
SHARD = "shard-00000-of-00001.safetensors"


def _newer_format(body: dict[str, Any]) -> None:
    body.update(version=4, members_of_tomorrow={})


def _edit(memory: MemoryFilesystem, number: int, change: Callable[[dict[str, Any]], None]) -> None:
    name = f"{RUN}/checkpoint_{number}/{MANIFEST}"
    memory.files[name] = edited(memory.files[name], change)


def test_the_newest_is_chosen_by_number_and_not_by_spelling(memory: MemoryFilesystem) -> None:
    for number in (2, 10, 9):
        save(memory, number)
    restored = newest(memory, into := Small(99))
    assert restored is not None
    assert restored.path == f"{RUN}/checkpoint_10"
    assert into.bits() == Small(10).bits()


def test_the_newest_good_one_is_chosen(memory: MemoryFilesystem) -> None:
    for number in range(1, 6):
        save(memory, number)
    del memory.files[f"{RUN}/checkpoint_5/{MANIFEST}"]
    del memory.files[f"{RUN}/checkpoint_4/{SHARD}"]
    memory.files[f"{RUN}/checkpoint_3/{MANIFEST}"] += b"x"
    restored = newest(memory, into := Small(9))
    assert restored is not None
    assert restored.snapshot.step == 2
    assert into.bits() == Small(2).bits()


def test_what_goes_while_it_is_read_is_made_up_for_by_what_came(memory: MemoryFilesystem) -> None:
    """Another process saves, and removes what is too old, between listing and reading."""

    class Pruned(MemoryFilesystem):
        def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
            if self.files.keys() == before:
                save(self, 2)
                self.delete(f"{RUN}/checkpoint_1")
            super().read_into(path, offset, buffer)

    save(memory, 1)
    before = memory.files.keys()
    into = Small(9)
    assert newest(Pruned(memory.files), into) is not None
    assert into.bits() == Small(2).bits()


def test_an_empty_run_has_none(memory: MemoryFilesystem) -> None:
    assert newest(memory, Small(9)) is None


def test_if_none_is_good_each_is_listed_and_why(memory: MemoryFilesystem) -> None:
    for number in (1, 2):
        save(memory, number)
    del memory.files[f"{RUN}/checkpoint_1/{SHARD}"]
    memory.files[f"{RUN}/checkpoint_2/{MANIFEST}"] = b"{}"
    into = Small(9)
    with pytest.raises(NoUsableCheckpointError) as caught:
        newest(memory, into)
    message = str(caught.value)
    assert "none of 2 checkpoints" in message
    assert f"{RUN}/checkpoint_1/{SHARD}" in message
    assert "is missing" in message
    assert f"{RUN}/checkpoint_2/{MANIFEST}" in message
    assert "does not begin and end as one" in message
    assert caught.value.where == RUN
    assert caught.value.remedy
    assert into.bits() == Small(9).bits()


def test_what_is_not_ours_is_ignored(memory: MemoryFilesystem) -> None:
    """A user's own files and folders, Ray's, and leftovers of a save that was cut off."""
    path = save(memory, 3)
    stray = {
        "notes.txt": b"x",
        "checkpoint_7": b"a file, not a directory",
        "checkpoint_final/model.pt": b"x",
        "checkpoint_8.bak/x": b"x",
        "my_checkpoint_9/x": b"x",
        "checkpoint_manager_snapshot.json": b"{}",
        "checkpoint_3/.shard-00000-of-00001.safetensors.1a2b3c4d.partial": b"x",
        "checkpoint_3/README": b"x",
        "checkpoint_3/shard-00001-of-00002.safetensors": b"of an earlier world",
        "checkpoint_3/sub/manifest-00000-of-00001.json": b"x",
    }
    memory.files |= {f"{RUN}/{name}": data for name, data in stray.items()}
    assert [c.path for c in candidates(memory, RUN)] == [path]
    newest(memory, into := Small(9))
    assert into.bits() == Small(3).bits()


def test_candidates_come_newest_first(memory: MemoryFilesystem) -> None:
    names = [checkpoint_name(7, "bbbbbb"), checkpoint_name(7, "aaaaaa"), checkpoint_name(12, "cc")]
    memory.files = {f"{RUN}/{name}/x": b"" for name in names}
    found = candidates(memory, RUN)
    assert [c.name for c in found] == [
        "checkpoint_00000012_cc",
        "checkpoint_00000007_bbbbbb",
        "checkpoint_00000007_aaaaaa",
    ]
    assert [c.number for c in found] == [12, 7, 7]


@pytest.mark.parametrize("files", [{}, {"x": b""}, {SHARD: b""}, {"d/" + MANIFEST: b""}])
def test_a_directory_that_is_no_checkpoint(
    memory: MemoryFilesystem, files: dict[str, bytes]
) -> None:
    memory.files = {f"{RUN}/a/{name}": data for name, data in files.items()}
    with pytest.raises(NotACheckpointError, match="not a checkpoint") as caught:
        open_snapshot(memory, f"{RUN}/a")
    assert caught.value.where == f"{RUN}/a"


def test_a_path_that_is_not_there(tmp_path: Any) -> None:
    with pytest.raises(NotACheckpointError, match="absent"):
        open_checkpoint(tmp_path / "absent")


def test_something_that_cannot_be_opened() -> None:
    with pytest.raises(ConfigurationError, match="cannot open a dict"):
        open_checkpoint({})


def test_a_newer_format_is_not_read(memory: MemoryFilesystem) -> None:
    save(memory, 1)
    _edit(memory, 1, _newer_format)
    with pytest.raises(FormatVersionError, match="format version 4") as caught:
        open_snapshot(memory, f"{RUN}/checkpoint_1")
    assert "upgrade" in caught.value.remedy


def test_a_newer_format_is_not_passed_over(memory: MemoryFilesystem) -> None:
    """Going on from an older checkpoint would throw away what the newer one holds."""
    save(memory, 1)
    save(memory, 2)
    _edit(memory, 2, _newer_format)
    into = Small(9)
    with pytest.raises(FormatVersionError):
        newest(memory, into)
    assert into.bits() == Small(9).bits()


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(attempt="fedcba"),
        lambda body: body.update(step=3),
        lambda body: body.update(epoch=1),
        lambda body: body.update(run="other"),
        lambda body: body.update(plan="0" * 32),
    ],
)
def test_manifests_of_two_saves_in_one_directory(
    memory: MemoryFilesystem, change: Callable[[dict[str, Any]], None]
) -> None:
    path = save(memory, 2, world_size=2)
    name = f"{path}/manifest-00001-of-00002.json"
    memory.files[name] = edited(memory.files[name], change)
    with pytest.raises(NotACheckpointError, match="different saves"):
        open_snapshot(memory, path)


def test_saves_of_two_worlds_in_one_directory(memory: MemoryFilesystem) -> None:
    path = save(memory, 2, world_size=2)
    write_image(memory, path, small_image(2), timeout=1.0)
    with pytest.raises(NotACheckpointError, match="of 1, 2 ranks"):
        open_snapshot(memory, path)


def test_a_manifest_under_another_ranks_name(memory: MemoryFilesystem) -> None:
    path = save(memory, 2, world_size=2)
    first, second = (f"{path}/manifest-0000{rank}-of-00002.json" for rank in range(2))
    memory.files[second] = memory.files[first]
    with pytest.raises(CorruptCheckpointError, match="another rank's name"):
        open_snapshot(memory, path)


def test_rows_that_no_rank_wrote(memory: MemoryFilesystem) -> None:
    """Two ranks that each took themselves for the first of two."""
    captured = Small(2).captured()
    path = f"{RUN}/checkpoint_2"
    for rank in range(2):
        image = image_of(captured, rank=0, world_size=2)
        write_image(memory, path, image, timeout=1.0)
        for name in list(memory.files):
            if "-00000-of" in name and rank == 0:
                other = name.replace("-00000-of", "-00001-of")
                memory.files[other] = memory.files[name]
    manifest = f"{path}/manifest-00001-of-00002.json"

    def second(body: dict[str, Any]) -> None:
        body["rank"] = 1
        body["shard"]["file"] = "shard-00001-of-00002.safetensors"

    memory.files[manifest] = edited(memory.files[manifest], second)
    with pytest.raises(NotACheckpointError, match="not there row for row"):
        open_snapshot(memory, path)


def test_what_ray_registered_comes_in_the_order_of_time(memory: MemoryFilesystem) -> None:
    """A loop that went back to step 5 and on to 10: the first 15 is of a past given up."""
    names = [checkpoint_name(step, "aaaaaa") for step in (5, 10, 15)]
    names += [checkpoint_name(10, "aaaaaa01")]
    others = [checkpoint_name(step, "bbbbbb") for step in (4, 7, 12)]
    for name in [*names, *others]:
        write_image(memory, f"{RUN}/{name}", small_image(1), timeout=1.0)
    first, second, given_up, back = names
    oldest, between, newer = others
    expected = [newer, back, given_up, second, between, first, oldest]
    found = []
    while len(found) < len(expected):
        restored = Small(9).restorer(memory).newest(RUN, registered=names)
        assert restored is not None
        found.append(restored.path.rpartition("/")[2])
        memory.delete(restored.path)
    assert found == expected


@pytest.mark.parametrize("registered", ["aaaaaa", "bbbbbb"])
def test_of_two_of_the_same_step_the_one_that_ray_registered_last_comes_first(
    memory: MemoryFilesystem, registered: str
) -> None:
    """A life that dies after the last step is followed by one that saves the end, at that step."""
    for number, attempt in ((1, "aaaaaa"), (2, "bbbbbb")):
        write_image(memory, f"{RUN}/{checkpoint_name(72, attempt)}", small_image(number), timeout=1)
    save(memory, 71)
    name = checkpoint_name(72, registered)
    restored = Small(9).restorer(memory).newest(RUN, registered=[name])
    assert restored is not None
    assert restored.path == f"{RUN}/{name}"
