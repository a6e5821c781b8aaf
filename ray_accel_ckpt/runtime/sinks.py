"""A captured bundle on its way out: this rank's rows, frozen in a slot, handed to a writer.

Two ways out, one path: to Ray, which uploads in its own thread and registers
the checkpoint, or to a directory, by a thread of ours. What goes to Ray stays in
memory too, if there is a memory tier; and between two saves something may only stay there.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ray_accel_ckpt.errors import StateMismatchError
from ray_accel_ckpt.image.frozen import FrozenShare
from ray_accel_ckpt.image.image import Image, SaveInfo, parts_of
from ray_accel_ckpt.image.mark import mark_of
from ray_accel_ckpt.image.shared import SharedSlot
from ray_accel_ckpt.image.staging import Lease, SlotPool
from ray_accel_ckpt.runtime.memory import Memory
from ray_accel_ckpt.runtime.ray_run import RayRun, in_local_mode
from ray_accel_ckpt.runtime.report import Metrics, plain_metrics, report
from ray_accel_ckpt.runtime.session import Session
from ray_accel_ckpt.state.part import Captured
from ray_accel_ckpt.storage.catalog import checkpoint_name
from ray_accel_ckpt.storage.filesystem import Filesystem, resolve
from ray_accel_ckpt.storage.naming import prune
from ray_accel_ckpt.storage.writer import refuse_other_checkpoint
from ray_accel_ckpt.version import __version__

logger = logging.getLogger(__name__)

Durable = Callable[[int], None]
"""Told the bytes of this rank's share, without what is frozen."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What is saved, as it is now.

    Attributes:
        late: tensors, by name, that only torch optimizers change until `SlotPool.settle`,
            each with the live tensors that are changed if it is.
        frozen: names of tensors that are not expected to have changed since the last save.
    """

    captured: Mapping[str, Captured]
    late: Mapping[str, Sequence[torch.Tensor]]
    frozen: Collection[str]
    step: int
    epoch: int


class Sink(Protocol):
    """Where one save goes."""

    @property
    def path(self) -> str: ...

    @property
    def of_run(self) -> bool:
        """Whether `load_state()` would find it: not so in a directory given by hand."""
        ...

    def save(self, moment: Moment, slots: SlotPool, *, metrics: Metrics, durable: Durable) -> None:
        """Freeze this rank's share and hand it on. When it returns, the state may change,
        but for what of it is `late`.

        Args:
            durable: called, on another thread, once this rank's share is.
        """
        ...


def memory_sink(session: Session, *, step: int) -> Sink | None:
    """The way into memory alone for one step; None if nothing is to be kept of it."""
    memory = session.memory
    if memory is None:
        return None
    session.agree()
    if not memory.due(step):
        return None
    save_id = session.next_save_id(step)
    return MemorySink(session, memory, checkpoint_name(step, save_id), save_id)


def sink_for(
    session: Session, output_dir: str | os.PathLike[str] | None, *, step: int
) -> Sink | None:
    """The way out for one save; None in Ray's local mode without a place to save to."""
    save_id = session.next_save_id(step)
    if output_dir is not None:
        filesystem, path = resolve(output_dir)
        return DirectorySink(session, filesystem, path, save_id, automatic=False)
    if session.run is not None:
        return RaySink(session, session.run, checkpoint_name(step, save_id), save_id)
    place = session.next_automatic()
    if place is not None:
        return DirectorySink(session, *place, save_id, automatic=True)
    if in_local_mode() and not session.told_of_local_mode:
        session.told_of_local_mode = True
        logger.warning(
            "not saving: Ray Train's local mode (num_workers=0) has no storage; pass "
            "project_config=ProjectConfiguration('dir', automatic_checkpoint_naming=True)"
        )
    return None


class RaySink:
    """To the Ray run's storage, reported as a checkpoint of the run."""

    def __init__(self, session: Session, run: RayRun, name: str, save_id: str) -> None:
        self._session, self._run, self._name, self._save_id = session, run, name, save_id
        self.path = f"{run.path}/{name}"
        self.of_run = True

    def save(self, moment: Moment, slots: SlotPool, *, metrics: Metrics, durable: Durable) -> None:
        plain = self._session.first(lambda: plain_metrics(metrics))
        memory = self._session.memory
        frozen = [(self._session.frozen, self.of_run)]
        if memory is not None and memory.on:
            memory.wait()
            frozen.append((memory.frozen, True))
        images, lease = freeze(moment, slots, self._session, save_id=self._save_id, frozen=frozen)
        release = _after(len(images), lease.release)
        if memory is not None and isinstance(lease.slot, SharedSlot):
            for image in images[1:]:
                memory.keep(image, lease.slot, release=release)

        def after() -> None:
            durable(images[0].layout.nbytes)
            self._session.sweep()

        report(
            self._run,
            images[0],
            directory_name=self._name,
            metrics=plain,
            timeout=self._session.timeout,
            release=release,
            durable=after,
        )


class MemorySink:
    """To the memory of the nodes, and nowhere else."""

    def __init__(self, session: Session, memory: Memory, name: str, save_id: str) -> None:
        self._session, self._memory, self._save_id = session, memory, save_id
        self.path = memory.path_of(name)
        # A save that the policy asks for is none the less due, and the end is not saved by it.
        self.of_run = False

    def save(self, moment: Moment, slots: SlotPool, *, metrics: Metrics, durable: Durable) -> None:
        del metrics, durable
        memory = self._memory
        memory.wait()
        (image,), lease = freeze(
            moment, slots, self._session, save_id=self._save_id, frozen=[(memory.frozen, True)]
        )
        if isinstance(lease.slot, SharedSlot):
            memory.keep(image, lease.slot, release=lease.release)


class DirectorySink:
    """To a directory, by this process's own writer thread."""

    def __init__(
        self,
        session: Session,
        filesystem: Filesystem,
        path: str,
        save_id: str,
        *,
        automatic: bool,
    ) -> None:
        self._session, self._filesystem, self._save_id = session, filesystem, save_id
        self._automatic = self.of_run = automatic
        self._limit = session.project.total_limit if automatic else None
        self.path = path

    def save(self, moment: Moment, slots: SlotPool, *, metrics: Metrics, durable: Durable) -> None:
        del metrics  # Ray's; a directory has nobody to report them to
        session = self._session
        # Before a slot is taken: whoever is told of an earlier failure may go on saving.
        session.writer.raise_earlier()
        if not self._automatic:
            session.first(lambda: self._refuse_other(moment.step))
        (image,), lease = freeze(
            moment,
            slots,
            session,
            save_id=self._save_id,
            frozen=[(session.frozen, self.of_run)],
        )

        def after() -> None:
            durable(image.layout.nbytes)
            self._prune()

        session.writer.submit(
            self._filesystem,
            self.path,
            image,
            release=lease.release,
            after=after,
        )

    def _refuse_other(self, step: int) -> None:
        refuse_other_checkpoint(
            self._filesystem,
            self.path,
            attempt=self._save_id,
            step=step,
            timeout=self._session.timeout,
        )

    def _prune(self) -> None:
        """Whichever rank finishes last finds the checkpoint whole and removes the oldest."""
        if self._limit is not None:
            parent = self.path.rpartition("/")[0]
            prune(self._filesystem, parent, keep=self._limit, newest=self.path)


def freeze(
    moment: Moment,
    slots: SlotPool,
    session: Session,
    *,
    save_id: str,
    frozen: Sequence[tuple[FrozenShare, bool]],
) -> tuple[list[Image], Lease]:
    """Copy this rank's share into a free slot. When it returns, the state may change
    but for what is `late`: see `Slot.fill`.

    Asks no peer, but for the group's first save: there the digest of the plan
    is compared once, before anything is copied, and that there is memory.

    Args:
        frozen: for each place that it goes to, what is frozen there and whether that may
            be linked to.

    Returns:
        An image for each of these places, and the lease of the slot that is the bytes of all
        of them: to be had for as long as they are needed.

    Raises:
        StateMismatchError: the workers' models differ.
        UnsupportedStateError: a dtype the format does not have.
    """
    rank, world_size = session.group.rank, session.group.world_size
    captured = moment.captured
    planned = session.first(
        lambda: session.plans.of(captured, rank=rank, world_size=world_size, frozen=moment.frozen)
    )
    _check_plan(session, planned.digest)
    unchanging = planned.frozen
    if session.memory is not None:
        still = 0 if unchanging is None else unchanging.nbytes
        session.memory.measure(planned.layout.nbytes, still)
    info = SaveInfo(
        run=session.run.name if session.run is not None else "",
        attempt=save_id,
        step=moment.step,
        epoch=moment.epoch,
        rank=rank,
        world_size=world_size,
        plan=planned.digest,
        library=__version__,
    )
    tensors = {name: t for part in captured.values() for name, t in part.tensors.items()}
    lease = slots.acquire()
    slot = lease.slot
    try:
        data = slot.fill(planned.layout, tensors, late=moment.late)
        parts = parts_of(captured, rank=rank)
        mark = None if unchanging is None else mark_of(unchanging, tensors)
        images = [
            Image(
                info=info,
                layout=planned.layout,
                data=data,
                parts=parts,
                wait=slot.copies.wait,
                frozen=None
                if unchanging is None
                else share.image(unchanging, tensors, lasting=last, mark=mark),
            )
            for share, last in frozen
        ]
        return images, lease
    except BaseException:
        # Copies that nobody knows of may be under way to this memory: the next save has other.
        slot.free()
        lease.release()
        raise


def _after(times: int, done: Callable[[], None]) -> Callable[[], None]:
    """What is to be called so many times, on any threads, before `done` is."""
    left = itertools.count(times - 1, -1)

    def once() -> None:
        if next(left) == 0:
            done()

    return once


def _check_plan(session: Session, plan: str) -> None:
    if session.plan_checked:
        return
    plans = session.group.gather(plan)
    differing = [rank for rank, other in enumerate(plans) if other != plans[0]]
    if differing:
        raise StateMismatchError(
            "the workers do not train the same model",
            why=f"names, shapes or dtypes on rank {differing[0]} differ from rank 0's",
            remedy="build the same model on every worker; register what differs with per_rank=True",
        )
    session.plan_checked = True
