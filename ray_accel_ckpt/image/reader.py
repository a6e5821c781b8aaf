"""Any slice of any tensor out of any set of shards, proved before it is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import xxhash

from ray_accel_ckpt.errors import CorruptCheckpointError, NotACheckpointError
from ray_accel_ckpt.image.dtypes import dtype_named
from ray_accel_ckpt.image.image import block_ranges
from ray_accel_ckpt.image.manifest import Manifest, PartInfo, SliceInfo
from ray_accel_ckpt.image.staging import bytes_of
from ray_accel_ckpt.state.part import SavedPart, SavedTensor, Scope
from ray_accel_ckpt.state.tree import tensor_refs


class Fetch(Protocol):
    """Reads bytes [offset, offset + len(into)) of a shard into `into`, all of them or raises."""

    def __call__(self, rank: int, offset: int, into: memoryview) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Located:
    """A slice and the rank in whose shard it lies."""

    rank: int
    info: SliceInfo


class Snapshot:
    """The manifests of all ranks of one checkpoint, which agree with each other.

    Args:
        manifests: one a rank, in order.
        where: the checkpoint, for errors.

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
        for manifest in self.manifests:
            for info in manifest.slices:
                located = Located(rank=manifest.rank, info=info)
                if Scope(info.scope) is Scope.PER_RANK:
                    self.own[manifest.rank][info.name] = located
                else:
                    self.shared.setdefault(info.name, []).append(located)
        for name, pieces in self.shared.items():
            self._check_cover(name, pieces)

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
        mine = self.manifests[rank].parts if rank < self.world_size else {}
        found = {n: p for n, p in self.manifests[0].parts.items() if not p.per_rank}
        found |= {n: p for n, p in mine.items() if p.per_rank}
        return {name: self._saved(name, part, rank) for name, part in found.items()}

    def per_rank_parts(self) -> frozenset[str]:
        """Names of the parts of which each rank has its own."""
        parts = self.manifests[0].parts
        return frozenset(name for name, part in parts.items() if part.per_rank)

    def located(self, name: str, rank: int) -> list[Located]:
        """The slices that make up tensor `name` for `rank`.

        A rank the checkpoint does not know takes rank 0's of what each rank has.
        """
        own = self.own[rank if rank < self.world_size else 0]
        return [own[name]] if name in own else self.shared.get(name, [])

    def _saved(self, name: str, part: PartInfo, rank: int) -> SavedPart:
        tensors = {}
        for ref in sorted(tensor_refs(part.value)):
            pieces = self.located(ref, rank)
            if not pieces:
                raise CorruptCheckpointError(
                    f"part {name[:200]!r} speaks of a tensor that no shard holds",
                    where=self.where,
                    why=ref[:200],
                    remedy="use another checkpoint",
                )
            info = pieces[0].info
            tensors[ref] = SavedTensor(dtype=dtype_of(info), shape=tuple(info.shape))
        return SavedPart(
            kind=part.kind, value=part.value, tensors=tensors, omitted=tuple(part.omitted)
        )

    def _check_cover(self, name: str, pieces: list[Located]) -> None:
        pieces.sort(key=lambda p: (p.info.offset, p.info.length))
        first = pieces[0].info
        row = 0
        for piece in pieces:
            same = (piece.info.dtype, piece.info.shape) == (first.dtype, first.shape)
            if not same or piece.info.offset != row:
                break
            row += piece.info.length
        else:
            if row == (first.shape[0] if first.shape else 1):
                return
        raise NotACheckpointError(
            f"tensor {name[:200]!r} is not there row for row",
            where=self.where,
            why="its slices in the shards overlap, leave gaps or differ in shape",
            remedy="use another checkpoint",
        )


class Staged:
    """Slices of one shard in a host buffer, to be verified and then dealt out."""

    def __init__(self, rank: int, slices: Iterable[SliceInfo]) -> None:
        self.rank = rank
        self.slices = sorted(slices, key=lambda info: info.begin)
        self._at: dict[str, int] = {}
        position = 0
        for info in self.slices:
            # The same alignment as in the file, so that bytes can be viewed as their dtype.
            position += (info.begin - position) % 64
            self._at[info.name] = position
            position += info.end - info.begin
        self.nbytes = position
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def read(self, fetch: Fetch, buffer: torch.Tensor) -> None:
        """Fill `buffer` (uint8, at least `nbytes`): neighbouring slices in one read."""
        self._buffer = buffer
        view = bytes_of(buffer)
        run: tuple[int, int, int] | None = None
        for info in [i for i in self.slices if i.begin < i.end]:
            at = self._at[info.name]
            if run is not None and run[1] == info.begin and run[2] + run[1] - run[0] == at:
                run = (run[0], info.end, run[2])
                continue
            self._fetch(fetch, run, view)
            run = (info.begin, info.end, at)
        self._fetch(fetch, run, view)

    def verify(self, where: str) -> None:
        """Prove every slice. Raises `CorruptCheckpointError` naming the first bad one."""
        view = bytes_of(self._buffer)
        for info in self.slices:
            at = self._at[info.name]
            verify_slice(info, view[at : at + info.end - info.begin], where)

    def rows(self, info: SliceInfo) -> torch.Tensor:
        """The slice, as a tensor in the buffer."""
        at = self._at[info.name]
        return as_tensor(info, self._buffer[at : at + info.end - info.begin])

    def _fetch(self, fetch: Fetch, run: tuple[int, int, int] | None, view: memoryview) -> None:
        if run is not None:
            begin, end, at = run
            fetch(self.rank, begin, view[at : at + end - begin])


def verify_slice(info: SliceInfo, data: memoryview, where: str) -> None:
    """Prove the bytes of one slice. Raises `CorruptCheckpointError`."""
    for (begin, end), digest in zip(block_ranges(0, len(data)), info.blocks, strict=True):
        if xxhash.xxh3_128_hexdigest(data[begin:end]) != digest:
            raise CorruptCheckpointError(
                f"bytes of tensor {info.name!r} are not those that were written",
                where=f"{where}, bytes {info.begin + begin} to {info.begin + end}",
                why="the checksum of this block does not match",
                remedy="use an older checkpoint; check the disk or the bucket this one lay on",
            )


def as_tensor(info: SliceInfo, data: torch.Tensor) -> torch.Tensor:
    """View bytes (uint8) as the rows they are; the memory is shared."""
    shape = (info.length, *info.shape[1:]) if info.shape else ()
    if data.numel() == 0:
        return torch.empty(shape, dtype=dtype_of(info))
    return data.view(dtype_of(info)).view(shape)


def dtype_of(info: SliceInfo) -> torch.dtype:
    dtype = dtype_named(info.dtype)
    if dtype is None:
        raise CorruptCheckpointError(f"unknown dtype {info.dtype!r}", where=info.name)
    return dtype


def by_rank(pieces: Iterable[Located]) -> Mapping[int, list[SliceInfo]]:
    """Slices grouped by the shard they lie in, each once."""
    found: dict[int, dict[str, SliceInfo]] = {}
    for piece in pieces:
        found.setdefault(piece.rank, {})[piece.info.name] = piece.info
    return {rank: list(infos.values()) for rank, infos in found.items()}


def _identity(manifest: Manifest) -> tuple[object, ...]:
    return (
        manifest.run,
        manifest.attempt,
        manifest.step,
        manifest.epoch,
        manifest.world_size,
        manifest.plan,
    )
