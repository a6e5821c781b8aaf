"""A checkpoint that no `Checkpointer` saves: made by one process, of states that are at hand."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from ray_accel_ckpt.image import partition, shard
from ray_accel_ckpt.image.image import Image, SaveInfo, parts_of
from ray_accel_ckpt.image.staging import Slot
from ray_accel_ckpt.state.part import Captured
from ray_accel_ckpt.storage.filesystem import Filesystem
from ray_accel_ckpt.storage.writer import refuse_other_checkpoint, write_image
from ray_accel_ckpt.version import __version__

_TIMEOUT = 600.0


class NewCheckpoint:
    """One to come, in a directory that holds none.

    Raises:
        CheckpointExistsError: a checkpoint is there. Nothing is overwritten.
        StorageError: what storage refused.
    """

    def __init__(self, filesystem: Filesystem, directory: str, *, step: int = 0) -> None:
        self._filesystem, self._directory, self._step = filesystem, directory, step
        self._attempt = secrets.token_hex(6)
        refuse_other_checkpoint(
            filesystem, directory, attempt=self._attempt, step=step, timeout=_TIMEOUT
        )

    def write(self, *ranks: Mapping[str, Captured], epoch: int = 0) -> None:
        """Write what each rank would have saved, one after the other. Durable when this returns,
        and no checkpoint until then.

        Args:
            ranks: the parts of each rank; those that are not a rank's own are the same in all.

        Raises:
            UnsupportedStateError: a tensor that the format does not have.
            StorageError: what storage refused.
        """
        slot = Slot()
        for rank, captured in enumerate(ranks):
            image = self._image(captured, slot, rank, len(ranks), epoch)
            write_image(self._filesystem, self._directory, image, timeout=_TIMEOUT)

    def _image(
        self, captured: Mapping[str, Captured], slot: Slot, rank: int, world_size: int, epoch: int
    ) -> Image:
        specs = partition.specs_of(captured, rank=rank, world_size=world_size)
        layout = shard.plan(partition.share(specs, rank=rank))
        tensors = {name: t for part in captured.values() for name, t in part.tensors.items()}
        info = SaveInfo(
            run="",
            attempt=self._attempt,
            step=self._step,
            epoch=epoch,
            rank=rank,
            world_size=world_size,
            plan=partition.plan_digest(specs, world_size=world_size),
            library=__version__,
        )
        data, parts = slot.fill(layout, tensors), parts_of(captured, rank=rank)
        return Image(info=info, layout=layout, data=data, parts=parts, wait=slot.copies.wait)
