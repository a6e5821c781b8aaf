"""Any rows of any stored slice, read with the blocks that prove them and nothing more."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import xxhash

from ray_accel_ckpt.errors import CorruptCheckpointError
from ray_accel_ckpt.image.dtypes import dtype_named
from ray_accel_ckpt.image.image import block_ranges
from ray_accel_ckpt.image.manifest import SliceInfo
from ray_accel_ckpt.image.staging import bytes_of
from ray_accel_ckpt.state.box import Box


class Fetch(Protocol):
    """Reads bytes [offset, offset + len(into)) of a shard into `into`, all of them or raises."""

    def __call__(self, rank: int, offset: int, into: memoryview) -> None: ...


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

    @property
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
            return torch.empty(self.box.size, dtype=dtype)
        return data.view(dtype).view(self.box.size)

    @property
    def _row_nbytes(self) -> int:
        return (self.info.end - self.info.begin) // max(1, self.info.box.rows)


class Staged:
    """Pieces of one shard in a host buffer, to be verified and then dealt out.

    Of a slice those blocks are read that hold the piece: a block is the least
    that can be proved.

    Args:
        rank: whose shard it is.
        pieces: at most one of each slice.
        block: bytes that one checksum covers.
    """

    def __init__(self, rank: int, pieces: Iterable[Piece], *, block: int) -> None:
        self.rank = rank
        self._block = block
        self._ranges = sorted(map(self._blocks_of, pieces), key=lambda r: (r.begin, r.end))
        self._at: dict[str, tuple[int, _Range]] = {}
        position = 0
        for each in self._ranges:
            # The same alignment as in the file, so that bytes can be viewed as their dtype.
            position += (each.begin - position) % 64
            self._at[each.info.name] = (position, each)
            position += each.end - each.begin
        self.nbytes = position
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def read(self, fetch: Fetch, buffer: torch.Tensor) -> None:
        """Fill `buffer` (uint8, at least `nbytes`): neighbouring ranges in one read."""
        self._buffer = buffer
        view = bytes_of(buffer)
        run: tuple[int, int, int] | None = None
        for each in [r for r in self._ranges if r.begin < r.end]:
            at, _ = self._at[each.info.name]
            if run is not None and run[1] == each.begin and run[2] + run[1] - run[0] == at:
                run = (run[0], each.end, run[2])
                continue
            self._fetch(fetch, run, view)
            run = (each.begin, each.end, at)
        self._fetch(fetch, run, view)

    def verify(self, where: str) -> None:
        """Prove every block. Raises `CorruptCheckpointError` naming the first bad one."""
        view = bytes_of(self._buffer)
        for at, each in self._at.values():
            each.verify(view[at : at + each.end - each.begin], self._block, where)

    def rows(self, piece: Piece) -> torch.Tensor:
        """A piece, or part of one, as a tensor in the buffer."""
        at, held = self._at[piece.info.name]
        begin = at + piece.info.begin + piece.begin - held.begin
        return piece.view(self._buffer[begin : begin + piece.nbytes])

    def _blocks_of(self, piece: Piece) -> _Range:
        first, stop = piece.begin // self._block, -(-piece.end // self._block)
        info = piece.info
        return _Range(
            info=info,
            first=first,
            begin=info.begin + first * self._block,
            end=min(info.begin + stop * self._block, info.end),
        )

    def _fetch(self, fetch: Fetch, run: tuple[int, int, int] | None, view: memoryview) -> None:
        if run is not None:
            begin, end, at = run
            fetch(self.rank, begin, view[at : at + end - begin])


@dataclass(frozen=True, kw_only=True)
class _Range:
    """Bytes [begin, end) of a shard: whole blocks of one slice, from block `first` on."""

    info: SliceInfo
    first: int
    begin: int
    end: int

    def verify(self, data: memoryview, block: int, where: str) -> None:
        digests = self.info.blocks[self.first :]
        for (begin, end), digest in zip(block_ranges(0, len(data), block), digests, strict=False):
            if xxhash.xxh3_128_hexdigest(data[begin:end]) != digest:
                raise CorruptCheckpointError(
                    f"bytes of tensor {self.info.name!r} are not those that were written",
                    where=f"{where}, bytes {self.begin + begin} to {self.begin + end}",
                    why="the checksum of this block does not match",
                    remedy="use an older checkpoint; check the disk or the bucket this one lay on",
                )


def dtype_of(info: SliceInfo) -> torch.dtype:
    dtype = dtype_named(info.dtype)
    if dtype is None:
        raise CorruptCheckpointError(f"unknown dtype {info.dtype!r}", where=info.name)
    return dtype
