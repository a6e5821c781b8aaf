"""What lies in a checkpoint, from its manifests alone: no tensor is read."""

from __future__ import annotations

from dataclasses import dataclass

from ray_accel_ckpt.image.reader import Snapshot
from ray_accel_ckpt.state.leaves import form_of, leaves, nbytes_of, text_of
from ray_accel_ckpt.state.part import SavedPart
from ray_accel_ckpt.state.parts import RngPart
from ray_accel_ckpt.storage.opened import require_rank


@dataclass(frozen=True, kw_only=True)
class TensorLine:
    """A tensor or numpy array.

    Attributes:
        path: where it is in the state of its part.
        stored: the name its bytes have; that of another path if it is tied to that one.
        scope: who holds it, see `state.part.Scope`.
        pieces: how many slices it is cut into.
        frozen: whether it lies in a file of what is not trained.
    """

    path: str
    stored: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    scope: str
    pieces: int
    frozen: bool


@dataclass(frozen=True, kw_only=True)
class ValueLine:
    """A value that is no tensor, as text; a long one shortened."""

    path: str
    value: str


@dataclass(frozen=True, kw_only=True)
class PartLine:
    """One part.

    Attributes:
        per_rank: whether each worker has its own.
        nbytes: of its tensors. Tied ones count once.
        omitted: names that a save hook took out.
    """

    name: str
    kind: str
    per_rank: bool
    nbytes: int
    tensors: tuple[TensorLine, ...]
    values: tuple[ValueLine, ...]
    omitted: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FileLine:
    """A file of tensors. A frozen one may be shared with other checkpoints."""

    name: str
    nbytes: int
    frozen: bool


@dataclass(frozen=True, kw_only=True)
class Description:
    """One checkpoint as one of its workers would load it.

    Attributes:
        rank: whose is what each worker has for itself.
        library: the version of this library that wrote it.
        saved_at: seconds since the epoch, when the last rank's share was taken.
        random_streams: whose states are in it.
    """

    path: str
    run: str
    attempt: str
    step: int
    epoch: int
    saved_at: float
    world_size: int
    rank: int
    library: str
    format_version: int
    nbytes: int
    random_streams: tuple[str, ...]
    parts: tuple[PartLine, ...]
    files: tuple[FileLine, ...]


def describe(snapshot: Snapshot, *, rank: int) -> Description:
    """What `rank` would load.

    Raises:
        ConfigurationError: there was no such rank.
        CorruptCheckpointError: a part's values are not of this format.
    """
    require_rank(snapshot, rank)
    first = snapshot.manifests[0]
    saved = snapshot.parts(rank)
    parts = tuple(_part(name, each, snapshot, rank) for name, each in saved.items())
    files = tuple(
        FileLine(name=shard.file, nbytes=shard.nbytes, frozen=number >= snapshot.world_size)
        for number, shard in sorted(snapshot.shards.items())
    )
    return Description(
        path=snapshot.where,
        run=first.run,
        attempt=first.attempt,
        step=snapshot.step,
        epoch=first.epoch,
        saved_at=max(each.saved_at for each in snapshot.manifests),
        world_size=snapshot.world_size,
        rank=rank,
        library=first.library,
        format_version=max(each.version for each in snapshot.manifests),
        nbytes=sum(file.nbytes for file in files),
        random_streams=_streams(parts),
        parts=parts,
        files=files,
    )


def _part(name: str, saved: SavedPart, snapshot: Snapshot, rank: int) -> PartLine:
    tensors: list[TensorLine] = []
    values: list[ValueLine] = []
    counted: dict[str, int] = {}
    for leaf in leaves(saved.value, name):
        path = leaf.path.removeprefix(f"{name}/")
        if not leaf.stored:
            values.append(ValueLine(path=path, value=text_of(leaf.value)))
            continue
        form, pieces = form_of(leaf, saved), snapshot.located(leaf.stored, rank)
        counted[leaf.stored] = nbytes_of(leaf, saved)
        tensors.append(
            TensorLine(
                path=path,
                stored=leaf.stored,
                dtype=form.dtype,
                shape=form.shape,
                nbytes=counted[leaf.stored],
                scope=pieces[0].info.scope,
                pieces=len(pieces),
                frozen=pieces[0].shard >= snapshot.world_size,
            )
        )
    return PartLine(
        name=name,
        kind=saved.kind,
        per_rank=name in snapshot.per_rank_parts(),
        nbytes=sum(counted.values()),
        tensors=tuple(tensors),
        values=tuple(values),
        omitted=saved.omitted,
    )


def _streams(parts: tuple[PartLine, ...]) -> tuple[str, ...]:
    """The members of the random streams' part."""
    streams = [part for part in parts if part.kind == RngPart.kind]
    # A worker without an accelerator has an empty list of its streams.
    values = [each.path for part in streams for each in part.values if each.value != "[]"]
    tensors = [each.path for part in streams for each in part.tensors]
    return tuple(sorted({path.partition("/")[0] for path in (*values, *tensors)}))
