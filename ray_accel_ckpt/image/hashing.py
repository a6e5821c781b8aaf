"""A file of tensors on its way out: its bytes, and the checksums that prove them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import xxhash

from ray_accel_ckpt.image.dtypes import name_of
from ray_accel_ckpt.image.manifest import BLOCK, ShardInfo, SliceInfo
from ray_accel_ckpt.image.shard import Layout

_CHUNK = 8 * 2**20


class HashedFile:
    """Yields a file's bytes to be written, hashing each just before it is handed out."""

    def __init__(self, layout: Layout, data: memoryview) -> None:
        self._layout = layout
        self._data = data
        self._blocks: list[list[str]] = []

    def chunks(self) -> Iterator[memoryview]:
        """The file in order, in pieces that are good to write. May be gone through again."""
        data = self._data
        self._blocks = []
        sent = 0
        for placed in self._layout.placed:
            digests: list[str] = []
            self._blocks.append(digests)
            for begin, end in block_ranges(placed.begin, placed.end, BLOCK):
                digests.append(xxhash.xxh3_128_hexdigest(data[begin:end]))
                if end - sent >= _CHUNK:
                    yield data[sent:end]
                    sent = end
        if sent < len(data):
            yield data[sent:]

    def slices(self) -> list[SliceInfo]:
        """Complete once `chunks` has been gone through."""
        return slices_of(self._layout, self._blocks)


def shard_info(file: str, layout: Layout) -> ShardInfo:
    return ShardInfo(
        file=file,
        nbytes=layout.nbytes,
        block=BLOCK,
        header_nbytes=len(layout.header),
        header_checksum=xxhash.xxh3_128_hexdigest(layout.header),
    )


def slices_of(layout: Layout, blocks: Sequence[list[str]]) -> list[SliceInfo]:
    """What a manifest says of a file's slices, each with the checksums of its blocks."""
    return [
        SliceInfo(
            name=placed.slice.spec.name,
            scope=placed.slice.spec.scope.value,
            dtype=name_of(placed.slice.spec.dtype),
            shape=list(placed.slice.spec.shape),
            offsets=list(placed.slice.box.start),
            sizes=list(placed.slice.box.size),
            begin=placed.begin,
            end=placed.end,
            blocks=digests,
        )
        for placed, digests in zip(layout.placed, blocks, strict=True)
    ]


def block_ranges(begin: int, end: int, block: int) -> Iterable[tuple[int, int]]:
    """[begin, end) in blocks of `block` bytes, the last one shorter."""
    return ((at, min(at + block, end)) for at in range(begin, end, block))
