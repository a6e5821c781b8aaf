"""Which snapshot to resume from, agreed by all ranks, and how its bytes reach the state.

A save run backwards. Each rank reads its share of the stored bytes into a
staging slot and proves it; all ranks tell each other whether theirs is good; and
only then are slices dealt out from the slots into live tensors. Each stored byte
is read once by the group, nothing is half applied, and no rank needs more host
memory than its slot and one chunk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ray_accel_ckpt import errors
from ray_accel_ckpt.errors import (
    AccelCkptError,
    CheckpointError,
    FormatVersionError,
    NotACheckpointError,
    NoUsableCheckpointError,
    StorageError,
)
from ray_accel_ckpt.image.manifest import SliceInfo
from ray_accel_ckpt.image.reader import Located, Snapshot, Staged, as_tensor, by_rank, dtype_of
from ray_accel_ckpt.image.staging import Slot
from ray_accel_ckpt.runtime.group import Group
from ray_accel_ckpt.state.bundle import Plan
from ray_accel_ckpt.state.part import Scope
from ray_accel_ckpt.state.tree import tensor_refs, unflatten
from ray_accel_ckpt.storage.catalog import Candidate, ShardFetch, candidates, open_snapshot
from ray_accel_ckpt.storage.filesystem import Filesystem

logger = logging.getLogger(__name__)
T = TypeVar("T")

_CHUNK = 32 * 2**20
"""Bytes of one broadcast, at most: the memory a rank needs beside its slot."""

Decide = Callable[[Snapshot], Plan]


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What was loaded."""

    snapshot: Snapshot
    path: str


@dataclass(kw_only=True)
class Restorer:
    """Loads checkpoints into a bundle's live tensors.

    Args:
        decide: compares a snapshot with the registered state; raises
            `StateMismatchError` before anything changes.
        device: where tensors go that are not copied into live ones.
    """

    filesystem: Filesystem
    group: Group
    slot: Slot
    device: torch.device
    decide: Decide

    def newest(self, directory: str, *, registered: bool = False) -> Restored | None:
        """Load the newest good checkpoint under `directory`; None if there is none at all.

        Collective. Rank 0 lists, all ranks verify. A bad checkpoint is passed
        over with a warning that names the file and the fault. One that was
        never written whole is none: a run cut off in its first save starts anew.

        Args:
            registered: Ray knows a checkpoint of this run, so there was a whole one.

        Raises:
            NoUsableCheckpointError: there are checkpoints, and none is good.
            FormatVersionError: the newest is of a newer format. Going on from an
                older one would throw away what it holds.
            StateMismatchError: the newest good one is of another state.
        """
        faults = []
        whole = registered
        for path in self._listed(directory):
            try:
                return self.exactly(path)
            except FormatVersionError:
                raise
            except CheckpointError as e:
                whole = whole or not isinstance(e, NotACheckpointError)
                faults.append(f"{path}: {e}")
                if self.group.rank == 0:
                    logger.warning("passing over a checkpoint that is not good: %s", faults[-1])
        if not whole:
            return None
        raise NoUsableCheckpointError(
            f"none of {len(faults)} checkpoints can be loaded",
            where=directory,
            why="\n".join(faults) or "Ray knows of a checkpoint, and there is none",
            remedy="see what damaged them; to start anew all the same, use another run name",
        )

    def exactly(self, path: str) -> Restored:
        """Load the checkpoint at `path`, or raise what is wrong with it. Collective.

        On any error no live tensor has been changed, on any rank.
        """
        snapshot = self._agreed(lambda: self._open(path))
        plan = self._agreed(lambda: self.decide(snapshot))
        wanted = self._wanted(snapshot, plan)
        staged = self._agreed(lambda: self._read(snapshot, wanted))
        tensors = _Destination(plan, snapshot, self.group.rank, self.device)
        self._deal(wanted, staged, tensors, live=False)
        states = self._agreed(lambda: self._understood(plan, tensors))
        # All of it is read, proved and understood, on every rank. From here on state changes.
        self._deal(wanted, staged, tensors, live=True)
        for (part, _), state in zip(plan.parts, states, strict=True):
            part.apply(state)
        return Restored(snapshot=snapshot, path=path)

    def _understood(self, plan: Plan, tensors: _Destination) -> list[Any]:
        states = []
        for part, saved in plan.parts:
            state = unflatten(saved.value, tensors.all)
            part.check(state)
            states.append(state)
        return states

    def _open(self, path: str) -> Snapshot:
        snapshot = open_snapshot(self.filesystem, path)
        snapshot.parts(self.group.rank)
        return snapshot

    # --- agreeing ----------------------------------------------------------------------

    def _listed(self, directory: str) -> list[str]:
        """Rank 0's list on every rank: an eventually consistent listing need not be equal."""
        listed: list[str] = []
        problem = None
        if self.group.rank == 0:
            try:
                found: list[Candidate] = candidates(self.filesystem, directory)
                listed = [candidate.path for candidate in found]
            except StorageError as e:
                problem = e
        answer = self.group.from_rank_zero([listed, str(problem) if problem else None])
        if answer[1] is not None:
            raise problem or StorageError(answer[1])
        return list(answer[0])

    def _agreed(self, work: Callable[[], T]) -> T:
        """Run `work`; if any rank failed, every rank raises that failure."""
        result, problem = None, None
        try:
            result = work()
        except AccelCkptError as e:
            problem = e
        told = self.group.gather([type(problem).__name__, str(problem)] if problem else None)
        if problem is not None:
            raise problem
        for rank, failure in enumerate(told):
            if failure is not None:
                kind: type[AccelCkptError] = getattr(errors, failure[0])
                raise kind(f"rank {rank} found: {failure[1]}")
        return result  # type: ignore[return-value]

    # --- reading -----------------------------------------------------------------------

    def _wanted(self, snapshot: Snapshot, plan: Plan) -> dict[int, list[SliceInfo]]:
        """Slices to read, by the rank whose shard holds them: equal on all ranks but for
        the per-rank ones, which only their owner reads and nobody else needs."""
        pieces: list[Located] = []
        for _, saved in plan.parts:
            for name in saved.tensors:
                pieces += snapshot.located(name, self.group.rank)
        return dict(sorted(by_rank(pieces).items()))

    def _reader(self, stored_rank: int) -> int:
        """Which live rank reads the shard that `stored_rank` wrote."""
        return stored_rank % self.group.world_size

    def _read(self, snapshot: Snapshot, wanted: Mapping[int, list[SliceInfo]]) -> dict[int, Staged]:
        """Read and prove what is this rank's to read: its shards, and its per-rank slices."""
        mine = {}
        for stored, infos in wanted.items():
            all_of_it = self._reader(stored) == self.group.rank
            chosen = [i for i in infos if all_of_it or Scope(i.scope) is Scope.PER_RANK]
            if chosen:
                mine[stored] = Staged(stored, chosen)
        fetch = ShardFetch(self.filesystem, snapshot)
        buffer = self.slot.reserve(sum(-(-s.nbytes // 64) * 64 for s in mine.values()))
        at = 0
        for stored, staged in mine.items():
            fetch.verify_header(stored)
            staged.read(fetch, buffer[at : at + staged.nbytes])
            staged.verify(fetch.path(stored))
            at += -(-staged.nbytes // 64) * 64
        return mine

    # --- dealing -----------------------------------------------------------------------

    def _deal(
        self,
        wanted: Mapping[int, list[SliceInfo]],
        staged: Mapping[int, Staged],
        tensors: _Destination,
        *,
        live: bool,
    ) -> None:
        """Fill the fresh tensors, or those of live objects, from the slots of all ranks."""
        for stored, infos in wanted.items():
            source = self._reader(stored)
            held = staged.get(stored)
            chosen = [i for i in infos if (i.name in tensors.live) is live]
            shared = [i for i in chosen if Scope(i.scope) is not Scope.PER_RANK]
            for info in chosen:
                if Scope(info.scope) is Scope.PER_RANK and held is not None:
                    tensors.put(info, held.rows(info), 0)
            for chunk in _chunks(sorted(shared, key=lambda i: i.begin)):
                self._deal_chunk(chunk, source, held, tensors)

    def _deal_chunk(
        self, chunk: list[_Piece], source: int, held: Staged | None, tensors: _Destination
    ) -> None:
        if self.group.world_size == 1 and held is not None:
            for piece in chunk:
                rows = held.rows(piece.info)
                tensors.put(piece.info, piece.of(rows), piece.start)
            return
        buffer = torch.empty(sum(_padded(p.nbytes) for p in chunk), dtype=torch.uint8)
        parts = []
        at = 0
        for piece in chunk:
            parts.append((piece, piece.view(buffer[at : at + piece.nbytes])))
            at += _padded(piece.nbytes)
        if held is not None and self.group.rank == source:
            for piece, view in parts:
                view.copy_(piece.of(held.rows(piece.info)))
        self.group.broadcast(buffer, source)
        for piece, view in parts:
            tensors.put(piece.info, view, piece.start)


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Rows [start, stop) of a slice: as much as goes into one chunk."""

    info: SliceInfo
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        rows = max(1, self.info.length)
        return (self.info.end - self.info.begin) // rows * (self.stop - self.start)

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[self.start : self.stop] if self.info.shape else rows

    def view(self, data: torch.Tensor) -> torch.Tensor:
        """`data` (uint8, of `nbytes`) as these rows."""
        rows = self.info.model_copy(update={"length": self.stop - self.start})
        return as_tensor(rows, data)


def _chunks(infos: list[SliceInfo]) -> Iterator[list[_Piece]]:
    """Cut slices at row boundaries into chunks of about `_CHUNK` bytes; the same on each rank."""
    chunk: list[_Piece] = []
    room = _CHUNK
    for info in infos:
        if info.begin == info.end:
            continue
        rows = max(1, info.length)
        row_nbytes = max(1, (info.end - info.begin) // rows)
        start = 0
        while start < info.length:
            take = min(info.length - start, max(1, room // row_nbytes))
            chunk.append(_Piece(info=info, start=start, stop=start + take))
            room -= take * row_nbytes
            start += take
            if room <= 0:
                yield chunk
                chunk, room = [], _CHUNK
    if chunk:
        yield chunk


class _Destination:
    """Where rows go: into the plan's live tensors, or into fresh ones of the right device."""

    def __init__(self, plan: Plan, snapshot: Snapshot, rank: int, device: torch.device) -> None:
        self.live = dict(plan.targets)
        self.all = dict(plan.targets)
        for _, saved in plan.parts:
            for name, where in tensor_refs(saved.value).items():
                if name not in self.live:
                    info = snapshot.located(name, rank)[0].info
                    target = device if where == "accelerator" else torch.device("cpu")
                    self.all[name] = torch.empty(info.shape, dtype=dtype_of(info), device=target)

    @torch.no_grad()
    def put(self, info: SliceInfo, rows: torch.Tensor, start: int) -> None:
        target = self.all[info.name]
        if info.shape:
            first = info.offset + start
            target = target[first : first + rows.shape[0]]
        target.copy_(rows)


def _padded(nbytes: int) -> int:
    return -(-nbytes // 64) * 64
