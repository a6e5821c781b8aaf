"""An image: the bytes of one rank's share, frozen, with all that its manifest will say."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import xxhash

from ray_accel_ckpt.image.dtypes import name_of
from ray_accel_ckpt.image.manifest import (
    BLOCK,
    FORMAT,
    VERSION,
    Manifest,
    PartInfo,
    ShardInfo,
    SliceInfo,
    shard_name,
)
from ray_accel_ckpt.image.shard import Layout
from ray_accel_ckpt.state.part import Captured

_CHUNK = 8 * 2**20


@dataclass(frozen=True, kw_only=True)
class SaveInfo:
    """Which save this is: equal on all ranks, but for `rank`."""

    run: str
    attempt: str
    step: int
    epoch: int
    rank: int
    world_size: int
    plan: str
    library: str
    saved_at: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class Image:
    """A filled slot.

    Attributes:
        data: the shard's file, byte for byte, once `wait` has returned.
        wait: blocks until all copies into it are done; raises `TornSnapshotError` if
            one of them cannot be trusted.
    """

    info: SaveInfo
    layout: Layout
    data: memoryview
    parts: Mapping[str, PartInfo]
    wait: Callable[[], None]


def parts_of(captured: Mapping[str, Captured], *, rank: int) -> dict[str, PartInfo]:
    """The values this rank writes: its own, and on rank 0 everybody's."""
    return {
        name: PartInfo(
            kind=part.kind, per_rank=part.per_rank, omitted=list(part.omitted), value=part.value
        )
        for name, part in captured.items()
        if part.per_rank or rank == 0
    }


class Hashing:
    """Yields an image's bytes to be written, hashing each just before it is handed out."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._blocks: list[list[str]] = []

    def chunks(self) -> Iterator[memoryview]:
        """The file in order, in pieces that are good to write. May be gone through again."""
        data = self._image.data
        self._blocks = []
        sent = 0
        for placed in self._image.layout.placed:
            digests: list[str] = []
            self._blocks.append(digests)
            for begin, end in block_ranges(placed.begin, placed.end, BLOCK):
                digests.append(xxhash.xxh3_128_hexdigest(data[begin:end]))
                if end - sent >= _CHUNK:
                    yield data[sent:end]
                    sent = end
        if sent < len(data):
            yield data[sent:]

    def manifest(self) -> Manifest:
        """Complete once `chunks` has been gone through."""
        image, info = self._image, self._image.info
        slices = [
            SliceInfo(
                name=placed.slice.spec.name,
                scope=placed.slice.spec.scope.value,
                dtype=name_of(placed.slice.spec.dtype),
                shape=list(placed.slice.spec.shape),
                offsets=list(placed.slice.box.start),
                sizes=list(placed.slice.box.size),
                begin=placed.begin,
                end=placed.end,
                blocks=blocks,
            )
            for placed, blocks in zip(image.layout.placed, self._blocks, strict=True)
        ]
        header = image.layout.header
        return Manifest(
            format=FORMAT,
            version=VERSION,
            library=info.library,
            run=info.run,
            attempt=info.attempt,
            step=info.step,
            epoch=info.epoch,
            saved_at=info.saved_at,
            world_size=info.world_size,
            rank=info.rank,
            plan=info.plan,
            shard=ShardInfo(
                file=shard_name(info.rank, info.world_size),
                nbytes=image.layout.nbytes,
                block=BLOCK,
                header_nbytes=len(header),
                header_checksum=xxhash.xxh3_128_hexdigest(header),
            ),
            slices=slices,
            parts=dict(image.parts),
        )


def block_ranges(begin: int, end: int, block: int) -> Iterable[tuple[int, int]]:
    """[begin, end) in blocks of `block` bytes, the last one shorter."""
    return ((at, min(at + block, end)) for at in range(begin, end, block))
