"""Lightning's own checkpoints, written in this library's format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from ray_accel_ckpt.errors import CheckpointExistsError, ConfigurationError, NotACheckpointError
from ray_accel_ckpt.integrations.making import NewCheckpoint
from ray_accel_ckpt.state.model import ModelPart
from ray_accel_ckpt.state.part import Scope, captured_tree
from ray_accel_ckpt.state.tree import tensor_refs, unflatten
from ray_accel_ckpt.storage.filesystem import resolve
from ray_accel_ckpt.storage.opened import StoredTensors, open_stored, part_of

_MODEL, _REST = "model", "lightning"


class CheckpointerIO(CheckpointIO):  # type: ignore[misc]
    """``Trainer(plugins=[CheckpointerIO()])``: whatever Lightning saves is a checkpoint of ours.

    A path that Lightning names (``epoch=1-step=20.ckpt``, a URI too) becomes a directory. It is
    a checkpoint when all of it is durable and not before; every byte of it is proved when it
    is loaded; nothing is pickled. The weights are its part ``model``, the rest ``lightning``.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write what Lightning has put together; durable when this returns.

        Raises:
            UnsupportedStateError: a value that has no place in the format, by its place.
            CheckpointExistsError: a checkpoint is there. Nothing is overwritten.
            ConfigurationError: `storage_options` are given.
            StorageError: what storage refused.
        """
        _refuse(storage_options, "storage_options")
        rest = dict(checkpoint)
        parts = {_REST: (rest, "object")}
        if "state_dict" in rest:
            parts[_MODEL] = (rest.pop("state_dict"), ModelPart.kind)
        captured = {
            name: captured_tree(state, name=name, kind=kind, scope=Scope.RANK_ZERO)
            for name, (state, kind) in parts.items()
        }
        filesystem, directory = resolve(path)
        try:
            made = NewCheckpoint(filesystem, directory, step=int(rest.get("global_step", 0)))
        except CheckpointExistsError as e:
            raise CheckpointExistsError(
                "Lightning would overwrite a checkpoint",
                where=directory,
                why="if this process died on the way, neither of the two would be whole",
                remedy="put {step} in the filename of ModelCheckpoint, and with save_last=True set "
                'its CHECKPOINT_NAME_LAST = "last-{step}"',
            ) from e
        made.write(captured, epoch=int(rest.get("epoch", 0)))

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """What was saved, on the host. Every byte that is returned has been proved.

        Args:
            weights_only: makes no difference: nothing is unpickled.

        Raises:
            NotACheckpointError, CorruptCheckpointError, FormatVersionError: see `open_checkpoint`.
            ConfigurationError: `map_location` is given.
        """
        _refuse(map_location, "map_location")
        snapshot, fetch = open_stored(path)
        tensors = StoredTensors(snapshot, fetch, 0)
        names = snapshot.manifests[0].parts
        if _REST not in names:
            raise NotACheckpointError(
                "this is no checkpoint of Lightning's",
                where=snapshot.where,
                why=f"it has {', '.join(names)}",
                remedy="load it with CheckpointerCallback, or Checkpointer.load_state",
            )
        state = {name: _read(part_of(snapshot, name, 0).value, tensors) for name in names}
        model = {"state_dict": state[_MODEL]} if _MODEL in state else {}
        return {**state[_REST], **model}

    def remove_checkpoint(self, path: Any) -> None:
        """Remove it. Cut off anywhere, what is left is no checkpoint."""
        filesystem, directory = resolve(path)
        names = [e.name for e in filesystem.list(directory) if e.nbytes is not None]
        for name in sorted(names, key=lambda name: not name.startswith("manifest-")):
            filesystem.delete(f"{directory}/{name}")
        filesystem.delete(directory)


def _read(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    return unflatten(value, {name: tensors[name] for name in tensor_refs(value)})


def _refuse(option: Any, name: str) -> None:
    if option is not None:
        raise ConfigurationError(
            f"CheckpointerIO has no use for {name}",
            why="paths are URIs, and states are loaded to the host",
            remedy="leave it out",
        )
