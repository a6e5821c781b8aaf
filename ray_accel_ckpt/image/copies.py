"""The copies of one save into a slot, some of which go on beside training.

A tensor that nothing but an optimizer writes may be read until the next optimizer
steps: on an accelerator by a stream of its own, on the host by a thread. That a
write came in between all the same is seen by torch's count of a tensor's versions.
Copying by a stream of its own is torch's `DefaultStager`'s way; that the wait is at the
next update of the weights is CheckFreq's (Mohan et al., FAST 2021).
"""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NamedTuple, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ray_accel_ckpt.errors import TornSnapshotError

_STREAMED = ("cuda", "xpu")
"""Devices whose copies are ordered by streams. Others copy at once."""
_ONE_WRITE = 2.0
"""Seconds that no write to one tensor takes: memory as large as any is gone through in less."""
_SMALL = 64 * 2**10
"""Bytes of a tensor below which handing it on costs more than copying it."""


class Copy(NamedTuple):
    """One tensor's rows and their place in a slot.

    Attributes:
        watched: the live tensors that are written if the rows are: torch counts the
            versions of each, not those of other views of the memory alone.
    """

    name: str
    source: torch.Tensor
    target: torch.Tensor
    watched: tuple[torch.Tensor, ...] = ()

    def run(self) -> None:
        with torch.no_grad():
            self.target.copy_(self.source, non_blocking=self.source.device.type in _STREAMED)

    def versions(self) -> list[int]:
        return [tensor._version for tensor in self.watched]


class Copies:
    """Begun when made: all of `now` are safe from writes at once, those of `later` by `settle`.

    What streams copy is not waited for here: later work on the current stream comes after it.

    Args:
        now: may be written by anyone as soon as this returns.
        later: are written by torch optimizers only, until `settle` has been called,
            which every torch optimizer's `step` does.

    Attributes:
        waited: seconds that `settle` kept its callers waiting.
    """

    def __init__(self, now: Sequence[Copy], later: Sequence[Copy] = ()) -> None:
        self.waited = 0.0
        self._later = tuple(later)
        self._versions = [copy.versions() for copy in self._later]
        self._settling = threading.Lock()
        self._lock = threading.Lock()
        self._changed: str | None = None
        self._told = False
        self._judged = threading.Event()
        self._lanes: list[_Lane] = []
        try:
            self._begin(now)
        except BaseException:
            self.finish()
            raise
        if later:
            _settle_before_steps(self)
        else:
            self._judged.set()

    def _begin(self, now: Sequence[Copy]) -> None:
        _run_at_once(now)
        self._lanes += [_Enqueued(device) for device in _devices(now)]
        streamed = _devices(self._later)
        self._lanes += [_Stream(device, _on(device, self._later)) for device in streamed]
        host = [copy for copy in self._later if copy.source.device not in streamed]
        if host:
            self._lanes.append(_Thread(host))

    @property
    def under_way(self) -> bool:
        return not all(lane.done() for lane in self._lanes)

    def settle(self) -> None:
        """Let anyone write the sources: writes on this thread come after the copies from here on.

        Blocks until the host's are done; streams are told to wait, this thread does
        not. May be called by several threads, each of which is about to write.

        Raises:
            TornSnapshotError: a tensor of `later` was written before it was known to be
                copied. Told once: the save is given up, training may go on.
        """
        begun = time.monotonic()
        with self._settling:
            self._judge()
            for lane in self._lanes:
                lane.order()
            told, self._told = self._told, True
            self.waited += time.monotonic() - begun
        if self._changed is not None and not told:
            raise _torn(self._changed)

    def wait(self) -> None:
        """Block until all is in place. From any thread.

        Raises:
            TornSnapshotError: and may not be what it was when the copies began.
        """
        self.finish()
        # A version is counted when a write is through, not when it begins. The thread that writes
        # knows best; it is given the time that one write takes, and more.
        if not self._judged.wait(_ONE_WRITE):
            self._judge()
        if self._changed is not None:
            raise _torn(self._changed)

    def finish(self) -> None:
        """Block until no copy is under way, whatever one of them raises: memory is free then."""
        errors = []
        for lane in self._lanes:
            try:
                lane.wait()
            except Exception as e:  # noqa: BLE001 - raised below
                errors.append(e)
        if errors:
            raise errors[0]

    def _judge(self) -> None:
        """The first verdict counts: until then no write can have been in the copies' way."""
        with self._lock:
            if self._judged.is_set():
                return
            for copy, versions in zip(self._later, self._versions, strict=True):
                if copy.versions() != versions:
                    self._changed = copy.name
                    break
            self._judged.set()
            self._later = ()


_UNSETTLED: weakref.WeakSet[Copies] = weakref.WeakSet()
_UNSETTLED_LOCK = threading.Lock()


@functools.cache
def _hook() -> None:
    """One hook for good: one that came and went would do so while torch goes through its hooks."""

    def settle(*_: object) -> None:
        with _UNSETTLED_LOCK:
            under_way = list(_UNSETTLED)
        for copies in under_way:
            copies.settle()
            if not copies.under_way:
                with _UNSETTLED_LOCK:
                    _UNSETTLED.discard(copies)

    register_optimizer_step_pre_hook(settle)


def _settle_before_steps(copies: Copies) -> None:
    _hook()
    with _UNSETTLED_LOCK:
        _UNSETTLED.add(copies)


class _Lane(Protocol):
    """Copies of one kind."""

    def order(self) -> None:
        """Have this thread's writes come after them."""
        ...

    def done(self) -> bool: ...

    def wait(self) -> None:
        """Block until they are done. Raises what one of them raised."""
        ...


def _run(copies: Sequence[Copy]) -> None:
    for copy in copies:
        copy.run()


def _run_at_once(copies: Sequence[Copy]) -> None:
    """In one call: of many small tensors, calls cost more than copying."""
    if copies:
        streamed = any(copy.source.device.type in _STREAMED for copy in copies)
        targets, sources = [c.target for c in copies], [c.source for c in copies]
        with torch.no_grad():
            torch._foreach_copy_(targets, sources, non_blocking=streamed)


class _Enqueued:
    """Copies on the current stream: what is enqueued later comes later."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.accelerator.current_stream(device).record_event()

    def order(self) -> None:
        pass

    def done(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        self._event.synchronize()


class _Stream:
    """Copies on a stream of their own, beside what the device computes."""

    def __init__(self, device: torch.device, copies: Sequence[Copy]) -> None:
        self._device = device
        self._copies = copies  # their memory must not be freed meanwhile
        stream = _copying_stream(device)
        # What was enqueued before is what is to be copied.
        stream.wait_stream(torch.accelerator.current_stream(device))
        with stream:
            _run(copies)
        self._event = stream.record_event()

    def order(self) -> None:
        torch.accelerator.current_stream(self._device).wait_event(self._event)

    def done(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        self._event.synchronize()
        self._copies = ()


@functools.cache
def _copying_stream(device: torch.device) -> Any:
    return torch.Stream(device)


class _Thread:
    """Copies on the host, by a thread."""

    def __init__(self, copies: Sequence[Copy]) -> None:
        pool = ThreadPoolExecutor(1, thread_name_prefix="ray_accel_ckpt-copy")
        self._copied = pool.submit(_run, copies)
        pool.shutdown(wait=False)

    def order(self) -> None:
        wait([self._copied])

    def done(self) -> bool:
        return self._copied.done()

    def wait(self) -> None:
        self._copied.result()


def may_be_late(source: torch.Tensor, watched: Sequence[torch.Tensor]) -> bool:
    """Whether a write would be seen, and it is large enough to gain by not being waited for."""
    if source.device.type not in ("cpu", *_STREAMED) or source.nbytes < _SMALL:
        return False
    return len(watched) > 0 and not any(tensor.is_inference() for tensor in watched)


def _devices(copies: Sequence[Copy]) -> list[torch.device]:
    found = dict.fromkeys(copy.source.device for copy in copies)
    return [device for device in found if device.type in _STREAMED]


def _on(device: torch.device, copies: Sequence[Copy]) -> list[Copy]:
    return [copy for copy in copies if copy.source.device == device]


def _torn(name: str) -> TornSnapshotError:
    return TornSnapshotError(
        "a tensor was written while it was being saved",
        where=name,
        why="with overlap, what an optimizer holds is copied until the next optimizer's step; "
        "something else wrote to it before, in place",
        remedy="write to it between optimizer.step() and the save, or pass "
        "Checkpointer(overlap=False)",
    )
