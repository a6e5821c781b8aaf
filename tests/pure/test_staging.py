"""Slots: memory that is made once, holds a shard, and is waited for."""

from __future__ import annotations

import threading

import pytest
import torch

from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.image.partition import share, specs_of
from ray_accel_ckpt.image.shard import Layout, plan
from ray_accel_ckpt.image.staging import Lease, Slot, SlotPool
from tests.helpers_image import part_of


def _planned(value: dict[str, torch.Tensor]) -> tuple[Layout, dict[str, torch.Tensor]]:
    captured = part_of(value)
    layout = plan(share(specs_of(captured, rank=0, world_size=1), rank=0))
    return layout, dict(captured["part"].tensors)


def test_what_is_staged_does_not_change_with_the_tensors() -> None:
    tensor = torch.arange(100.0)
    data = Slot().fill(*_planned({"x": tensor}))
    frozen = bytes(data)
    tensor.zero_()
    assert bytes(data) == frozen


def test_staging_leaves_the_tensors_as_they_are() -> None:
    tensor = torch.arange(6.0, requires_grad=True)
    version = tensor._version
    Slot().fill(*_planned({"x": tensor}))
    assert tensor._version == version
    assert torch.equal(tensor, torch.arange(6.0))


def test_a_slots_memory_is_reused() -> None:
    slot = Slot()
    first = slot.reserve(1000).data_ptr()
    assert slot.reserve(500).data_ptr() == first
    assert slot.reserve(1000).data_ptr() == first
    assert slot.reserve(500).numel() == 500


def test_a_used_slot_gives_the_same_bytes_as_a_fresh_one() -> None:
    """Whatever it held before does not shine through."""
    slot = Slot()
    slot.fill(*_planned({"x": torch.full((1000,), -1.0)}))
    planned = _planned({"y": torch.arange(7), "z": torch.tensor(True)})
    assert bytes(slot.fill(*planned)) == bytes(Slot().fill(*planned))


def test_the_bytes_are_of_the_file_and_no_longer() -> None:
    slot = Slot()
    slot.reserve(10_000)
    layout, tensors = _planned({"x": torch.arange(3)})
    data = slot.fill(layout, tensors)
    assert len(data) == layout.nbytes
    assert data.format == "B"


def test_a_pool_hands_out_each_slot_once() -> None:
    pool = SlotPool(3)
    leases = [pool.acquire() for _ in range(3)]
    assert len({id(lease.slot) for lease in leases}) == 3
    leases[1].release()
    assert pool.acquire().slot is leases[1].slot


def test_a_save_waits_for_a_slot() -> None:
    pool = SlotPool(1)
    lease = pool.acquire()
    got: list[Lease] = []
    waiting = threading.Thread(target=lambda: got.append(pool.acquire()))
    waiting.start()
    assert got == []
    lease.release()
    waiting.join()
    assert got[0].slot is lease.slot


def test_a_lease_that_nobody_has_any_more_is_over() -> None:
    pool = SlotPool(1)
    leases = [pool.acquire()]
    got: list[Lease] = []
    waiting = threading.Thread(target=lambda: got.append(pool.acquire()), daemon=True)
    waiting.start()
    assert got == []
    leases.clear()
    waiting.join(60)
    assert len(got) == 1


def test_a_lease_that_is_over_releases_nothing_of_others() -> None:
    pool = SlotPool(1)
    before = pool.acquire()
    before.release()
    lease = pool.acquire()
    before.release()
    waiting = threading.Thread(target=pool.acquire, daemon=True)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    lease.release()
    waiting.join(60)


def test_draining_waits_for_all_of_them() -> None:
    pool = SlotPool(2)
    leases = [pool.acquire(), pool.acquire()]
    drained = threading.Event()

    def drain() -> None:
        pool.drain()
        drained.set()

    waiting = threading.Thread(target=drain)
    waiting.start()
    for lease in leases:
        assert not drained.is_set()
        lease.release()
    waiting.join()
    assert drained.is_set()


@pytest.mark.parametrize("slots", [0, -1, 1.0, "2", True, None])
def test_a_pool_of_no_slots(slots: object) -> None:
    with pytest.raises(ConfigurationError, match="slots must be"):
        SlotPool(slots)  # type: ignore[arg-type]
