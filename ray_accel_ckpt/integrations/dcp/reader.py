"""A storage reader: `torch.distributed.checkpoint.load` reads checkpoints of this library."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ray_accel_ckpt.errors import CheckpointError, ConfigurationError, NotACheckpointError
from ray_accel_ckpt.image.pieces import Piece
from ray_accel_ckpt.integrations.dcp.contents import Contents
from ray_accel_ckpt.state.box import Box
from ray_accel_ckpt.storage.opened import StoredTensors, open_stored, require_rank

_BATCH = 64 * 2**20


class CheckpointReader(StorageReader):
    """Reads a checkpoint into whatever DCP is asked to load: any mesh, or plain tensors.

        state = {"model": get_model_state_dict(model),
                 "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, storage_reader=CheckpointReader(path))

    The keys are the names of parts: `model` and `optimizer` for the first ones
    that were prepared, `model_1` for the second model, and those of other parts.
    Their states are in the shape that DCP gives them, flattened optimizers
    (`flatten_optimizer_state_dict=True`) included. Parameters of an optimizer
    that trains one model have that model's own names; if it trains several, they
    have the name of their model's part before them, as in a `ModuleDict` of these.

    Each process reads the checksum blocks its own shards need and no others, and
    proves each before a byte of it is used. No value is unpickled that came out
    of the checkpoint. Host memory: 64 MiB, or one stored slice if that is larger.

    Damage is found when it is read: what `load` has filled by then stays filled,
    on every process, and the error that `load` raises (its own
    `CheckpointException`) carries the `CorruptCheckpointError`. Load again from another
    checkpoint, or start anew.

    Args:
        checkpoint: a path, a URI, or a `ray.train.Checkpoint`.
        rank: whose, of what each worker has for itself.

    Raises:
        NotACheckpointError: there is none, or not all of one.
        CorruptCheckpointError: a manifest is damaged or a shard cut off.
        FormatVersionError: it is of a newer format.
        UnsupportedStateError: two values of a part have one name in DCP.
        ConfigurationError: no such rank, or not something that can be opened.
    """

    def __init__(self, checkpoint: Any, *, rank: int = 0) -> None:
        super().__init__()
        self._rank = rank
        self._open(checkpoint)

    @property
    def checkpoint_id(self) -> str:
        """The checkpoint's path."""
        return self._snapshot.where

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether a checkpoint of this library lies there, damaged or not."""
        try:
            open_stored(checkpoint_id)
        except (NotACheckpointError, ConfigurationError):
            return False
        except CheckpointError:
            return True
        return True

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Go on with another checkpoint, if one is given."""
        if checkpoint_id is not None:
            self._open(checkpoint_id)

    def read_metadata(self, *args: Any, **_: Any) -> Metadata:
        """Every name of the checkpoint: tensors with the boxes they are stored in."""
        return self._contents.metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **_: Any
    ) -> None:
        """Nothing: every process opened the checkpoint itself."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill what the plan asks for. Done when it returns.

        Raises:
            CorruptCheckpointError: naming the file, tensor and byte range.
            StorageError: it could not be read.
        """
        values = [item for item in plan.items if item.type == LoadItemType.BYTE_IO]
        tensors = [item for item in plan.items if item.type == LoadItemType.TENSOR]
        for batch in _batches(map(self._wanted, tensors)):
            self._read(batch, planner)
        stored = StoredTensors(self._snapshot, self._fetch, self._rank)
        for item in values:
            packed = io.BytesIO()
            torch.save(self._contents.value(item.storage_index.fqn, stored), packed)
            packed.seek(0)
            planner.load_bytes(item, packed)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _open(self, checkpoint: Any) -> None:
        self._snapshot, self._fetch = open_stored(checkpoint)
        require_rank(self._snapshot, self._rank)
        self._contents = Contents(self._snapshot, self._rank)

    def _wanted(self, item: ReadItem) -> _Wanted:
        offsets = tuple(item.storage_index.offset or ())
        located = self._contents.piece(item.storage_index.fqn, offsets)
        start = tuple(a + b for a, b in zip(offsets, item.storage_offsets, strict=True))
        box = Box(start=start, size=tuple(item.lengths))
        piece = Piece.overlapping(located.info, box)
        return _Wanted(item=item, shard=located.shard, box=box, piece=piece)

    def _read(self, batch: list[_Wanted], planner: LoadPlanner) -> None:
        shard = batch[0].shard
        staged = self._fetch.staged(shard, _joined(each.piece for each in batch if each.piece))
        buffer = torch.empty(staged.nbytes, dtype=torch.uint8, device="cpu")
        staged.read(self._fetch, buffer, where=self._fetch.path(shard))
        for each in batch:
            target = planner.resolve_tensor(each.item).detach()
            if each.piece is not None:
                rows = staged.rows(each.piece)
                target.copy_(rows[each.box.within(each.piece.box)])
            planner.commit_tensor(each.item, target)


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """A read item, and the stored rows that hold its box; none if it has no bytes."""

    item: ReadItem
    shard: int
    box: Box
    piece: Piece | None

    @property
    def position(self) -> tuple[int, int]:
        return self.shard, self.piece.info.begin + self.piece.begin if self.piece else 0


def _batches(wanted: Iterable[_Wanted]) -> Iterator[list[_Wanted]]:
    """In the order of the files, so that neighbours are read at once."""
    batch: list[_Wanted] = []
    nbytes = 0
    for each in sorted(wanted, key=lambda w: w.position):
        size = each.piece.nbytes if each.piece else 0
        if batch and (batch[0].shard != each.shard or nbytes + size > _BATCH):
            yield batch
            batch, nbytes = [], 0
        batch.append(each)
        nbytes += size
    if batch:
        yield batch


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """One piece a slice: what several names of a tied weight ask for is read once."""
    found: dict[str, Piece] = {}
    for each in pieces:
        other = found.get(each.info.name, each)
        found[each.info.name] = Piece(
            info=each.info,
            first=min(each.first, other.first),
            stop=max(each.stop, other.stop),
        )
    return list(found.values())
