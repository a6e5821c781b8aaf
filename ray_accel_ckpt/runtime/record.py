"""Ray's own record of a run's checkpoints, `checkpoint_manager_snapshot.json`, as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_accel_ckpt.storage.access import listed, read_file
from ray_accel_ckpt.storage.catalog import step_of
from ray_accel_ckpt.storage.filesystem import Filesystem

SNAPSHOT = "checkpoint_manager_snapshot.json"

State = dict[str, Any]
"""The file's content, in the form that Ray gives it."""

_STATUS_LISTS = (
    "validated_checkpoint_dir_names",
    "timed_out_validation_checkpoint_dir_names",
    "failed_validation_checkpoint_dir_names",
)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What Ray knows of a run.

    Attributes:
        names: of every directory that the record mentions, for whatever reason.
        order: of the registered checkpoints that Ray keeps, as it came to know them.
        latest: the checkpoint registered last, if there is one.
        metrics: the latest's. NaN and infinities are None there: Ray writes them so.
    """

    names: frozenset[str]
    order: tuple[str, ...] = ()
    latest: str | None
    metrics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """The latest checkpoint's; -1 without one, or with one that this library did not name."""
        return -1 if self.latest is None else step_of(self.latest)


def read_record(filesystem: Filesystem, run: str) -> Record | None:
    """The record of the run's directory. An empty one if there is no file.

    Returns:
        None if the file cannot be understood: Ray is writing it at this moment, or a crash tore it.

    Raises:
        StorageError: it cannot be read.
    """
    nbytes = _length(filesystem, run)
    if nbytes is None:
        return Record(names=frozenset(), latest=None)
    try:
        state = parsed(read_snapshot(filesystem, run, nbytes))
    except (FileNotFoundError, EOFError):
        return None
    if state is None:
        return None
    latest = state["latest_checkpoint_result"]
    indices = state["checkpoint_report_indices"]
    in_order = sorted(zip(indices, registered_in(state), strict=True))
    return Record(
        names=frozenset(names_in(state)),
        order=tuple(name for _, name in in_order),
        latest=None if latest is None else str(latest["checkpoint_dir_name"]),
        metrics={} if latest is None else latest["metrics"],
    )


def has_record(filesystem: Filesystem, run: str) -> bool:
    """Whether there is such a file, good or torn."""
    return _length(filesystem, run) is not None


def read_snapshot(filesystem: Filesystem, run: str, nbytes: int) -> bytes:
    """The file's bytes. `nbytes` is its length as listed."""
    what = "read Ray's record of the run"
    return read_file(filesystem, f"{run}/{SNAPSHOT}", nbytes, what=what)


def parsed(data: bytes) -> State | None:
    """Ray's record, or None if it is not one it could load."""
    try:
        state = json.loads(data)
        names = registered_in(state)
        latest = state["latest_checkpoint_result"]
        known = latest is None or latest["checkpoint_dir_name"] in names
        even = len(names) == len(state["checkpoint_report_indices"])
        names_in(state)
        return state if even and known and "ray_version" in state else None
    except (ValueError, KeyError, TypeError):
        return None


def registered_in(state: State) -> list[str]:
    """The directories of the registered checkpoints, in Ray's order: the best last."""
    return [result["checkpoint_dir_name"] for result in state["checkpoint_results"]]


def names_in(state: State) -> set[str]:
    """Every directory that the record mentions."""
    pending = [r["checkpoint_dir_name"] for r in state.get("pending_training_results", ())]
    listed = [name for key in _STATUS_LISTS for name in state.get(key, ())]
    return {*registered_in(state), *pending, *listed}


def empty_state() -> State:
    """What Ray would write of a run without a checkpoint."""
    import ray

    return {
        "ray_version": ray.__version__,
        "checkpoint_results": [],
        "checkpoint_report_indices": [],
        "latest_checkpoint_result": None,
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": 0,
        **{key: [] for key in _STATUS_LISTS},
    }


def _length(filesystem: Filesystem, run: str) -> int | None:
    entries = listed(filesystem, run)
    return next((e.nbytes or 0 for e in entries if e.name == SNAPSHOT), None)
