"""What each worker takes of a checkpoint that another number of workers has saved."""

from __future__ import annotations

from collections.abc import Iterable

from ray_accel_ckpt.image.reader import Snapshot
from ray_accel_ckpt.state.loader import PreparedLoader
from ray_accel_ckpt.state.part import SavedPart, require


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
