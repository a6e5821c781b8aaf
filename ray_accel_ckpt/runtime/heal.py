"""Make a run directory startable again.

Ray writes `checkpoint_manager_snapshot.json` in place. Cut off by a crash, or
naming a directory that is gone, it keeps every later driver from starting, and
Ray's advice is to lose the run. The checkpoints themselves are whole: the file
can be written again from them.
"""

from __future__ import annotations

import json
import logging
import os
from typing import Any

from ray_accel_ckpt.errors import CheckpointError
from ray_accel_ckpt.storage.catalog import READ_TIMEOUT, candidates, open_snapshot
from ray_accel_ckpt.storage.filesystem import Filesystem, resolve
from ray_accel_ckpt.storage.retry import retried

logger = logging.getLogger(__name__)

SNAPSHOT = "checkpoint_manager_snapshot.json"


def heal_run(
    storage_path: str | os.PathLike[str], name: str, *, storage_filesystem: Any = None
) -> tuple[str, ...]:
    """Mend what keeps a new driver from going on with the run (storage_path, name).

    A torn snapshot file is kept beside as `<file>.torn` and written anew from
    the checkpoints that are whole; entries for directories that are gone are
    taken out. Checkpoints are never touched. Do not call it while the run is going.

    Returns:
        What was mended, a sentence each; empty if nothing was wrong or there is no run.

    Raises:
        StorageError: the storage cannot be read or written.
    """
    filesystem, root = resolve(storage_path, storage_filesystem)
    run = f"{root}/{name}"
    sizes = {e.name: e.nbytes for e in _retried(lambda: filesystem.list(run), run)}
    if SNAPSHOT not in sizes:
        return ()
    data = _read(filesystem, f"{run}/{SNAPSHOT}", sizes[SNAPSHOT] or 0)
    state = _parsed(data)
    if state is None:
        state, mended = _rebuilt(filesystem, run), "the snapshot file was torn: written anew"
        _write(filesystem, f"{run}/{SNAPSHOT}.torn", data)
        found = [mended]
    else:
        gone = sorted(set(_named(state)) - {n for n, nbytes in sizes.items() if nbytes is None})
        if not gone:
            return ()
        state = _without(state, set(gone))
        found = [f"checkpoint {each} is gone: taken out of the snapshot file" for each in gone]
    _write(filesystem, f"{run}/{SNAPSHOT}", json.dumps(state).encode())
    for each in found:
        logger.warning("%s: %s", run, each)
    return tuple(found)


def _parsed(data: bytes) -> dict[str, Any] | None:
    """Ray's record, or None if it is not one it could load."""
    try:
        state = json.loads(data)
        results = state["checkpoint_results"]
        names = [result["checkpoint_dir_name"] for result in results]
        whole = len(names) == len(state["checkpoint_report_indices"])
        latest = state["latest_checkpoint_result"]
        known = latest is None or latest["checkpoint_dir_name"] in names
        return state if whole and known and "ray_version" in state else None
    except (ValueError, KeyError, TypeError):
        return None


def _rebuilt(filesystem: Filesystem, run: str) -> dict[str, Any]:
    """A record of all checkpoints of the run that are whole, oldest first."""
    import ray

    results = []
    for candidate in reversed(candidates(filesystem, run)):
        try:
            open_snapshot(filesystem, candidate.path)
        except CheckpointError as e:
            logger.info("not taken into the new snapshot file: %s", e)
            continue
        results.append({"version": 0, "checkpoint_dir_name": candidate.name, "metrics": {}})
    return {
        "ray_version": ray.__version__,
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(results))),
        "latest_checkpoint_result": results[-1] if results else None,
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(results),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }


def _named(state: dict[str, Any]) -> list[str]:
    return [result["checkpoint_dir_name"] for result in state["checkpoint_results"]]


def _without(state: dict[str, Any], gone: set[str]) -> dict[str, Any]:
    """The record without directories that are gone; the latest is the latest that is left."""
    kept = [i for i, name in enumerate(_named(state)) if name not in gone]
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


def _read(filesystem: Filesystem, path: str, nbytes: int) -> bytes:
    data = bytearray(nbytes)
    _retried(lambda: filesystem.read_into(path, 0, memoryview(data)), path)
    return bytes(data)


def _write(filesystem: Filesystem, path: str, data: bytes) -> None:
    _retried(lambda: filesystem.write(path, [data]), path)


def _retried(operation: Any, where: str) -> Any:
    return retried(operation, what="mend a run directory", where=where, timeout=READ_TIMEOUT)
