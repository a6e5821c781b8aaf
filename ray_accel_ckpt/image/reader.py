"""The manifests of one checkpoint, and in which shards the pieces of a tensor lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ray_accel_ckpt.errors import CorruptCheckpointError, NotACheckpointError
from ray_accel_ckpt.image.manifest import Manifest, PartInfo, ShardInfo, SliceInfo
from ray_accel_ckpt.image.pieces import dtype_of
from ray_accel_ckpt.state.box import Box, tile
from ray_accel_ckpt.state.part import SavedPart, SavedTensor, Scope
from ray_accel_ckpt.state.tree import tensor_refs


@dataclass(frozen=True, kw_only=True)
class Located:
    """A slice and the number of the file it lies in, see `Snapshot.shards`."""

    shard: int
    info: SliceInfo


class Snapshot:
    """The manifests of all ranks of one checkpoint, which agree with each other.

    Args:
        manifests: one a rank, in order.
        where: the checkpoint, for errors.

    Attributes:
        shards: the files of tensors by number: rank r's shard is r, and what it has
            in a file of its own because it does not change is world size + r.

    Raises:
        NotACheckpointError: they are of different saves, or tensors are not
            covered row for row: not all of one save is there.
    """

    def __init__(self, manifests: Sequence[Manifest], where: str) -> None:
        self.manifests = tuple(manifests)
        self.where = where
        first = self.manifests[0]
        for manifest in self.manifests:
            if _identity(manifest) != _identity(first):
                raise NotACheckpointError(
                    "the manifests in one directory are of different saves",
                    where=where,
                    why=f"rank {first.rank}: {_identity(first)}; "
                    f"rank {manifest.rank}: {_identity(manifest)}",
                    remedy="use another checkpoint; this one was never written whole",
                )
        self.shared: dict[str, list[Located]] = {}
        self.own: list[dict[str, Located]] = [{} for _ in self.manifests]
        self.shards: dict[int, ShardInfo] = {}
        self._parts: dict[int, dict[str, SavedPart]] = {}
        for manifest in self.manifests:
            for kind, (shard, slices) in enumerate(manifest.files):
                number = kind * self.world_size + manifest.rank
                self.shards[number] = shard
                for info in slices:
                    self._place(Located(shard=number, info=info), manifest.rank)
        for name, pieces in self.shared.items():
            self._check_cover(name, pieces)
            if any(name in own for own in self.own):
                raise CorruptCheckpointError(
                    f"tensor {name[:200]!r} is shared to one rank and its own to another",
                    where=where,
                    remedy="use another checkpoint",
                )

    def slices(self, shard: int) -> list[SliceInfo]:
        """What lies in the file of this number."""
        kind, rank = divmod(shard, self.world_size)
        return self.manifests[rank].files[kind][1]

    def _place(self, located: Located, rank: int) -> None:
        info = located.info
        if info.scope == Scope.PER_RANK.value:
            self.own[rank][info.name] = located
        else:
            self.shared.setdefault(info.name, []).append(located)

    @property
    def step(self) -> int:
        return self.manifests[0].step

    @property
    def world_size(self) -> int:
        return self.manifests[0].world_size

    def parts(self, rank: int) -> dict[str, SavedPart]:
        """What `rank` would load. A rank the checkpoint does not know sees no per-rank part.

        Raises:
            CorruptCheckpointError: a part refers to a tensor that is not there.
        """
        if rank not in self._parts:
            mine = self.manifests[rank].parts if rank < self.world_size else {}
            found = {n: p for n, p in self.manifests[0].parts.items() if not p.per_rank}
            found |= {n: mine[n] for n in self.per_rank_parts() if n in mine and mine[n].per_rank}
            self._parts[rank] = {name: self._saved(name, p, rank) for name, p in found.items()}
        return dict(self._parts[rank])

    def per_rank_parts(self) -> frozenset[str]:
        """Names of the parts of which each rank has its own."""
        parts = self.manifests[0].parts
        return frozenset(name for name, part in parts.items() if part.per_rank)

    def located(self, name: str, rank: int) -> list[Located]:
        """The slices that make up tensor `name` for `rank`.

        A rank the checkpoint does not know takes rank 0's of what each rank has, and
        so does one that had none.
        """
        for own in (self.own[rank if rank < self.world_size else 0], self.own[0]):
            if name in own:
                return [own[name]]
        return self.shared.get(name, [])

    def _saved(self, name: str, part: PartInfo, rank: int) -> SavedPart:
        tensors = {}
        for ref in sorted(tensor_refs(part.value)):
            pieces = self.located(ref, rank)
            if ref != name and not ref.startswith(f"{name}/"):
                raise CorruptCheckpointError(
                    f"part {name[:200]!r} speaks of a tensor of another part",
                    where=self.where,
                    why=ref[:200],
                    remedy="use another checkpoint",
                )
            if not pieces:
                raise CorruptCheckpointError(
                    f"part {name[:200]!r} speaks of a tensor that no shard holds",
                    where=self.where,
                    why=ref[:200],
                    remedy="use another checkpoint",
                )
            info = pieces[0].info
            tensors[ref] = SavedTensor(
                dtype=dtype_of(info),
                shape=tuple(info.shape),
                sharded=any(p.info.scope == Scope.SHARDED.value for p in pieces),
            )
        return SavedPart(
            kind=part.kind, value=part.value, tensors=tensors, omitted=tuple(part.omitted)
        )

    def _check_cover(self, name: str, pieces: list[Located]) -> None:
        pieces.sort(key=lambda p: (p.info.offsets, p.info.sizes))
        first = pieces[0].info
        if len(pieces) == 1 and first.box == Box.whole(first.shape):
            return
        alike = all((p.info.dtype, p.info.shape) == (first.dtype, first.shape) for p in pieces)
        if not alike or not tile(first.shape, [p.info.box for p in pieces]):
            raise NotACheckpointError(
                f"tensor {name[:200]!r} is not there row for row",
                where=self.where,
                why="its slices in the shards overlap, leave gaps or differ in shape",
                remedy="use another checkpoint",
            )


def _identity(manifest: Manifest) -> tuple[object, ...]:
    return (
        manifest.run,
        manifest.attempt,
        manifest.step,
        manifest.epoch,
        manifest.world_size,
        manifest.plan,
    )
