"""An image: the bytes of one rank's share, frozen, with all that its manifest will say."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from ray_accel_ckpt.image.frozen import Frozen
from ray_accel_ckpt.image.hashing import HashedFile, shard_info
from ray_accel_ckpt.image.manifest import (
    FORMAT,
    VERSION,
    FrozenInfo,
    Manifest,
    PartInfo,
    shard_name,
)
from ray_accel_ckpt.image.shard import Layout
from ray_accel_ckpt.state.part import Captured


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
        frozen: what does not change, in a file of its own.
    """

    info: SaveInfo
    layout: Layout
    data: memoryview
    parts: Mapping[str, PartInfo]
    wait: Callable[[], None]
    frozen: Frozen | None = None


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
    """An image's shard on its way out, and the manifest that follows it."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._shard = HashedFile(image.layout, image.data)

    def chunks(self) -> Iterator[memoryview]:
        """The shard in order, in pieces that are good to write. May be gone through again."""
        return self._shard.chunks()

    def manifest(self, frozen: FrozenInfo | None = None) -> Manifest:
        """Complete once `chunks` has been gone through."""
        image, info = self._image, self._image.info
        return Manifest(
            format=FORMAT,
            version=2 if frozen is None else VERSION,
            library=info.library,
            run=info.run,
            attempt=info.attempt,
            step=info.step,
            epoch=info.epoch,
            saved_at=info.saved_at,
            world_size=info.world_size,
            rank=info.rank,
            plan=info.plan,
            shard=shard_info(shard_name(info.rank, info.world_size), image.layout),
            slices=self._shard.slices(),
            parts=dict(image.parts),
            frozen=frozen,
        )
