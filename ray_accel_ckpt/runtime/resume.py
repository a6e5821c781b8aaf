"""From a checkpoint that was chosen to a bundle that goes on from it.

What of a saved state applies to this rank, this number of workers and this part of
the state is decided here; choosing and reading are `restore`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ray_accel_ckpt.image.reader import Snapshot
from ray_accel_ckpt.image.staging import Slot, SlotPool
from ray_accel_ckpt.runtime.elastic import dealt_anew, gradients_left_out
from ray_accel_ckpt.runtime.prepare import Preparer
from ray_accel_ckpt.runtime.restore import Restored, Restorer
from ray_accel_ckpt.runtime.session import Session
from ray_accel_ckpt.state import rng
from ray_accel_ckpt.state.bundle import Plan, StateBundle
from ray_accel_ckpt.state.hooks import Hooks
from ray_accel_ckpt.state.loader import PreparedLoader
from ray_accel_ckpt.state.model import ModelPart
from ray_accel_ckpt.storage.filesystem import Filesystem

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Resumer:
    """Loads into one worker's bundle.

    Attributes:
        broadcast: see `Checkpointer`.
    """

    session: Session
    bundle: StateBundle
    hooks: Hooks
    preparer: Preparer
    slots: SlotPool
    broadcast: bool

    @contextmanager
    def restorer(
        self, filesystem: Filesystem, *, only: tuple[str, ...] | None, strict: bool
    ) -> Iterator[Restorer]:
        """What loads into the bundle, with a staging slot of its own.

        Args:
            only: names of parts; None for all.
        """
        # Alone, a worker needs more than its share: that is no slot for saves.
        lease = self.slots.acquire() if self.broadcast else None
        try:
            yield Restorer(
                filesystem=filesystem,
                group=self.session.group,
                slot=Slot() if lease is None else lease.slot,
                device=self.preparer.device,
                broadcast=self.broadcast,
                decide=lambda snapshot: self._plan(snapshot, only, strict),
            )
        finally:
            if lease is not None:
                lease.release()

    def settle(self, restored: Restored, filesystem: Filesystem) -> None:
        """After all of a state was loaded: what follows from it for what was not in it.

        Args:
            filesystem: where it was loaded from.
        """
        rank, stored = self.session.group.rank, restored.snapshot.world_size
        frozen = restored.snapshot.manifests[rank].frozen if rank < stored else None
        if frozen is not None and not restored.kept:
            path = f"{restored.snapshot.where}/{frozen.shard.file}"
            self.session.frozen.adopt(filesystem, path, frozen)
        if self.bundle.gradients.name in restored.parts:
            self.preparer.window.reopen()
        else:
            self.preparer.window.clear()
        if self.bundle.zeroed.name not in restored.parts:
            self.bundle.zeroed.forget()
        if not {self.bundle.gradients.name, self.bundle.zeroed.name} & restored.parts:
            self.bundle.gradients.clear()
        if rank >= stored:
            logger.warning(
                "rank %d was not there when the checkpoint was saved (%d workers): its random "
                "streams are new, derived from (seed, rank, attempt)",
                rank,
                stored,
            )
            rng.seed_all(rng.derived_seed(self.session.seed, rank, self.session.attempt))

    def _plan(self, snapshot: Snapshot, only: tuple[str, ...] | None, strict: bool) -> Plan:
        rank, world_size = self.session.group.rank, self.session.group.world_size
        skip = self.hooks.skipped(self.bundle.of_type(ModelPart), snapshot.where)
        if rank >= snapshot.world_size:
            skip |= snapshot.per_rank_parts()
        saved, gradients = snapshot.parts(rank), self.bundle.gradients
        if gradients_left_out(snapshot, saved, gradients, world_size):
            skip |= {gradients.name}
        if snapshot.world_size != world_size:
            streams = dealt_anew(snapshot, self.bundle.of_type(PreparedLoader), only)
            saved, skip = saved | streams, skip - streams.keys()
        return self.bundle.plan(saved, only=only, skip=skip, strict=strict, where=snapshot.where)
