"""What of a share does not change: its bytes are written once, and linked to from then on.

Fine-tuning a few weights beside many frozen ones (LoRA) makes checkpoints that are
mostly the same. The frozen parameters lie in a file of their own, which a checkpoint
after the first has as a hard link or as a copy made by the object store. So each
checkpoint is complete by itself, and may be deleted without asking the others.

That they are the same is not believed but proved, at each save: on the host by the
checksums of their bytes, on an accelerator by torch's count of versions and a
checksum that the device computes.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
import xxhash

from ray_accel_ckpt.errors import TornSnapshotError
from ray_accel_ckpt.image.hashing import HashedFile
from ray_accel_ckpt.image.manifest import FrozenInfo, ShardInfo, SliceInfo
from ray_accel_ckpt.image.shard import Layout, Placed
from ray_accel_ckpt.image.staging import Slot, bytes_of
from ray_accel_ckpt.image.threads import for_each
from ray_accel_ckpt.state.sharding import local

Mark: TypeAlias = tuple[object, ...]
"""What is equal if the bytes are."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """A durable file of frozen tensors.

    Attributes:
        filesystem: the `Filesystem` it lies on; compared only.
        mark: of what it holds; None if only its checksums are known.
    """

    filesystem: object
    path: str
    info: FrozenInfo
    mark: Mark | None


class FrozenShare:
    """What of one worker's share was frozen at its last save, and where that lies by now."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mark: Mark | None = None
        self._written: Written | None = None

    def image(self, layout: Layout, tensors: Mapping[str, torch.Tensor]) -> Frozen:
        """Freeze: a copy if anything is not as it was at the last save, else nothing at all."""
        mark = mark_of(layout, tensors)
        same = mark == self._mark
        self._mark = mark
        mine = {name: tensors[name] for name in (p.slice.spec.name for p in layout.placed)}
        return Frozen(share=self, layout=layout, tensors=mine, mark=mark, copied=not same)

    def written(self) -> Written | None:
        """The file that was durable last."""
        with self._lock:
            return self._written

    def adopt(self, filesystem: object, path: str, info: FrozenInfo) -> None:
        """Say that a file lies there, of which no more than its manifest is known."""
        self.record(Written(filesystem=filesystem, path=path, info=info, mark=None))

    def record(self, written: Written) -> None:
        """A file is durable: what the next save may link to."""
        with self._lock:
            self._written = written


class Frozen:
    """The frozen tensors of one image.

    Args:
        copied: whether the tensors are copied now. If not, they are what the file
            before holds, and should that be gone they are read when they are written.
    """

    def __init__(
        self,
        *,
        share: FrozenShare,
        layout: Layout,
        tensors: Mapping[str, torch.Tensor],
        mark: Mark,
        copied: bool,
    ) -> None:
        self.layout = layout
        self._share, self._tensors, self._mark = share, tensors, mark
        self._slot: Slot | None = None
        self._data: memoryview | None = None
        if copied:
            self._slot, self._data = self._copy()

    def known(self, filesystem: object, file: ShardInfo) -> Written | None:
        """A durable file on `filesystem` with these very bytes, if there is one.

        Args:
            file: what the manifest will say of the file.
        """
        written = self._share.written()
        if written is None or (written.filesystem, written.info.shard) != (filesystem, file):
            return None
        if self._data is None:
            return written if written.mark == self._mark else None
        self._wait()
        return written if written.info.slices == self._slices(self._data) else None

    def file(self) -> HashedFile:
        """The bytes to be written.

        Raises:
            TornSnapshotError: they were to be what the file before holds, which is
                gone, and have changed since.
        """
        if self._data is None:
            self._slot, self._data = self._copy()
            self._wait()
            if mark_of(self.layout, self._tensors) != self._mark:
                raise TornSnapshotError(
                    "frozen tensors were written while they were being saved",
                    why="a parameter with requires_grad=False changed just after a save, and "
                    "the file of it that the save would have linked to is gone",
                    remedy="wait with flush() before changing frozen parameters",
                )
        self._wait()
        return HashedFile(self.layout, self._data)

    def durable(self, filesystem: object, path: str, info: FrozenInfo) -> None:
        """Say that the bytes lie at `path`. Memory that held them is free again."""
        self._slot = self._data = None
        self._share.record(Written(filesystem=filesystem, path=path, info=info, mark=self._mark))

    def _copy(self) -> tuple[Slot, memoryview]:
        slot = Slot()
        return slot, slot.fill(self.layout, self._tensors)

    def _wait(self) -> None:
        if self._slot is not None:
            self._slot.copies.wait()

    def _slices(self, data: memoryview) -> list[SliceInfo]:
        hashed = HashedFile(self.layout, data)
        for _ in hashed.chunks():
            pass
        return hashed.slices()


def mark_of(layout: Layout, tensors: Mapping[str, torch.Tensor]) -> Mark:
    """Equal for equal bytes, and not for others: up to checksums, and see `_of_device`."""
    found: dict[str, object] = {}

    def find(placed: Placed) -> None:
        piece = placed.slice
        source = local(tensors[piece.spec.name])
        rows = source[piece.start : piece.stop] if piece.spec.shape else source
        found[piece.spec.name] = _of_host(rows) if rows.device.type == "cpu" else _of_device(rows)

    for_each(find, layout.placed)
    return (layout.header, *(found[placed.slice.spec.name] for placed in layout.placed))


def _of_host(rows: torch.Tensor) -> str:
    flat = rows.contiguous().reshape(-1).view(torch.uint8)
    return xxhash.xxh3_128_hexdigest(bytes_of(flat))


def _of_device(rows: torch.Tensor) -> tuple[int, int, int]:
    """Memory, count of writes, and (exclusive or) a checksum of what was written uncounted."""
    version = 0 if rows.is_inference() else rows._version
    return rows.data_ptr(), version, int(torch.hash_tensor(rows))
