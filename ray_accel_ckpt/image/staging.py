"""Host buffers that *are* shards: tensors are copied to their final byte offsets.

A slot is made once and reused, because the first touch of fresh memory is what
is slow. There are `slots` of them: that, times this rank's share, is all the
host memory saving takes. A save that finds none free waits.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch

from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.image.shard import Layout
from ray_accel_ckpt.state.sharding import local


class Slot:
    """One reusable buffer of host memory, pinned where an accelerator copies into it."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def reserve(self, nbytes: int) -> torch.Tensor:
        """A uint8 tensor of `nbytes`, whatever it held before."""
        if self._buffer.numel() < nbytes:
            # The old buffer goes first: two at once would break the memory bound.
            self._buffer = torch.empty(0, dtype=torch.uint8)
            self._buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=_pins())
        return self._buffer[:nbytes]

    def fill(self, layout: Layout, tensors: Mapping[str, torch.Tensor]) -> memoryview:
        """Copy the slices of `layout` into place; the bytes of the whole file.

        When this returns, every copy is complete: the tensors may change.
        """
        buffer = self.reserve(layout.nbytes)
        header = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)
        buffer[: len(layout.header)].copy_(header)
        on_device = False
        for placed in layout.placed:
            piece = placed.slice
            if piece.nbytes == 0:
                continue
            source = local(tensors[piece.spec.name])
            rows = source[piece.start : piece.stop] if piece.spec.shape else source
            target = buffer[placed.begin : placed.end].view(source.dtype).view(piece.box.size)
            on_device |= source.device.type != "cpu"
            target.copy_(rows, non_blocking=True)
        if on_device:
            torch.accelerator.synchronize()
        return bytes_of(buffer)


class SlotPool:
    """`slots` slots, handed out to saves and given back when their bytes are durable."""

    def __init__(self, slots: int) -> None:
        if type(slots) is not int or slots < 1:
            raise ConfigurationError(
                f"slots must be a whole number, at least 1; got {slots!r}",
                remedy="2 lets one save be written while the next is staged",
            )
        self._free = [Slot() for _ in range(slots)]
        self._total = slots
        self._changed = threading.Condition()

    def acquire(self) -> Slot:
        """Wait for a free slot. The wait is bounded by the `storage_timeout` of earlier saves."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._free))
            return self._free.pop()

    def release(self, slot: Slot) -> None:
        with self._changed:
            self._free.append(slot)
            self._changed.notify()

    def drain(self) -> None:
        """Wait until every slot is back."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._free) == self._total)


def bytes_of(buffer: torch.Tensor) -> memoryview:
    """The memory of a host tensor of uint8."""
    array: Any = buffer.numpy()
    return memoryview(array)


def _pins() -> bool:
    return torch.accelerator.is_available()
