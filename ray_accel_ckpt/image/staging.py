"""Host buffers that *are* shards: tensors are copied to their final byte offsets.

A slot is made once and reused, because the first touch of fresh memory is what
is slow. There are `slots` of them: that, times this rank's share, is all the
host memory saving takes. A save that finds none free waits. (What is frozen is a part
of the share, and has a slot of its own until it is written: see `frozen`.)
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.image.copies import Copies, Copy, may_be_late
from ray_accel_ckpt.image.partition import Slice
from ray_accel_ckpt.image.shard import Layout, Placed
from ray_accel_ckpt.state.sharding import is_sharded, local


class Slot:
    """One reusable buffer of host memory, pinned where an accelerator copies into it.

    Attributes:
        used: a number that grows from one use to the next; the pool's.
        published: whether others know what is in it.
    """

    def __init__(self) -> None:
        self.used = 0
        self.published = False
        self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._copies: Copies | None = None
        self._places: _Places | None = None

    def reserve(self, nbytes: int) -> torch.Tensor:
        """A uint8 tensor of `nbytes`, whatever it held before."""
        self._finish()
        if self._buffer.numel() < nbytes:
            # The old buffer goes first: two at once would break the memory bound.
            self._places = None
            self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")
            # A save may come from inside an evaluation; the buffer is for all that follow.
            with torch.inference_mode(False):
                self._buffer = torch.empty(
                    nbytes, dtype=torch.uint8, device="cpu", pin_memory=pins()
                )
        return self._buffer[:nbytes]

    def fill(
        self,
        layout: Layout,
        tensors: Mapping[str, torch.Tensor],
        *,
        late: Mapping[str, Sequence[torch.Tensor]] = MappingProxyType({}),
    ) -> memoryview:
        """Copy the slices of `layout` into place: the bytes of the whole file, once `copies.wait`
        returns.

        When this returns, the tensors may change, but for those of `late`: these
        may be changed by the next step of a torch optimizer, or after `settle`.

        Args:
            late: names of tensors that only torch optimizers write, and the live tensors
                that are written if they are.
        """
        buffer = self.reserve(layout.nbytes)
        header = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)
        buffer[: len(layout.header)].copy_(header)
        at_once: list[Copy] = []
        later: list[Copy] = []
        for place in self._places_of(layout):
            name, source = place.name, tensors[place.name]
            rows = place.rows(local(source) if is_sharded(source) else source)
            watched = late.get(name)
            if watched and may_be_late(rows, watched):
                later.append(Copy(name, rows, place.target, tuple(watched)))
            else:
                at_once.append(Copy(name, rows, place.target))
        self._copies = Copies(at_once, later)
        return bytes_of(buffer)

    def _places_of(self, layout: Layout) -> list[_Place]:
        """Where the slices go; as it was, if they are the same ones as last time."""
        if self._places is None or self._places.layout is not layout:
            # A save may come from inside an evaluation; these are for all that follow.
            with torch.inference_mode(False):
                placed = [each for each in layout.placed if each.slice.nbytes]
                places = [_place(each, self._buffer) for each in placed]
            self._places = _Places(layout, places)
        return self._places.all

    def settle(self) -> None:
        """Let anyone change the tensors, those of `late` too. Raises `TornSnapshotError`."""
        if self._copies is not None:
            self._copies.settle()

    def take_waited(self) -> float:
        if self._copies is None:
            return 0.0
        waited, self._copies.waited = self._copies.waited, 0.0
        return waited

    def free(self) -> None:
        """Give the memory back."""
        self._finish()
        self._places = None
        self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")

    @property
    def copies(self) -> Copies:
        """Of the last `fill`."""
        if self._copies is None:
            raise RuntimeError("nothing has been filled in")
        return self._copies

    def _finish(self) -> None:
        """Of a save that was dropped, copies may be under way still."""
        copies, self._copies = self._copies, None
        if copies is not None:
            # What went wrong with them was told to whoever writes that image.
            with contextlib.suppress(Exception):
                copies.finish()


class Lease:
    """A slot in use: until `release`, or until nobody has this any more.

    So a save that was cut off, by an interrupt between any two steps, takes none with it.
    """

    def __init__(self, pool: SlotPool, slot: Slot) -> None:
        self._pool, self.slot = pool, slot

    def release(self) -> None:
        """From any thread. Again, it does nothing."""
        self._pool.release(self)


class SlotPool:
    """`slots` slots, lent to saves until their bytes are durable.

    Args:
        kept: slots there are beside them, so that of those published the newest `kept`
            stay as they are.
        make: makes the slot of a number.
    """

    def __init__(
        self, slots: int, *, kept: int = 0, make: Callable[[int], Slot] = lambda number: Slot()
    ) -> None:
        if type(slots) is not int or slots < 1:
            raise ConfigurationError(
                f"slots must be a whole number, at least 1; got {slots!r}",
                remedy="2 lets one save be written while the next is staged",
            )
        self._slots = [make(number) for number in range(slots + kept)]
        self._leases: dict[Slot, weakref.ref[Lease]] = {}
        self._kept = kept
        self._uses = itertools.count(1)
        # Reentrant: a lease may be collected by a thread that is in here. Nothing blocks in here.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)

    def acquire(self) -> Lease:
        """Wait for a free slot. The wait is bounded by the `storage_timeout` of earlier saves."""
        # The lock itself: an interrupt in the condition's own `__enter__` would leave it locked.
        with self._lock:
            self._changed.wait_for(lambda: len(self._free()) > self._kept)
            # What is worth keeping comes last.
            free = sorted(self._free(), key=lambda slot: slot.used if slot.published else 0)
            # The newest that may go: as long as it does, the memory of others is never touched.
            slot = free[-1 - self._kept]
            slot.used = next(self._uses)
            lease = Lease(self, slot)
            self._leases[slot] = weakref.ref(lease, self._lapsed)
            return lease

    def release(self, lease: Lease) -> None:
        """See `Lease.release`."""
        with self._lock:
            known = self._leases.get(lease.slot)
            if known is not None and known() is lease:
                del self._leases[lease.slot]
                self._changed.notify_all()

    def _lapsed(self, lease: weakref.ref[Lease]) -> None:
        del lease
        with self._lock:
            self._changed.notify_all()

    def _free(self) -> list[Slot]:
        leases = {slot: known() for slot, known in self._leases.items()}
        return [slot for slot in self._slots if leases.get(slot) is None]

    def settle(self) -> None:
        """Let anyone change the tensors that are being saved. Raises `TornSnapshotError`."""
        for slot in self._slots:
            slot.settle()

    def take_waited(self) -> float:
        """Seconds that threads were kept waiting for copies, since this was last called."""
        return sum(slot.take_waited() for slot in self._slots)

    def keep_nothing(self) -> None:
        """From now on, be as if `kept` were 0; the slots that are too many go."""
        with self._lock:
            free = self._free()
            for slot in free[len(free) - self._kept :]:
                self._slots.remove(slot)
            self._kept = 0
        for slot in free:
            slot.free()

    def drain(self) -> None:
        """Wait until every slot is back."""
        with self._lock:
            self._changed.wait_for(lambda: len(self._free()) == len(self._slots))


class _Place(NamedTuple):
    """Where a slice goes. `first` and `stop` are None if it is all that this rank holds."""

    name: str
    target: torch.Tensor
    first: int | None
    stop: int | None

    def rows(self, source: torch.Tensor) -> torch.Tensor:
        return source if self.first is None else source[self.first : self.stop]


class _Places(NamedTuple):
    layout: Layout
    all: list[_Place]


def _place(placed: Placed, buffer: torch.Tensor) -> _Place:
    piece = placed.slice
    target = buffer[placed.begin : placed.end].view(piece.spec.dtype).view(piece.box.size)
    whole = piece.start == 0 and piece.stop == piece.spec.box.rows
    first, stop = (None, None) if whole else (piece.start, piece.stop)
    return _Place(piece.spec.name, target, first, stop)


def rows_of(piece: Slice, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What a slice is of the live tensor, in the memory of this rank."""
    source = local(tensors[piece.spec.name])
    return source[piece.start : piece.stop] if piece.spec.shape else source


def bytes_of(buffer: torch.Tensor) -> memoryview:
    """The memory of a host tensor of uint8."""
    array: Any = buffer.numpy()
    return memoryview(array)


def pins() -> bool:
    return torch.accelerator.is_available()
