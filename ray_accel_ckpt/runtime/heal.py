"""Make a run directory startable again, and Ray's record of it complete.

Ray writes `checkpoint_manager_snapshot.json` in place. Cut off by a crash, or
naming a directory that is gone, it keeps every later driver from starting, and
Ray's advice is to lose the run. The checkpoints themselves are whole: the file
can be written again from them. And a driver may be lost between a checkpoint's
last byte and its being registered: then the file is older than the storage.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_accel_ckpt.errors import CheckpointError, ConfigurationError
from ray_accel_ckpt.runtime.record import (
    SNAPSHOT,
    State,
    empty_state,
    parsed,
    read_snapshot,
    registered_in,
)
from ray_accel_ckpt.storage.access import READ_TIMEOUT, listed
from ray_accel_ckpt.storage.catalog import candidates, open_snapshot, saved_by, step_of
from ray_accel_ckpt.storage.filesystem import Filesystem, resolve
from ray_accel_ckpt.storage.retry import retried

logger = logging.getLogger(__name__)

_WORST = sys.float_info.max


def heal_run(
    storage_path: str | os.PathLike[str],
    name: str,
    *,
    storage_filesystem: Any = None,
    checkpoint_config: Any = None,
) -> tuple[str, ...]:
    """Mend what keeps a new driver from going on with the run (storage_path, name).

    A torn snapshot file is kept beside as `<file>.torn` and written anew from
    the checkpoints that are whole; entries for directories that are gone are
    taken out; checkpoints that are whole and newer than the latest in the file
    are adopted: taken into it as if Ray had registered them, but for their
    metrics, which are lost; a score of NaN or infinity, which Ray writes as null
    and then fails to compare, becomes the worst number. Checkpoints are never
    touched. Cut off in the middle, it can be called again. Do not call it while the
    run is going.

    Args:
        checkpoint_config: the run's `ray.train.CheckpointConfig`. With a score
            in it, checkpoints whose metrics are lost rank below all others.

    Returns:
        What was mended, a sentence each; empty if nothing was wrong or there is no run.

    Raises:
        StorageError: the storage cannot be read or written.
    """
    filesystem, root = resolve(storage_path, storage_filesystem)
    run = f"{root}/{name}"
    found = heal(filesystem, run, score=Score.of(checkpoint_config))
    for each in found:
        logger.warning("%s: %s", run, each)
    return found


@dataclass(frozen=True, kw_only=True)
class Score:
    """The metric by which Ray ranks checkpoints, if it ranks them by one.

    Args:
        attribute: its name, ``"loss"``, or ``"eval/loss"`` for one inside of another; None
            if they rank by time.
        order: ``"min"`` or ``"max"``: which of them are the best.

    Raises:
        ConfigurationError: another order.
    """

    attribute: str | None = None
    order: str = "max"

    def __post_init__(self) -> None:
        if self.order not in ("min", "max"):
            raise ConfigurationError(f"the order of a score is min or max, not {self.order!r}")

    @classmethod
    def of(cls, checkpoint_config: Any) -> Score:
        """That of a `ray.train.CheckpointConfig`, or of None."""
        attribute = getattr(checkpoint_config, "checkpoint_score_attribute", None)
        if attribute is None:
            return cls()
        return cls(attribute=attribute, order=checkpoint_config.checkpoint_score_order)

    @property
    def worst(self) -> dict[str, float]:
        """What Ray is told of a checkpoint whose metrics are lost.

        Without the score Ray ranks it best if the order is "min"; infinities and NaN
        do not survive Ray's own writing. So the score is the worst there is in numbers.
        """
        if self.attribute is None:
            return {}
        return {self.attribute: _WORST if self.order == "min" else -_WORST}


_BY_TIME = Score()


def heal(
    filesystem: Filesystem, run: str, *, score: Score = _BY_TIME, dry_run: bool = False
) -> tuple[str, ...]:
    """`heal_run` for the run's directory on a filesystem.

    Args:
        dry_run: change nothing, and only say what would be mended.
    """
    sizes = {e.name: e.nbytes for e in listed(filesystem, run)}
    state, found, torn = empty_state(), [], None
    if SNAPSHOT in sizes:
        data = read_snapshot(filesystem, run, sizes[SNAPSHOT] or 0)
        read = parsed(data)
        if read is None:
            torn = data
            found.append("the snapshot file was torn: written anew")
        else:
            gone = set(registered_in(read)) - {n for n, nbytes in sizes.items() if nbytes is None}
            state = _without(read, gone)
            found += [f"checkpoint {each} is gone: taken out" for each in sorted(gone)]
    state, unranked = _ranked(state, score.worst)
    found += [f"checkpoint {each} has a score that is no number: ranked last" for each in unranked]
    adopted = _newer(filesystem, run, state)
    state = _with(state, adopted, score.worst)
    found += [f"checkpoint {each} is whole and was not registered: adopted" for each in adopted]
    if found and not dry_run:
        if torn is not None:
            _write(filesystem, f"{run}/{SNAPSHOT}.torn", torn)
        _write(filesystem, f"{run}/{SNAPSHOT}", json.dumps(state).encode())
    return tuple(found)


def _newer(filesystem: Filesystem, run: str, state: State) -> list[str]:
    """Checkpoints that are whole and newer than the latest in the record, oldest first.

    None of a run without Ray: it removes its own, and a record would name what is gone.
    """
    latest = state["latest_checkpoint_result"]
    step = -1 if latest is None else step_of(latest["checkpoint_dir_name"])
    known = set(registered_in(state))
    names = []
    for candidate in reversed(candidates(filesystem, run)):
        if saved_by(candidate.name) is None:
            continue
        if candidate.number <= step or candidate.name in known:
            continue
        try:
            open_snapshot(filesystem, candidate.path)
        except CheckpointError as e:
            logger.info("not adopted: %s", e)
            continue
        names.append(candidate.name)
    return names


def without_placeholders(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a registered checkpoint, but for what stands for those that are lost."""
    return {
        name: without_placeholders(value) if isinstance(value, Mapping) else value
        for name, value in metrics.items()
        if not (isinstance(value, float) and abs(value) == _WORST)
    }


def _with(state: State, names: list[str], metrics: dict[str, float]) -> State:
    """The record with checkpoints registered, one after the other, after all others."""
    if not names:
        return state
    results = [{"version": 0, "checkpoint_dir_name": n, "metrics": metrics} for n in names]
    begin = state["current_report_index"]
    indices = list(range(begin, begin + len(names)))
    known, known_indices = state["checkpoint_results"], state["checkpoint_report_indices"]
    # Ray's order is that of the score, the worst first; without a score, that of time.
    first = bool(metrics)
    return {
        **state,
        "checkpoint_results": results + known if first else known + results,
        "checkpoint_report_indices": indices + known_indices if first else known_indices + indices,
        "latest_checkpoint_result": results[-1],
        "current_report_index": begin + len(names),
    }


def _ranked(state: State, worst: dict[str, float]) -> tuple[State, list[str]]:
    """The record with the worst score for null, and whose score that was.

    Ray writes NaN and infinities as null, and fails at the first comparison with one
    in the next driver. Those that get the worst score come first, as in `_with`.
    """
    ranked, others, names = [], [], []
    for index, result in zip(
        state["checkpoint_report_indices"], state["checkpoint_results"], strict=True
    ):
        metrics = _without_null(result["metrics"], worst)
        if metrics == result["metrics"]:
            others.append((index, result))
        else:
            ranked.append((index, {**result, "metrics": metrics}))
            names.append(result["checkpoint_dir_name"])
    if not names:
        return state, []
    in_order = [*ranked, *others]
    latest = state["latest_checkpoint_result"]
    if latest is not None:
        latest = {**latest, "metrics": _without_null(latest["metrics"], worst)}
    return {
        **state,
        "checkpoint_results": [result for _, result in in_order],
        "checkpoint_report_indices": [index for index, _ in in_order],
        "latest_checkpoint_result": latest,
    }, names


def _without_null(metrics: dict[str, Any], worst: dict[str, float]) -> dict[str, Any]:
    """Metrics with the worst score in the place of null. Ray calls nested ones `a/b`."""
    filled: dict[str, Any] = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            prefix = f"{key}/"
            below = {n.removeprefix(prefix): s for n, s in worst.items() if n.startswith(prefix)}
            filled[key] = _without_null(value, below)
        else:
            filled[key] = worst.get(key) if value is None else value
    return filled


def _without(state: State, gone: set[str]) -> State:
    """The record without directories that are gone; the latest is the latest that is left."""
    if not gone:
        return state
    kept = [i for i, name in enumerate(registered_in(state)) if name not in gone]
    results = [state["checkpoint_results"][i] for i in kept]
    indices = [state["checkpoint_report_indices"][i] for i in kept]
    pending = [
        (result, spec)
        for result, spec in zip(
            state["pending_training_results"], state["pending_validation_specs"], strict=True
        )
        if result["checkpoint_dir_name"] not in gone
    ]
    latest = state["latest_checkpoint_result"]
    if latest is not None and latest["checkpoint_dir_name"] in gone:
        by_index = max(zip(indices, range(len(results)), strict=True), default=None)
        latest = results[by_index[1]] if by_index is not None else None
    return {
        **state,
        "checkpoint_results": results,
        "checkpoint_report_indices": indices,
        "latest_checkpoint_result": latest,
        "pending_training_results": [result for result, _ in pending],
        "pending_validation_specs": [spec for _, spec in pending],
    }


def _write(filesystem: Filesystem, path: str, data: bytes) -> None:
    retried(
        lambda: filesystem.write(path, [data]),
        what="mend a run directory",
        where=path,
        timeout=READ_TIMEOUT,
    )
