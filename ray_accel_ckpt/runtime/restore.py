"""Which snapshot to resume from, agreed by all ranks, and how its bytes reach the state.

A save run backwards. Each rank reads into a staging slot, and what nothing holds yet
to where it stays, and proves what is its to read: what it alone needs (its rows of
sharded tensors, its own streams), and of what all need whole its share, so that those
bytes are read once by the group, unless each is to read for itself (`broadcast`). All
ranks tell each other whether theirs is good; and only then are slices dealt out into
live tensors. Nothing is half applied, and no rank needs more host memory than its slot
and one chunk.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from ray_accel_ckpt.errors import (
    CheckpointError,
    ConfigurationError,
    CorruptCheckpointError,
    FormatVersionError,
    NotACheckpointError,
    NoUsableCheckpointError,
)
from ray_accel_ckpt.image.reader import Snapshot
from ray_accel_ckpt.image.staged import Staged
from ray_accel_ckpt.image.staging import Slot
from ray_accel_ckpt.runtime.dealer import Dealer, padded
from ray_accel_ckpt.runtime.destination import Destination, Wanted
from ray_accel_ckpt.runtime.group import Group
from ray_accel_ckpt.runtime.kept import Kept
from ray_accel_ckpt.runtime.progress import restoring
from ray_accel_ckpt.state.bundle import Plan
from ray_accel_ckpt.state.tree import unflatten
from ray_accel_ckpt.storage.catalog import (
    ShardFetch,
    candidates,
    inherited,
    open_snapshot,
    step_of,
)
from ray_accel_ckpt.storage.filesystem import Readable
from ray_accel_ckpt.storage.proving import Watched

logger = logging.getLogger(__name__)

Decide = Callable[[Snapshot], Plan]


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What was loaded: the parts named, out of a snapshot at a path.

    Attributes:
        kept: whether that is one of the memory tier, and not in storage.
    """

    snapshot: Snapshot
    path: str
    parts: frozenset[str]
    kept: bool

    @property
    def name(self) -> str:
        return _name(self.path)


@dataclass(kw_only=True)
class Restorer:
    """Loads checkpoints into a bundle's live tensors.

    Args:
        decide: compares a snapshot with the registered state; raises
            `StateMismatchError` before anything changes.
        device: where tensors go that are not copied into live ones.
        broadcast: whether what all ranks need is read once by the group, and not by each rank.
    """

    filesystem: Readable
    group: Group
    slot: Slot
    device: torch.device
    broadcast: bool = True
    decide: Decide

    def newest(
        self, directory: str, *, registered: Sequence[str] = (), kept: Kept | None = None
    ) -> Restored | None:
        """Load the newest good checkpoint under `directory`; None if there is none at all.

        Collective. Rank 0 lists, all ranks verify. A bad checkpoint is passed
        over with a warning that names the file and the fault. One that was
        never written whole is none: a run cut off in its first save starts anew.
        A run that began from a checkpoint of another one begins from it again
        as long as it has none of its own (`catalog.inherited`). If none is good it lists
        again: whoever else writes to the run may have removed what was listed, for something newer.

        Args:
            registered: names of the checkpoints of this run that Ray knows of, the latest
                last: then there was a whole one. Their order is that of time, whatever
                their steps are: a loop may have gone back to an earlier step, and a
                run's last step and its end are two checkpoints of one step. Others
                are taken to be as old as their step is.
            kept: what the memory tier has. Of what is in both, this is read.

        Raises:
            NoUsableCheckpointError: there are checkpoints, and none is good.
            FormatVersionError: the newest is of a newer format. Going on from an
                older one would throw away what it holds.
            StateMismatchError: the newest good one is of another state.
        """
        faults: dict[str, str] = {}
        whole = bool(registered)
        in_memory = [] if kept is None else kept.paths()
        while True:
            own, begun_from = self._listed(directory)
            whole = whole or bool(begun_from)
            found = [*_newest_first([*in_memory, *own], registered), *begun_from]
            untried = [path for path in found if path not in faults]
            if not untried:
                break
            for path in untried:
                try:
                    return self._load(path, kept if path in in_memory else None)
                except FormatVersionError:
                    raise
                except CheckpointError as e:
                    # What is in memory does not say that anything was ever saved.
                    stored = path not in in_memory
                    whole = whole or (stored and not isinstance(e, NotACheckpointError))
                    faults[path] = f"{path}: {e}"
                    if self.group.rank == 0:
                        logger.warning(
                            "passing over a checkpoint that is not good: %s", faults[path]
                        )
        if not whole:
            return None
        raise NoUsableCheckpointError(
            f"none of {len(faults)} checkpoints can be loaded",
            where=directory,
            why="\n".join(faults.values()) or "Ray knows of a checkpoint, and there is none",
            remedy="see what damaged them; to start anew all the same, use another run name, or "
            "without Ray another project_dir",
        )

    def exactly(self, path: str) -> Restored:
        """Load the checkpoint at `path`, or raise what is wrong with it. Collective.

        On any error no live tensor has been changed, on any rank.
        """
        return self._load(path, None)

    def _load(self, path: str, kept: Kept | None) -> Restored:
        filesystem = kept or self.filesystem
        snapshot = self.group.agreed(lambda: self._open(filesystem, path))
        plan = self.group.agreed(lambda: self.decide(snapshot))
        rank = self.group.rank
        together = self.broadcast and self.group.world_size > 1

        def made() -> tuple[Destination, Wanted]:
            tensors = Destination(plan, snapshot, rank, self.device)
            return tensors, Wanted(plan, snapshot, tensors, rank, together=together)

        tensors, wanted = self.group.agreed(made)
        self._require_same(wanted, path)
        readers = self._readers(snapshot, kept)
        staged = self.group.agreed(
            lambda: self._read(filesystem, path, snapshot, wanted, readers, tensors)
        )
        dealer = Dealer(self.group, wanted, readers, staged, tensors)
        dealer.deal(live=False)
        states = self.group.agreed(lambda: self._understood(plan, tensors))
        # All of it is read, proved and understood, on every rank. From here on state changes.
        dealer.deal(live=True)
        self.group.agreed(lambda: _apply(plan, states, path))
        applied = frozenset(part.name for part, _ in plan.parts)
        return Restored(snapshot=snapshot, path=path, parts=applied, kept=kept is not None)

    def _understood(self, plan: Plan, tensors: Destination) -> list[Any]:
        states = []
        for part, saved in plan.parts:
            state = unflatten(saved.value, tensors.all)
            part.check(state)
            states.append(state)
        return states

    def _open(self, filesystem: Readable, path: str) -> Snapshot:
        snapshot = open_snapshot(filesystem, path)
        snapshot.parts(self.group.rank)
        return snapshot

    # --- agreeing ----------------------------------------------------------------------

    def _listed(self, directory: str) -> tuple[list[str], list[str]]:
        """Rank 0's lists on every rank: an eventually consistent listing need not be equal.

        The run's own checkpoints, and those of another run that it began from.
        """

        def lists() -> tuple[list[str], list[str]]:
            own = [candidate.path for candidate in candidates(self.filesystem, directory)]
            return own, inherited(self.filesystem, directory)

        own, begun_from = self.group.of_rank_zero(lists)
        return own, begun_from

    def _require_same(self, wanted: Wanted, path: str) -> None:
        """What is broadcast must be the same on all ranks, whatever the manifests claim."""
        told = self.group.gather([self.broadcast, wanted.digest()])
        if len({broadcast for broadcast, _ in told}) > 1:
            raise ConfigurationError(
                "some workers have broadcast=True and others broadcast=False",
                where=", ".join(f"rank {rank}: {each}" for rank, (each, _) in enumerate(told)),
                remedy="make every worker's Checkpointer with the same arguments",
            )
        if len({digest for _, digest in told}) > 1:
            raise CorruptCheckpointError(
                "the ranks of a checkpoint do not say the same of what they share",
                where=path,
                why="they would wait for different tensors",
                remedy="use another checkpoint",
            )

    # --- reading -----------------------------------------------------------------------

    def _readers(self, snapshot: Snapshot, kept: Kept | None) -> dict[int, int]:
        """By shard, the live rank that reads what all need of it: one on whose node it is."""
        everyone = list(range(self.group.world_size))
        here: dict[int, list[int]] = {}
        if kept is not None:
            near = [
                n for n, f in snapshot.shards.items() if kept.near(f"{snapshot.where}/{f.file}")
            ]
            for rank, numbers in enumerate(self.group.gather(near)):
                for number in numbers:
                    here.setdefault(number, []).append(rank)
        ranks = {number: here.get(number, everyone) for number in snapshot.shards}
        return {number: near[number % len(near)] for number, near in ranks.items()}

    def _read(
        self,
        filesystem: Readable,
        path: str,
        snapshot: Snapshot,
        wanted: Wanted,
        readers: Mapping[int, int],
        tensors: Destination,
    ) -> dict[int, Staged]:
        """Read and prove what is this rank's to read, by the shard it lies in.

        What nothing holds yet is read to where it stays; the rest to the slot.
        """
        shards = ShardFetch(filesystem, snapshot)
        mine = {}
        for stored in snapshot.shards:
            pieces = list(wanted.own.get(stored, ()))
            if readers[stored] == self.group.rank:
                pieces += wanted.common.get(stored, ())
            if pieces:
                places = {piece.info.name: tensors.place(piece) for piece in pieces}
                fresh = {name: place for name, place in places.items() if place is not None}
                mine[stored] = shards.staged(stored, pieces, fresh)
        buffer = self.slot.reserve(sum(padded(s.nbytes) for s in mine.values()))
        headers = sum(snapshot.shards[stored].header_nbytes for stored in mine)
        nbytes = headers + sum(s.read_nbytes for s in mine.values())
        with restoring(path, nbytes, rank=self.group.rank) as watcher:
            fetch = ShardFetch(Watched(filesystem, watcher), snapshot)
            at = 0
            for stored, staged in mine.items():
                fetch.verify_header(stored)
                staged.read(fetch, buffer[at : at + staged.nbytes], where=fetch.path(stored))
                at += padded(staged.nbytes)
        return mine


def _apply(plan: Plan, states: Sequence[Any], path: str) -> None:
    for (part, _), state in zip(plan.parts, states, strict=True):
        try:
            part.apply(state)
        except Exception as e:
            e.add_note(
                f"while loading part {part.name!r} of {path}: what came before it has been "
                "changed already, so start the process again"
            )
            raise


def _newest_first(paths: Iterable[str], registered: Sequence[str]) -> list[str]:
    """By time as far as it is known. `paths` come with the highest step first."""
    index = {name: i for i, name in enumerate(registered)}
    by_step = sorted((step_of(name), i) for name, i in index.items())
    steps = [step for step, _ in by_step]
    # The latest registered one of those whose steps are the first so many.
    latest = [-1, *accumulate((i for _, i in by_step), max)]

    def age(path: str) -> tuple[int, bool, int]:
        name = _name(path)
        step = step_of(name)
        if name in index:
            return index[name], False, step
        return latest[bisect_left(steps, step)], True, step

    return sorted(paths, key=age, reverse=True)


def _name(path: str) -> str:
    return path.rpartition("/")[2]
