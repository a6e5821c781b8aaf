"""What only Ray's controller sees of a run: checkpoints registered, workers that failed."""

from __future__ import annotations

import logging
from itertools import islice
from typing import TYPE_CHECKING, Any

from ray_accel_ckpt.storage.filesystem import Filesystem, resolve
from ray_accel_ckpt.storage.journal import Journal

if TYPE_CHECKING:
    from ray.train import Checkpoint, UserCallback
else:
    from ray.train import UserCallback

logger = logging.getLogger(__name__)

_LONGEST = 1000
"""Characters of an error, and"""
_MOST = 8
"""errors of one failure that are written down: of a thousand workers most say the same."""

_PATIENCE = 2.0
"""Seconds that the controller waits for an event to be written: the run may end after it, and
the controller with it."""


class ControllerEvents(UserCallback):  # type: ignore[misc]
    """Writes them down beside those of the attempts. `run_config` adds it.

    What goes wrong here is logged: raised, it would end the run.
    """

    def __init__(self) -> None:
        self._journal: Journal | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        """Ray has registered a checkpoint: from now on it is the run's latest."""
        if checkpoint is not None:
            self._tell(run_context, "registered", name=str(checkpoint.path).rpartition("/")[2])

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Workers have failed; Ray now decides whether to start them again."""
        told = islice(sorted(worker_exceptions.items(), key=lambda each: each[0]), _MOST)
        errors = {rank: _text(error) for rank, error in told}
        self._tell(run_context, "failure", errors=errors, workers=len(worker_exceptions))

    def _tell(self, run_context: Any, kind: str, **fields: Any) -> None:
        try:
            if self._journal is None:
                config = run_context.run_config
                self._journal = Journal(lambda: _place(config), writer="controller")
            self._journal.add(kind, **fields)
            self._journal.flush(_PATIENCE)
        except Exception:
            logger.exception("what Ray's controller knows of this run is not written down")


def _place(config: Any) -> tuple[Filesystem, str]:
    filesystem, root = resolve(config.storage_path, config.storage_filesystem)
    return filesystem, f"{root}/{config.name}"


def _text(error: BaseException) -> str:
    cause = getattr(error, "cause", None)
    shown = cause if isinstance(cause, BaseException) else error
    try:
        return f"{type(shown).__name__}: {shown}"[:_LONGEST]
    except Exception:
        logger.exception("an error of a worker cannot be shown")
        return type(shown).__name__
