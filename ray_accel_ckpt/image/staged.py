"""Pieces of a shard in memory: read with the blocks that prove them and nothing more."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
import xxhash

from ray_accel_ckpt.errors import CorruptCheckpointError
from ray_accel_ckpt.image.hashing import block_ranges
from ray_accel_ckpt.image.manifest import SliceInfo
from ray_accel_ckpt.image.pieces import Piece
from ray_accel_ckpt.image.threads import for_each

_STRETCH = 8 * 2**20
"""Bytes of one read: small enough for a cache, large enough for a request to an object store."""

_Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Fetch(Protocol):
    """Reads bytes [offset, offset + len(into)) of a shard into `into`, all of them or raises.

    Called by several threads at once.
    """

    def __call__(self, shard: int, offset: int, into: memoryview) -> None: ...


class Staged:
    """Pieces of one shard in host memory, proved, to be dealt out.

    Of a slice those blocks are read that hold the piece: a block is the least
    that can be proved.

    Args:
        shard: its number.
        pieces: at most one of each slice.
        block: bytes that one checksum covers.
        places: memory of their own for some of the pieces, by the tensor's name: uint8, on the
            host, of the piece's length. What has none, or is not whole blocks, goes to the
            buffer. It may hold anything until `read` returns.

    Attributes:
        nbytes: of the buffer.
        read_nbytes: of the file: what `read` reads, wherever it goes.
    """

    def __init__(
        self,
        shard: int,
        pieces: Iterable[Piece],
        *,
        block: int,
        places: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        self.shard = shard
        self._block = block
        self._ranges: dict[str, _Range] = {}
        position = 0
        for piece, begin, end in sorted(map(self._blocks_of, pieces), key=lambda r: r[1:]):
            info, place = piece.info, places.get(piece.info.name)
            if place is not None and piece.nbytes == end - begin:
                held = _Range(info=info, begin=begin, end=end, at=0, place=place.numpy())
            else:
                # The same alignment as in the file, so that bytes can be viewed as their dtype.
                position += (begin - position) % 64
                held = _Range(info=info, begin=begin, end=end, at=position, place=None)
                position += end - begin
            self._ranges[info.name] = held
        self.nbytes = position
        self.read_nbytes = sum(held.end - held.begin for held in self._ranges.values())
        self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")

    def read(self, fetch: Fetch, buffer: torch.Tensor, *, where: str) -> None:
        """Fill `buffer` (uint8, at least `nbytes`) and the places, and prove every block of it.

        Several threads read a stretch of the shard each, neighbouring blocks at
        once, and prove it while it is still in the processor's cache.

        Args:
            where: the shard, for errors.

        Raises:
            CorruptCheckpointError: naming the first block that is not what was written.
        """
        self._buffer = buffer
        staging = buffer.numpy()
        scratch = _Scratch()

        def read(stretch: list[_Block]) -> None:
            first, nbytes = stretch[0], stretch[-1].end - stretch[0].begin
            straight = all(b.adjoins(a) for a, b in pairwise(stretch))
            data = first.memory(staging, nbytes) if straight else scratch.of(nbytes)
            fetch(self.shard, first.begin, data.data)
            for block in stretch:
                begin, end = block.begin - first.begin, block.end - first.begin
                block.verify(data[begin:end].data, where)
                if not straight:
                    block.memory(staging, end - begin)[:] = data[begin:end]

        for_each(read, self._stretches())

    def prove(self, fetch: Fetch, *, where: str) -> None:
        """Read and prove every block, and keep none: in memory is one stretch a thread.

        Raises:
            CorruptCheckpointError: naming the first block that is not what was written.
        """
        scratch = _Scratch()

        def read(stretch: list[_Block]) -> None:
            first = stretch[0]
            data = scratch.of(stretch[-1].end - first.begin).data
            fetch(self.shard, first.begin, data)
            for block in stretch:
                block.verify(data[block.begin - first.begin : block.end - first.begin], where)

        for_each(read, self._stretches())

    def rows(self, piece: Piece) -> torch.Tensor:
        """A piece, or part of one, as a tensor in the buffer or in its place."""
        held = self._ranges[piece.info.name]
        memory = self._buffer if held.place is None else torch.from_numpy(held.place)
        begin = held.at + piece.info.begin + piece.begin - held.begin
        return piece.view(memory[begin : begin + piece.nbytes])

    def in_place(self, piece: Piece) -> bool:
        """Whether a piece was read into memory of its own."""
        return self._ranges[piece.info.name].place is not None

    def _stretches(self) -> list[list[_Block]]:
        blocks = (block for each in self._ranges.values() for block in each.blocks(self._block))
        return list(_stretches(blocks))

    def _blocks_of(self, piece: Piece) -> tuple[Piece, int, int]:
        first, stop = piece.begin // self._block, -(-piece.end // self._block)
        info = piece.info
        begin = info.begin + first * self._block
        return piece, begin, min(info.begin + stop * self._block, info.end)


class _Scratch(threading.local):
    """A buffer a thread, kept from one stretch to the next: fresh memory is slower than disks."""

    def __init__(self) -> None:
        self._data: _Bytes = np.empty(0, dtype=np.uint8)

    def of(self, nbytes: int) -> _Bytes:
        if len(self._data) < nbytes:
            self._data = np.empty(max(nbytes, _STRETCH), dtype=np.uint8)
        return self._data[:nbytes]


@dataclass(frozen=True, kw_only=True)
class _Range:
    """Bytes [begin, end) of a shard, whole blocks of one slice, and where they go.

    Attributes:
        place: memory of their own; None: the buffer.
        at: where in it.
    """

    info: SliceInfo
    begin: int
    end: int
    at: int
    place: _Bytes | None

    def blocks(self, nbytes: int) -> Iterator[_Block]:
        first = (self.begin - self.info.begin) // nbytes
        for digest, (begin, end) in zip(
            self.info.blocks[first:], block_ranges(self.begin, self.end, nbytes), strict=False
        ):
            yield _Block(
                range=self, begin=begin, end=end, at=self.at + begin - self.begin, digest=digest
            )


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Bytes [begin, end) of a shard that one checksum covers, and where in memory they go."""

    range: _Range
    begin: int
    end: int
    at: int
    digest: str

    def adjoins(self, other: _Block) -> bool:
        """Whether this one goes just behind the other."""
        same = self.range.place is other.range.place
        return same and self.begin - self.at == other.begin - other.at

    def memory(self, staging: _Bytes, nbytes: int) -> _Bytes:
        """Where this block goes, and what comes behind it."""
        place = staging if self.range.place is None else self.range.place
        return place[self.at : self.at + nbytes]

    def verify(self, data: memoryview, where: str) -> None:
        if xxhash.xxh3_128_hexdigest(data) != self.digest:
            raise CorruptCheckpointError(
                f"bytes of tensor {self.range.info.name!r} are not those that were written",
                where=f"{where}, bytes {self.begin} to {self.end}",
                why="the checksum of this block does not match",
                remedy="use an older checkpoint; check the disk or the bucket this one lay on",
            )


def _stretches(blocks: Iterable[_Block]) -> Iterator[list[_Block]]:
    """What one thread reads at once: neighbours in the file, `_STRETCH` bytes or so.

    Long slices that have a place are not read together with others, but straight into it.
    """
    stretch: list[_Block] = []
    for block in blocks:
        if stretch and not (
            block.begin == stretch[-1].end
            and block.end - stretch[0].begin <= _STRETCH
            and (block.adjoins(stretch[-1]) or not (_long(block) or _long(stretch[-1])))
        ):
            yield stretch
            stretch = []
        stretch.append(block)
    if stretch:
        yield stretch


def _long(block: _Block) -> bool:
    return block.range.place is not None and len(block.range.place) >= _STRETCH
