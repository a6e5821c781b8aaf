"""What of a share does not change: its bytes are written once, and linked to from then on.

Fine-tuning a few weights beside many frozen ones (LoRA) makes checkpoints that are
mostly the same. The frozen parameters lie in a file of their own, which a checkpoint
after the first has as a hard link or as a copy made by the object store. So each
checkpoint is complete by itself, and may be deleted without asking the others.

That they are the same is not believed but proved, at each save: see `mark`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ray_accel_ckpt.errors import TornSnapshotError
from ray_accel_ckpt.image.hashing import HashedFile
from ray_accel_ckpt.image.manifest import FrozenInfo, ShardInfo, SliceInfo
from ray_accel_ckpt.image.mark import Mark, mark_of
from ray_accel_ckpt.image.shard import Layout
from ray_accel_ckpt.image.staging import Slot


@dataclass(frozen=True, kw_only=True)
class Written:
    """A durable file of frozen tensors.

    Attributes:
        filesystem: the `Filesystem` it lies on; compared only.
        mark: of what it holds; None if this process has not written it, and only knows
            what its manifest says.
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
        self._links = False

    def image(
        self,
        layout: Layout,
        tensors: Mapping[str, torch.Tensor],
        *,
        lasting: bool,
        mark: Mark | None = None,
    ) -> Frozen:
        """Freeze: nothing at all if all is as it was at the last save, else a copy.

        A copy also until a link has been made once, so that the bytes are there if
        none can be.

        Args:
            lasting: whether the file may be linked to: not if it lies where a user may
                replace it.
            mark: of the tensors, if it is known: all of them are read for it.
        """
        mark = mark_of(layout, tensors) if mark is None else mark
        with self._lock:
            copied = mark != self._mark or not self._links
            self._mark = mark
        mine = {name: tensors[name] for name in (p.slice.spec.name for p in layout.placed)}
        return Frozen(self, layout, mine, mark, copied=copied, lasting=lasting)

    def written(self) -> Written | None:
        """The file that was durable last."""
        with self._lock:
            return self._written

    def adopt(self, filesystem: object, path: str, info: FrozenInfo) -> None:
        """Say that a file lies there, of which no more than its manifest is known."""
        with self._lock:
            self._written = Written(filesystem=filesystem, path=path, info=info, mark=None)
            self._links = False

    def record(self, written: Written | None, *, linked: bool) -> None:
        """A file is durable; if it is given, the next save may link to it."""
        with self._lock:
            self._written = written or self._written
            self._links = linked


class Frozen:
    """The frozen tensors of one image.

    Args:
        copied: whether the tensors are copied now. If not, they are what the file
            before holds, and should that be gone they are read when they are written.
        lasting: see `FrozenShare.image`.
    """

    def __init__(
        self,
        share: FrozenShare,
        layout: Layout,
        tensors: Mapping[str, torch.Tensor],
        mark: Mark,
        *,
        copied: bool,
        lasting: bool,
    ) -> None:
        self.layout = layout
        self._share, self._tensors, self._mark = share, tensors, mark
        self._lasting = lasting
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
        if written.mark is not None:
            return written if written.mark == self._mark else None
        if self._data is None:
            return None
        self._wait()
        return written if written.info.slices == self._slices(self._data) else None

    def file(self) -> HashedFile:
        """The bytes to be written.

        Raises:
            TornSnapshotError: they were to be what the file before holds, which can no
                longer be linked to, and have changed since.
        """
        if self._data is None:
            self._slot, self._data = self._copy()
            self._wait()
            if mark_of(self.layout, self._tensors) != self._mark:
                raise TornSnapshotError(
                    "frozen tensors were written while they were being saved",
                    why="a parameter with requires_grad=False changed just after a save, and "
                    "the file of it that saves have linked to can no longer be linked to",
                    remedy="wait with flush() before changing frozen parameters",
                )
        self._wait()
        return HashedFile(self.layout, self._data)

    def durable(self, filesystem: object, path: str, info: FrozenInfo, *, linked: bool) -> None:
        """Say that the bytes lie at `path`. Memory that held them is free again."""
        self._slot = self._data = None
        written = Written(filesystem=filesystem, path=path, info=info, mark=self._mark)
        self._share.record(written if self._lasting else None, linked=linked)

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
