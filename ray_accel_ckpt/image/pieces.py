"""Any rows of any stored slice: where they lie in the tensor, and in the slice's bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from ray_accel_ckpt.errors import CorruptCheckpointError
from ray_accel_ckpt.image.dtypes import dtype_named
from ray_accel_ckpt.image.manifest import SliceInfo
from ray_accel_ckpt.state.box import Box


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows [first, stop) of a stored slice, counted from the slice's own first row."""

    info: SliceInfo
    first: int
    stop: int

    @classmethod
    def whole(cls, info: SliceInfo) -> Piece:
        return cls(info=info, first=0, stop=info.box.rows)

    @classmethod
    def overlapping(cls, info: SliceInfo, box: Box) -> Piece | None:
        """The fewest rows of the slice that hold all it has of `box`; None if it has nothing."""
        common = info.box.meet(box)
        if common is None:
            return None
        if not info.sizes:
            return cls.whole(info)
        first = common.start[0] - info.offsets[0]
        return cls(info=info, first=first, stop=first + common.size[0])

    @cached_property
    def box(self) -> Box:
        """Their place in the whole tensor."""
        return self.info.box.between(self.first, self.stop)

    @property
    def begin(self) -> int:
        """The first of their bytes, counted from the slice's own."""
        return self.first * self._row_nbytes

    @property
    def end(self) -> int:
        return self.stop * self._row_nbytes

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    def view(self, data: torch.Tensor) -> torch.Tensor:
        """`data` (uint8, of `nbytes`) as these rows; the memory is shared."""
        dtype = dtype_of(self.info)
        if data.numel() == 0:
            return torch.empty(self.box.size, dtype=dtype, device="cpu")
        return data.view(dtype).view(self.box.size)

    @property
    def _row_nbytes(self) -> int:
        rows = self.info.sizes[0] if self.info.sizes else 1
        return (self.info.end - self.info.begin) // max(1, rows)


def dtype_of(info: SliceInfo) -> torch.dtype:
    dtype = dtype_named(info.dtype)
    if dtype is None:
        raise CorruptCheckpointError(f"unknown dtype {info.dtype!r}", where=info.name)
    return dtype
