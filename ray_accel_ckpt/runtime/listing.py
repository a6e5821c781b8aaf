"""The checkpoints of a run, and what Ray knows of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ray_accel_ckpt.runtime.record import has_record, read_record
from ray_accel_ckpt.storage.catalog import step_of
from ray_accel_ckpt.storage.filesystem import Filesystem
from ray_accel_ckpt.storage.survey import Condition, Surveyed, require_run, survey


class RecordState(StrEnum):
    """What Ray's own file about the run's checkpoints is like."""

    GOOD = "good"
    TORN = "torn"
    ABSENT = "absent"


@dataclass(frozen=True, kw_only=True)
class ListedCheckpoint(Surveyed):
    """A checkpoint of the run.

    Attributes:
        registered: whether Ray's record names it; False if there is no record.
        latest: whether it is the one that Ray has registered last.
    """

    registered: bool
    latest: bool


@dataclass(frozen=True, kw_only=True)
class RunListing:
    """All checkpoints of a run, the newest first."""

    run: str
    record: RecordState
    checkpoints: tuple[ListedCheckpoint, ...]


def list_run(filesystem: Filesystem, run: str) -> RunListing:
    """Look at every checkpoint of a run. Tensors are not read; nothing is changed.

    What Ray has registered and is gone is listed too.

    Raises:
        NotACheckpointError: it is no run's directory.
        StorageError: the storage cannot be read.
    """
    require_run_of_ray(filesystem, run)
    record = read_record(filesystem, run)
    state = RecordState.TORN
    if record is not None:
        state = RecordState.GOOD if has_record(filesystem, run) else RecordState.ABSENT
    names = record.names if record else frozenset()
    latest = record.latest if record else None
    found = survey(filesystem, run)
    gone = (
        Surveyed(
            name=name,
            path=f"{run}/{name}",
            condition=Condition.GONE,
            why="Ray's record names it, and there is no such directory",
        )
        for name in names - {each.name for each in found}
    )
    checkpoints = [
        ListedCheckpoint(**vars(each), registered=each.name in names, latest=each.name == latest)
        for each in (*found, *gone)
    ]
    # As `survey` has it.
    checkpoints.sort(key=lambda each: (step_of(each.name), each.name), reverse=True)
    return RunListing(run=run, record=state, checkpoints=tuple(checkpoints))


def require_run_of_ray(filesystem: Filesystem, run: str) -> None:
    """Raise unless there are checkpoints, or a record of some, in `run`.

    Raises:
        NotACheckpointError: there are neither.
        StorageError: the storage cannot be read.
    """
    if not has_record(filesystem, run):
        require_run(filesystem, run)
