"""What only Ray's controller sees of a run: checkpoints registered, workers that failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray_accel_ckpt.storage.filesystem import resolve
from ray_accel_ckpt.storage.journal import Journal

if TYPE_CHECKING:
    from ray.train import Checkpoint, UserCallback
else:
    from ray.train import UserCallback

_LONGEST = 1000
"""Characters of an error."""

_PATIENCE = 2.0
"""Seconds that the controller waits for an event to be written: the run may end after it, and
the controller with it."""


class ControllerEvents(UserCallback):  # type: ignore[misc]
    """Writes them down beside those of the attempts. `run_config` adds it."""

    def __init__(self) -> None:
        self._journal: Journal | None = None

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        """Ray has registered a checkpoint: from now on it is the run's latest."""
        if checkpoint is not None:
            self._tell(run_context, "registered", name=str(checkpoint.path).rpartition("/")[2])

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Workers have failed; Ray now decides whether to start them again."""
        errors = {rank: _text(error) for rank, error in sorted(worker_exceptions.items())}
        self._tell(run_context, "failure", errors=errors)

    def _tell(self, run_context: Any, kind: str, **fields: Any) -> None:
        if self._journal is None:
            config = run_context.run_config
            filesystem, root = resolve(config.storage_path, config.storage_filesystem)
            self._journal = Journal(filesystem, f"{root}/{config.name}", writer="controller")
        self._journal.add(kind, **fields)
        self._journal.flush(_PATIENCE)


def _text(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {cause}"[:_LONGEST]
