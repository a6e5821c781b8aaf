"""Tells what happens to a run: to its journal, to Ray's metrics and to the log."""

from __future__ import annotations

import logging
import os
import platform
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ray_accel_ckpt.errors import StorageError
from ray_accel_ckpt.runtime.exchange import Preemption
from ray_accel_ckpt.runtime.metrics import Metrics
from ray_accel_ckpt.runtime.restore import Restored
from ray_accel_ckpt.runtime.session import Session
from ray_accel_ckpt.storage.filesystem import Filesystem
from ray_accel_ckpt.storage.journal import REACHED, Journal, read_events
from ray_accel_ckpt.version import __version__

logger = logging.getLogger(__name__)


_PATIENCE = 5.0
"""Seconds that the end of training waits for the journal: Ray may end the process after it."""


class Chronicle:
    """Of one attempt, by one worker. Rank 0 has the journal and the log; all have metrics.

    Nothing here communicates or raises, and only `begin` and `end` wait for storage, and
    `durable` after the end.

    Args:
        step: where training stands.
        policy: when it saves, as the journal tells it.
    """

    def __init__(self, session: Session, *, step: Callable[[], int], policy: object) -> None:
        self._session, self._step, self._policy = session, step, policy
        self._metrics = Metrics(session.run)
        self._journal: Journal | None = None
        self._begun = self._ended = False
        self._told = -1

    def begin(self, restored: Restored | None = None, *, seconds: float = 0.0) -> None:
        """The attempt begins, with what was restored if anything was.

        It begins once: what is restored later is told as such.

        Args:
            seconds: that restoring took.
        """
        place = self._session.source(None)
        if place is None:
            return
        before = None
        if not self._begun and self._session.group.rank == 0:
            before = _last_step(*place) if restored is not None else None
            self._open(*place)
        began, self._begun = self._begun, True
        if restored is not None:
            self.loaded(restored, seconds=seconds, before=before, begins=not began)

    def frozen(self, path: str, *, step: int, epoch: int, blocked: float) -> None:
        """Training goes on, having waited so many seconds for a save of the run."""
        self._told = step
        self._metrics.stalled(blocked)
        self._tell(
            "save",
            name=_name(path),
            step=step,
            epoch=epoch,
            blocked=round(blocked, 4),
        )

    def durable(self, path: str, *, step: int, nbytes: int, seconds: float) -> None:
        """This rank's share of a save is durable, so many seconds after it began.

        On any thread, and be it before `frozen` is called.

        Args:
            nbytes: of this rank's share.
        """
        self._metrics.durable(nbytes, seconds)
        self._tell(
            "durable", name=_name(path), step=step, seconds=round(seconds, 4), share_nbytes=nbytes
        )
        if self._session.group.rank == 0:
            logger.info(
                "saved step %d to %s: %s of this worker's share durable after %.2f s",
                step,
                path,
                _megabytes(nbytes),
                seconds,
            )
        # Ray ends the process as soon as this save is reported, and no thread writes then.
        if self._ended and self._journal is not None:
            self._journal.flush(_PATIENCE)

    def noticed(self, notice: Preemption) -> None:
        """Nodes of this group are going to be taken away."""
        self._tell(
            "notice",
            step=self._step(),
            nodes=list(notice.nodes),
            ranks=list(notice.ranks),
            deadline=notice.deadline,
        )

    def end(self) -> None:
        """Training is done and saved. The attempt has no other end that could be told from here."""
        self._told, self._ended = self._step(), True
        self._tell("end", step=self._told)
        if self._journal is not None:
            self._journal.flush(_PATIENCE)

    def loaded(
        self,
        restored: Restored,
        *,
        seconds: float,
        before: int | None = None,
        begins: bool = False,
    ) -> None:
        """A state was loaded.

        Args:
            seconds: that it took.
            before: the step to which training had come before, if that is known.
            begins: whether the attempt begins with it.
        """
        tier = "memory" if restored.kept else "storage"
        step = restored.snapshot.step
        # Of a state without counters training begins anew, wherever it was saved.
        lost = None if before is None else max(0, before - self._step())
        nbytes = sum(shard.nbytes for shard in restored.snapshot.shards.values())
        self._metrics.restored(tier, lost or 0)
        self._tell(
            "resumed",
            name=restored.name,
            path=restored.path,
            step=step,
            tier=tier,
            begins=begins,
            seconds=round(seconds, 4),
            nbytes=nbytes,
            world_size=restored.snapshot.world_size,
            lost=lost,
        )
        if self._session.group.rank == 0:
            logger.info(
                "resumed from %s at step %d: %s from %s in %.2f s%s",
                restored.path,
                step,
                _megabytes(nbytes),
                tier,
                seconds,
                f", {lost} steps are made again" if lost else "",
            )

    def _open(self, filesystem: Filesystem, directory: str) -> None:
        pulse = weakref.WeakMethod(self._pulse)
        self._journal = Journal(
            lambda: (filesystem, directory),
            writer=self._session.attempt,
            pulse=lambda: None if (asked := pulse()) is None else asked(),
        )
        # At exit the journal itself waits for what is not written yet.
        weakref.finalize(self, self._journal.close).atexit = False
        self._told = self._step()
        self._tell("start", **self._circumstances())

    def _tell(self, kind: str, **fields: Any) -> None:
        if self._journal is not None:
            self._journal.add(kind, **fields)

    def _pulse(self) -> dict[str, Any] | None:
        """Where training stands, if it went on."""
        before, self._told = self._told, self._step()
        return {"step": self._told} if self._told != before else None

    def _circumstances(self) -> dict[str, Any]:
        session = self._session
        return {
            "run": "" if session.run is None else session.run.name,
            "step": self._step(),
            "world_size": session.group.world_size,
            "policy": repr(self._policy),
            "memory": session.memory is not None,
            "host": platform.node(),
            "pid": os.getpid(),
            "library": __version__,
            "torch": torch.__version__,
        }


def _last_step(filesystem: Filesystem, directory: str) -> int | None:
    """How far the attempt before this one is known to have come."""
    try:
        events = read_events(filesystem, directory, latest=True)
    except (StorageError, OSError) as e:
        logger.warning("how many steps are made again is not known: %s", e)
        return None
    told = [event.fields.get("step") for event in events if event.kind in REACHED]
    return max((step for step in told if type(step) is int and 0 <= step < 2**63), default=None)


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"
