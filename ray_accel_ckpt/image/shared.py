"""Slots in memory that outlives the process: what is frozen in one *is* a file of tmpfs.

Freezing into it and publishing it under the name of a shard makes a file of a
checkpoint without copying a byte; it is there as long as the name is, whoever dies.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ray_accel_ckpt.image.staging import Slot, pins

logger = logging.getLogger(__name__)


class SharedSlot(Slot):
    """A slot whose bytes are those of a file, of exactly the length that was reserved last.

    Args:
        place: the path of the file, to be made in a directory that is there; None: the
            memory is the process's own.
    """

    def __init__(self, place: Callable[[], Path | None]) -> None:
        super().__init__()
        self._place = place
        self._path: Path | None = None
        self._descriptor = -1
        self._nbytes = 0
        self._pinned = False
        self._directory: Path | None = None
        self._told = False

    def reserve(self, nbytes: int) -> torch.Tensor:
        """As `Slot.reserve`. What was published of this slot is withdrawn first.

        If there is no room for a file, the memory is the process's own until there is.
        """
        self._finish()
        self.withdraw()
        if self._path is not None and not self._path.exists():
            self._close()
        try:
            if self._path is not None or self._open(nbytes):
                self._resize(nbytes)
                return self._buffer[:nbytes]
        except OSError as e:
            if not self._told:
                self._told = True
                logger.warning(
                    "%s cannot have %d bytes and keeps nothing: %s", self._place(), nbytes, e
                )
            if self._path is not None:
                self._close()
        return super().reserve(nbytes)

    def publish(self, directory: Path, name: str) -> bool:
        """Give the file of this slot a name in a directory, beside the one it has.

        Until `withdraw`, or the next `reserve`, which removes the directory: no other slot's
        files may be in it. Returns whether there is a file.

        Args:
            directory: is made, and so is the one it is in, but nothing further up.
        """
        if self._path is None:
            return False
        self._directory, self.published = directory, True
        # Not further up: what its keeper has removed must not come back, for nobody would
        # remove it again.
        directory.parent.mkdir(exist_ok=True)
        directory.mkdir()
        (directory / name).hardlink_to(self._path)
        return True

    def withdraw(self) -> None:
        """Remove the directory that was published in."""
        directory, self._directory, self.published = self._directory, None, False
        if directory is not None:
            remove_checkpoint(directory)

    def free(self) -> None:
        """Give the memory back; nothing stays published."""
        self._finish()
        self.withdraw()
        self._close()

    def _open(self, nbytes: int) -> bool:
        path = self._place()
        if path is None:
            return False
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        self._path, self._descriptor, self._nbytes = path, descriptor, nbytes
        # Only now: until there is room, the process's own memory is needed.
        self._places = None
        self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")
        return True

    def _resize(self, nbytes: int) -> None:
        if nbytes == self._nbytes and nbytes <= self._buffer.numel():
            return
        # Pages that go must not be pinned, and those that come must be.
        self._unpin()
        if nbytes < self._nbytes:
            os.ftruncate(self._descriptor, nbytes)
        elif nbytes > self._nbytes:
            # Without it, a write that finds no room would be the end of the process.
            os.posix_fallocate(self._descriptor, 0, nbytes)
        self._nbytes = nbytes
        if nbytes > self._buffer.numel():
            self._places = None
            with torch.inference_mode(False):
                mapped = mmap.mmap(self._descriptor, nbytes)
                self._buffer = torch.frombuffer(mapped, dtype=torch.uint8)
        self._pin()

    def _close(self) -> None:
        path, self._path = self._path, None
        self._unpin()
        self._places = None
        self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._nbytes = 0
        if path is not None:
            os.close(self._descriptor)
            path.unlink(missing_ok=True)

    def _pin(self) -> None:
        """Let CUDA copy into mapped memory beside what the thread does."""
        if pins() and torch.cuda.is_available():
            cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            problem = cudart.cudaHostRegister(self._buffer.data_ptr(), self._nbytes, 0)
            self._pinned = int(problem) == 0
            if not self._pinned:
                # It works without, slower. CUDA remembers the error for the next kernel to raise.
                with contextlib.suppress(RuntimeError):
                    torch.zeros(1, device="cuda")
                logger.warning("memory at %s cannot be pinned: CUDA error %s", self._path, problem)

    def _unpin(self) -> None:
        if self._pinned:
            cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            cudart.cudaHostUnregister(self._buffer.data_ptr())
            self._pinned = False


def remove_checkpoint(directory: Path) -> None:
    """Remove a directory of files, manifests first. Absent is as good as removed."""
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(directory.iterdir(), key=lambda p: not p.name.startswith("manifest-")):
            path.unlink(missing_ok=True)
        directory.rmdir()
