"""What each worker takes of a checkpoint that other workers than these have saved."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from ray_accel_ckpt.image.reader import Snapshot
from ray_accel_ckpt.state.loader import PreparedLoader
from ray_accel_ckpt.state.part import SavedPart, require
from ray_accel_ckpt.state.parts import GradientPart

logger = logging.getLogger(__name__)


def dealt_anew(
    snapshot: Snapshot, loaders: Iterable[PreparedLoader], only: tuple[str, ...] | None
) -> dict[str, SavedPart]:
    """Loaders of which each old rank had a position of its own: every new rank gets one too.

    Args:
        only: names of parts for a partial start, or None for all.

    Raises:
        ElasticDataError: a loader's data cannot be dealt out to so many workers.
        CorruptCheckpointError: not every rank has saved a position.
    """
    dealt = {}
    for loader in loaders:
        name = loader.name
        first = snapshot.manifests[0].parts.get(name)
        wanted = only is None or name in only
        if first is None or not wanted or not first.per_rank or first.kind != loader.kind:
            continue
        parts = [manifest.parts.get(name) for manifest in snapshot.manifests]
        values = [part.value for part in parts if part is not None and part.kind == loader.kind]
        require(len(values) == snapshot.world_size, name, "not every rank has saved a position")
        dealt[name] = loader.dealt_anew(values)
    return dealt


def gradients_left_out(
    snapshot: Snapshot, saved: Mapping[str, SavedPart], gradients: GradientPart, world_size: int
) -> bool:
    """Whether an accumulation window that the save fell into begins anew; said in the log if so.

    What each worker had accumulated for itself cannot be dealt out to others.
    """
    if gradients.name not in snapshot.manifests[0].parts:
        return False
    if snapshot.world_size != world_size:
        why = f"it was saved by {snapshot.world_size} workers, and there are {world_size} now"
    elif gradients.name in saved and not gradients.fits(saved[gradients.name]):
        why = "the model is sharded now and was not then"
    else:
        return False
    logger.warning(
        "the checkpoint was saved inside an accumulation window, and %s: the gradients "
        "accumulated so far are left out, the window begins anew",
        why,
    )
    return True
