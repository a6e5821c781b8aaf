"""Memory and storage: which is loaded, and what comes from one to the other."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest

from ray_accel_ckpt import open_checkpoint
from ray_accel_ckpt.errors import CorruptCheckpointError, NotACheckpointError
from ray_accel_ckpt.runtime.kept import Kept
from ray_accel_ckpt.runtime.ray_run import RayRun
from ray_accel_ckpt.runtime.rescue import write_parts
from ray_accel_ckpt.runtime.restore import Restored
from ray_accel_ckpt.runtime.shelf import Shelf
from ray_accel_ckpt.storage.filesystem import LocalFilesystem
from tests.helpers_image import Small, flip, save


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(root=tmp_path / "shelf")


@pytest.fixture
def run(tmp_path: Path) -> RayRun:
    (tmp_path / "run").mkdir()
    return RayRun(name="run", path=str(tmp_path / "run"), arrow=pyarrow.fs.LocalFileSystem())


def _keep(shelf: Shelf, number: int) -> Path:
    """What the one worker of this node has published of `Small(number)`."""
    return Path(save(LocalFilesystem(), number, directory=str(shelf.own(0, "x").parent)))


def _load(shelf: Shelf, run: RayRun, into: Small) -> Restored | None:
    keepers: Any = None
    kept = Kept(run.name, str(shelf.root), keepers, {"node": shelf.snapshots()})
    return into.restorer(LocalFilesystem()).newest(run.path, kept=kept)


@pytest.mark.parametrize(
    ("in_memory", "in_storage", "taken"),
    [
        ([5, 6], [4], "memory://run/checkpoint_6"),
        ([5, 6], [6], "memory://run/checkpoint_6"),
        ([5, 6], [7], "checkpoint_7"),
        ([], [3], "checkpoint_3"),
        ([2], [], "memory://run/checkpoint_2"),
    ],
)
def test_the_newest_of_both_is_loaded(
    shelf: Shelf, run: RayRun, in_memory: list[int], in_storage: list[int], taken: str
) -> None:
    for number in in_memory:
        _keep(shelf, number)
    for number in in_storage:
        save(LocalFilesystem(), number, directory=run.path)
    small = Small(0)
    restored = _load(shelf, run, small)
    assert restored is not None
    assert restored.path == (taken if "://" in taken else f"{run.path}/{taken}")
    assert restored.kept is ("://" in taken)
    assert small.bits() == Small(int(taken.rpartition("_")[2])).bits()


def test_what_is_damaged_in_memory_is_passed_over(
    shelf: Shelf, run: RayRun, caplog: pytest.LogCaptureFixture
) -> None:
    save(LocalFilesystem(), 4, directory=run.path)
    kept = {number: _keep(shelf, number) for number in (5, 6)}
    flip(kept[6], "shared/moments")
    small = Small(0)
    with caplog.at_level(logging.WARNING):
        restored = _load(shelf, run, small)
    assert restored is not None
    assert restored.path == "memory://run/checkpoint_5"
    assert "memory://run/checkpoint_6" in caplog.text
    flip(kept[5], "own/noise")
    restored = _load(shelf, run, small)
    assert restored is not None
    assert restored.path == f"{run.path}/checkpoint_4"
    assert small.bits() == Small(4).bits()


def test_damage_in_memory_does_not_say_that_anything_was_saved(shelf: Shelf, run: RayRun) -> None:
    flip(_keep(shelf, 5), "shared/moments")
    small = Small(0)
    assert _load(shelf, run, small) is None
    assert small.bits() == Small(0).bits()


def test_what_is_rescued_is_a_checkpoint(shelf: Shelf, run: RayRun) -> None:
    kept = _keep(shelf, 5)
    write_parts(shelf, run, kept.name, [0])
    stored = Path(run.path, kept.name)
    open_checkpoint(stored).verify()
    files = {path.name for path in kept.iterdir()}
    assert {path.name for path in stored.iterdir()} == files
    assert all((stored / file).read_bytes() == (kept / file).read_bytes() for file in files)


def test_what_is_damaged_is_not_rescued(shelf: Shelf, run: RayRun) -> None:
    kept = _keep(shelf, 5)
    flip(kept, "shared/moments")
    with pytest.raises(CorruptCheckpointError):
        write_parts(shelf, run, kept.name, [0])
    assert list(Path(run.path).iterdir()) == []


def test_what_is_gone_is_not_rescued(shelf: Shelf, run: RayRun) -> None:
    kept = _keep(shelf, 5)
    for ranks, name in (([0, 1], kept.name), ([0], "checkpoint_6")):
        with pytest.raises(NotACheckpointError, match="is gone"):
            write_parts(shelf, run, name, ranks)
    assert list(Path(run.path).iterdir()) == []
