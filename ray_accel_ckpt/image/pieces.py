"""Any rows of any stored slice, read with the blocks that prove them and nothing more."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import xxhash

from ray_accel_ckpt.errors import CorruptCheckpointError
from ray_accel_ckpt.image.dtypes import dtype_named
from ray_accel_ckpt.image.hashing import block_ranges
from ray_accel_ckpt.image.manifest import SliceInfo
from ray_accel_ckpt.image.staging import bytes_of
from ray_accel_ckpt.image.threads import for_each
from ray_accel_ckpt.state.box import Box

_STRETCH = 8 * 2**20
"""Bytes of one read: small enough for a cache, large enough for a request to an object store."""


class Fetch(Protocol):
    """Reads bytes [offset, offset + len(into)) of a shard into `into`, all of them or raises.

    Called by several threads at once.
    """

    def __call__(self, shard: int, offset: int, into: memoryview) -> None: ...


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
        rows = self.info.sizes[0] if self.info.sizes else 1
        return (self.info.end - self.info.begin) // max(1, rows)


class Staged:
    """Pieces of one shard in a host buffer, proved, to be dealt out.

    Of a slice those blocks are read that hold the piece: a block is the least
    that can be proved.

    Args:
        shard: its number.
        pieces: at most one of each slice.
        block: bytes that one checksum covers.
    """

    def __init__(self, shard: int, pieces: Iterable[Piece], *, block: int) -> None:
        self.shard = shard
        self._block = block
        self._ranges: dict[str, _Range] = {}
        position = 0
        for info, begin, end in sorted(map(self._blocks_of, pieces), key=lambda r: r[1:]):
            # The same alignment as in the file, so that bytes can be viewed as their dtype.
            position += (begin - position) % 64
            self._ranges[info.name] = _Range(info=info, begin=begin, end=end, at=position)
            position += end - begin
        self.nbytes = position
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def read(self, fetch: Fetch, buffer: torch.Tensor, *, where: str) -> None:
        """Fill `buffer` (uint8, at least `nbytes`) and prove every block of it.

        Several threads read a stretch of the shard each, neighbouring blocks at
        once, and prove it while it is still in the processor's cache.

        Args:
            where: the shard, for errors.

        Raises:
            CorruptCheckpointError: naming the first block that is not what was written.
        """
        self._buffer = buffer
        view = bytes_of(buffer)

        def read(stretch: list[_Block]) -> None:
            begin, end, at = stretch[0].begin, stretch[-1].end, stretch[0].at
            fetch(self.shard, begin, view[at : at + end - begin])
            for block in stretch:
                block.verify(view[block.at : block.at + block.end - block.begin], where)

        for_each(read, self._stretches())

    def prove(self, fetch: Fetch, *, where: str) -> None:
        """Read and prove every block, and keep none: in memory is one stretch a thread.

        Raises:
            CorruptCheckpointError: naming the first block that is not what was written.
        """
        scratch = threading.local()

        def read(stretch: list[_Block]) -> None:
            first, nbytes = stretch[0], stretch[-1].end - stretch[0].begin
            # Kept from one stretch to the next: fresh memory is slower than most disks.
            if len(getattr(scratch, "buffer", b"")) < nbytes:
                scratch.buffer = bytearray(max(nbytes, _STRETCH))
            view = memoryview(scratch.buffer)[:nbytes]
            fetch(self.shard, first.begin, view)
            for block in stretch:
                block.verify(view[block.begin - first.begin : block.end - first.begin], where)

        for_each(read, self._stretches())

    def rows(self, piece: Piece) -> torch.Tensor:
        """A piece, or part of one, as a tensor in the buffer."""
        held = self._ranges[piece.info.name]
        begin = held.at + piece.info.begin + piece.begin - held.begin
        return piece.view(self._buffer[begin : begin + piece.nbytes])

    def _stretches(self) -> list[list[_Block]]:
        blocks = (block for each in self._ranges.values() for block in each.blocks(self._block))
        return list(_stretches(blocks))

    def _blocks_of(self, piece: Piece) -> tuple[SliceInfo, int, int]:
        first, stop = piece.begin // self._block, -(-piece.end // self._block)
        info = piece.info
        begin = info.begin + first * self._block
        return info, begin, min(info.begin + stop * self._block, info.end)


@dataclass(frozen=True, kw_only=True)
class _Range:
    """Bytes [begin, end) of a shard, whole blocks of one slice, and where in the buffer they go."""

    info: SliceInfo
    begin: int
    end: int
    at: int

    def blocks(self, nbytes: int) -> Iterator[_Block]:
        first = (self.begin - self.info.begin) // nbytes
        for digest, (begin, end) in zip(
            self.info.blocks[first:], block_ranges(self.begin, self.end, nbytes), strict=False
        ):
            yield _Block(
                info=self.info,
                begin=begin,
                end=end,
                at=self.at + begin - self.begin,
                digest=digest,
            )


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Bytes [begin, end) of a shard that one checksum covers, and where in the buffer they go."""

    info: SliceInfo
    begin: int
    end: int
    at: int
    digest: str

    def follows(self, other: _Block) -> bool:
        """Whether both can be read at once: neighbours in the file and in the buffer."""
        return self.begin == other.end and self.begin - self.at == other.begin - other.at

    def verify(self, data: memoryview, where: str) -> None:
        if xxhash.xxh3_128_hexdigest(data) != self.digest:
            raise CorruptCheckpointError(
                f"bytes of tensor {self.info.name!r} are not those that were written",
                where=f"{where}, bytes {self.begin} to {self.end}",
                why="the checksum of this block does not match",
                remedy="use an older checkpoint; check the disk or the bucket this one lay on",
            )


def _stretches(blocks: Iterable[_Block]) -> Iterator[list[_Block]]:
    """What one thread reads at once: blocks that follow each other, `_STRETCH` bytes or so."""
    stretch: list[_Block] = []
    for block in blocks:
        if stretch and not (
            block.follows(stretch[-1]) and block.end - stretch[0].begin <= _STRETCH
        ):
            yield stretch
            stretch = []
        stretch.append(block)
    if stretch:
        yield stretch


def dtype_of(info: SliceInfo) -> torch.dtype:
    dtype = dtype_named(info.dtype)
    if dtype is None:
        raise CorruptCheckpointError(f"unknown dtype {info.dtype!r}", where=info.name)
    return dtype
