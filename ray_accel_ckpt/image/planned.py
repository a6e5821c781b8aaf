"""The files of one rank's share, planned: which rows, where in them, and the plan's digest."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property

from ray_accel_ckpt.image import partition, shard
from ray_accel_ckpt.image.partition import Slice, TensorSpec
from ray_accel_ckpt.image.shard import Layout
from ray_accel_ckpt.state.part import Captured


class Planned:
    """What follows from the tensors' specs alone, each planned when it is first asked for.

    Attributes:
        digest: of what all ranks must agree on.
    """

    def __init__(self, specs: list[TensorSpec], *, rank: int, world_size: int) -> None:
        self.key = (specs, rank, world_size)
        self.digest = partition.plan_digest(specs, world_size=world_size)

    @cached_property
    def layout(self) -> Layout:
        """Of the shard. `UnsupportedStateError`: more tensors than a file has room for."""
        return shard.plan(piece for piece in self._mine if not piece.spec.frozen)

    @cached_property
    def frozen(self) -> Layout | None:
        """Of the file of frozen tensors, if this rank writes any. Raises as `layout` does."""
        still = [piece for piece in self._mine if piece.spec.frozen]
        return shard.plan(still) if still else None

    @cached_property
    def _mine(self) -> list[Slice]:
        specs, rank, _ = self.key
        return partition.share(specs, rank=rank)


class Plans:
    """Plans saves. One of the same tensors as the last is planned already."""

    def __init__(self) -> None:
        self._last: Planned | None = None
        self._specs: dict[str, TensorSpec] = {}

    def of(
        self,
        captured: Mapping[str, Captured],
        *,
        rank: int,
        world_size: int,
        frozen: Collection[str] = (),
    ) -> Planned:
        """Raises as `partition.specs_of` does."""
        last = self._last
        known = {} if last is None or last.key[1:] != (rank, world_size) else self._specs
        specs = partition.specs_of(
            captured, rank=rank, world_size=world_size, frozen=frozen, known=known
        )
        if last is None or last.key != (specs, rank, world_size):
            self._last = last = Planned(specs, rank=rank, world_size=world_size)
            self._specs = {spec.name: spec for spec in specs}
        return last
