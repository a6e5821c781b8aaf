"""Slots that are files: what is frozen in one is a checkpoint's file, and outlives the process."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from unittest import mock

import pytest
import torch

from ray_accel_ckpt import MemoryTier
from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.image.partition import share, specs_of
from ray_accel_ckpt.image.shard import Layout, plan
from ray_accel_ckpt.image.shared import SharedSlot
from ray_accel_ckpt.image.staging import Lease, Slot, SlotPool
from tests.helpers_image import part_of


def _planned(tensor: torch.Tensor) -> tuple[Layout, dict[str, torch.Tensor]]:
    captured = part_of({"x": tensor})
    layout = plan(share(specs_of(captured, rank=0, world_size=1), rank=0))
    return layout, dict(captured["part"].tensors)


def test_what_is_frozen_is_the_file(tmp_path: Path) -> None:
    slot = SharedSlot(lambda: tmp_path / "0")
    data = slot.fill(*_planned(torch.arange(1000.0)))
    assert slot.publish(tmp_path / "published", "shard")
    assert (tmp_path / "published/shard").read_bytes() == bytes(data)
    assert bytes(data) == bytes(Slot().fill(*_planned(torch.arange(1000.0))))


def test_the_file_is_as_long_as_what_was_frozen_last(tmp_path: Path) -> None:
    slot = SharedSlot(lambda: tmp_path / "0")
    for n in (1000, 10, 3000, 500, 3000):
        data = slot.fill(*_planned(torch.arange(float(n))))
        assert (tmp_path / "0").read_bytes() == bytes(data)


def test_the_file_outlives_the_slot(tmp_path: Path) -> None:
    slot = SharedSlot(lambda: tmp_path / "0")
    data = bytes(slot.fill(*_planned(torch.arange(1000.0))))
    slot.publish(tmp_path / "published", "shard")
    del slot
    assert (tmp_path / "published/shard").read_bytes() == data


def test_what_was_published_goes_before_the_slot_is_filled_anew(tmp_path: Path) -> None:
    slot = SharedSlot(lambda: tmp_path / "0")
    slot.fill(*_planned(torch.arange(1000.0)))
    published = tmp_path / "published"
    slot.publish(published, "shard-00000-of-00001.safetensors")
    (published / "manifest-00000-of-00001.json").write_text("{}")
    order = []
    unlink = Path.unlink

    def unlinking(path: Path, *, missing_ok: bool = False) -> None:
        order.append(path.name.partition("-")[0])
        unlink(path, missing_ok=missing_ok)

    with mock.patch.object(Path, "unlink", unlinking):
        slot.reserve(10)
    assert order == ["manifest", "shard"]
    assert not published.exists()


def test_memory_of_nobody_else_can_be_read(tmp_path: Path) -> None:
    SharedSlot(lambda: tmp_path / "0").reserve(10)
    assert (tmp_path / "0").stat().st_mode & 0o777 == 0o600


def test_without_room_the_slot_is_one_of_the_process_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Found out before anything is written: a write would end the process."""
    slot = SharedSlot(lambda: tmp_path / "0")
    full = OSError(28, "No space left on device")
    with (
        mock.patch.object(os, "posix_fallocate", side_effect=full),
        caplog.at_level(logging.WARNING),
    ):
        data = slot.fill(*_planned(torch.arange(1000.0)))
    assert "keeps nothing" in caplog.text
    assert "No space left" in caplog.text
    assert bytes(data) == bytes(Slot().fill(*_planned(torch.arange(1000.0))))
    assert not slot.publish(tmp_path / "published", "shard")
    assert list(tmp_path.iterdir()) == []


def test_when_there_is_room_again_there_is_a_file_again(tmp_path: Path) -> None:
    slot = SharedSlot(lambda: tmp_path / "0")
    with mock.patch.object(os, "posix_fallocate", side_effect=OSError(28, "full")):
        slot.reserve(100)
    data = slot.fill(*_planned(torch.arange(1000.0)))
    assert (tmp_path / "0").read_bytes() == bytes(data)


def test_until_there_is_room_the_memory_stays_the_same(tmp_path: Path) -> None:
    slot = SharedSlot(lambda: tmp_path / "0")
    with mock.patch.object(os, "posix_fallocate", side_effect=OSError(28, "full")):
        first = slot.reserve(100).data_ptr()
        assert slot.reserve(100).data_ptr() == first
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_somebody_has_removed_is_made_anew(tmp_path: Path) -> None:
    slot = SharedSlot(lambda: tmp_path / "0")
    slot.reserve(100)
    (tmp_path / "0").unlink()
    data = slot.fill(*_planned(torch.arange(10.0)))
    assert (tmp_path / "0").read_bytes() == bytes(data)


def test_a_directory_that_is_gone_does_not_come_back(tmp_path: Path) -> None:
    """Its keeper has removed it, and nobody would remove it again."""
    gone = tmp_path / "gone"
    slot = SharedSlot(lambda: gone / "slots/0")
    assert slot.reserve(100).numel() == 100
    assert not slot.publish(gone / "own/00000/name", "shard")
    assert not gone.exists()


def test_memory_that_is_given_back(tmp_path: Path) -> None:
    slot = SharedSlot(lambda: tmp_path / "0")
    slot.fill(*_planned(torch.arange(1000.0)))
    slot.publish(tmp_path / "published", "shard")
    slot.free()
    assert list(tmp_path.iterdir()) == []


def test_a_slot_of_no_place_is_like_any_other() -> None:
    slot = SharedSlot(lambda: None)
    assert slot.reserve(100).numel() == 100
    assert not slot.publish(Path("/nowhere"), "shard")


# --- pools that keep ----------------------------------------------------------------------


def _release(lease: Lease) -> None:
    """Give a slot back that was published."""
    lease.slot.published = True
    lease.release()


def test_the_newest_stay_as_they_are() -> None:
    pool = SlotPool(2, kept=2)
    slots = []
    for _ in range(10):
        lease = pool.acquire()
        # Not one of the two before, whichever came back last.
        assert lease.slot not in slots[-2:]
        slots.append(lease.slot)
        _release(lease)


def test_one_that_comes_back_late_is_not_new() -> None:
    pool = SlotPool(2, kept=2)
    late = pool.acquire()
    newer = []
    for _ in range(2):
        lease = pool.acquire()
        newer.append(lease.slot)
        _release(lease)
    _release(late)
    assert pool.acquire().slot not in newer


def test_what_was_not_published_is_not_kept() -> None:
    pool = SlotPool(2, kept=2)
    published = [pool.acquire() for _ in range(2)]
    for lease in published:
        _release(lease)
    for _ in range(5):
        lease = pool.acquire()
        assert lease.slot not in [each.slot for each in published]
        lease.release()


def test_slots_that_are_not_needed_are_never_touched() -> None:
    pool = SlotPool(2, kept=2)
    touched = set()
    for _ in range(10):
        lease = pool.acquire()
        touched.add(id(lease.slot))
        _release(lease)
    assert len(touched) == 3


def test_a_pool_that_keeps_nothing_any_more_is_like_any_other() -> None:
    pool = SlotPool(2, kept=2)
    pool.keep_nothing()
    leases = [pool.acquire() for _ in range(2)]
    assert len({id(lease.slot) for lease in leases}) == 2
    assert pool._free() == []


# --- the setting --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"every_steps": 0}, {"every_steps": 1.5}, {"every_steps": True}, {"replicas": -1}],
)
def test_numbers_that_cannot_be(options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        MemoryTier(**options)  # type: ignore[arg-type]


def test_steps_that_are_kept() -> None:
    assert [s for s in range(1, 10) if MemoryTier(every_steps=3).due(s)] == [3, 6, 9]
