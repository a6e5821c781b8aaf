"""A checkpoint that no `Checkpointer` saves: made by one process out of somebody else's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray_accel_ckpt.image import partition, shard
from ray_accel_ckpt.image.image import Image, SaveInfo, parts_of
from ray_accel_ckpt.image.staging import Slot
from ray_accel_ckpt.state.part import Captured
from ray_accel_ckpt.storage.filesystem import Filesystem
from ray_accel_ckpt.storage.writer import write_image
from ray_accel_ckpt.version import __version__


def write_checkpoint(
    filesystem: Filesystem,
    directory: str,
    ranks: Sequence[Mapping[str, Captured]],
    *,
    attempt: str,
    timeout: float,
) -> None:
    """Write what each rank would have saved, one after the other.

    Args:
        ranks: the parts of each rank; those that are not a rank's own are the same in all.
        attempt: what `refuse_other_checkpoint` was asked with.

    Raises:
        UnsupportedStateError: a tensor that the format does not have.
        StorageError: what storage refused.
    """
    slot, world_size = Slot(), len(ranks)
    for rank, captured in enumerate(ranks):
        specs = partition.specs_of(captured, rank=rank, world_size=world_size)
        layout = shard.plan(partition.share(specs, rank=rank))
        tensors = {name: t for part in captured.values() for name, t in part.tensors.items()}
        info = SaveInfo(
            run="",
            attempt=attempt,
            step=0,
            epoch=0,
            rank=rank,
            world_size=world_size,
            plan=partition.plan_digest(specs, world_size=world_size),
            library=__version__,
        )
        data = slot.fill(layout, tensors)
        image = Image(
            info=info,
            layout=layout,
            data=data,
            parts=parts_of(captured, rank=rank),
            wait=slot.copies.wait,
        )
        write_image(filesystem, directory, image, timeout=timeout)
