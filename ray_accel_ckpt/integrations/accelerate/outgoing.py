"""A checkpoint of ours made a folder that stock Accelerate loads."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ray_accel_ckpt.errors import (
    AccelCkptError,
    CheckpointExistsError,
    StorageError,
    UnsupportedStateError,
)
from ray_accel_ckpt.integrations.accelerate import streams
from ray_accel_ckpt.integrations.accelerate.folder import NewFolder
from ray_accel_ckpt.location import require_local
from ray_accel_ckpt.state.parts import RngPart
from ray_accel_ckpt.state.tree import tensor_refs, unflatten
from ray_accel_ckpt.storage.opened import StoredTensors, open_stored, part_of


def to_accelerate(checkpoint: Any, output_dir: str | os.PathLike[str]) -> str:
    """Write the folder that a stock `Accelerator.load_state` reads.

    Models (safetensors; of tied weights one, as Accelerate has it), optimizers,
    schedulers, the scaler, the random streams, and registered objects in the order of
    their registration: an accelerator that loads the folder has to register as many. Of
    what each worker has for itself rank 0's is taken. Positions in the data and gradients of
    an accumulation window have no place in it. Every byte is proved before it is written;
    the folder appears whole or not at all.

    Host memory: the largest part.

    Args:
        checkpoint: a path, a URI, or a `ray.train.Checkpoint`.
        output_dir: a new directory of this machine.

    Returns:
        The folder's absolute path.

    Raises:
        ConfigurationError: `output_dir` is a URI.
        CheckpointExistsError: `output_dir` holds something. Nothing is overwritten.
        UnsupportedStateError: a model with extra state, which is no tensor.
        CorruptCheckpointError, NotACheckpointError, FormatVersionError: see `open_checkpoint`.
        StorageError: it could not be written.
    """
    directory = require_local(output_dir, name="the folder")
    snapshot, fetch = open_stored(checkpoint)

    def state(name: str, rank: int = 0) -> Any:
        saved, tensors = part_of(snapshot, name, rank), StoredTensors(snapshot, fetch, rank)
        # Copies: with what is read come the bytes around it, and pickles have the whole memory.
        read = {ref: tensors[ref].clone() for ref in tensor_refs(saved.value)}
        return unflatten(saved.value, read)

    parts = snapshot.manifests[0].parts
    of_kind = {
        kind: [name for name, part in parts.items() if part.kind == kind]
        for kind in ("model", "optimizer", "scheduler", "scaler", "object")
    }
    step = state("accelerator")["step"] if "accelerator" in parts else 0
    with _appearing(directory) as path:
        folder = NewFolder(path=path)
        for i, name in enumerate(of_kind["model"]):
            folder.model(i, _once(state(name), name))
        for i, name in enumerate(of_kind["optimizer"]):
            folder.optimizer(i, _numbered(state(name)))
        for i, name in enumerate(of_kind["scheduler"]):
            folder.scheduler(i, state(name))
        for name in of_kind["scaler"]:
            folder.scaler(state(name))
        for rank in range(snapshot.world_size):
            folder.random_states(rank, streams.to_theirs(state(RngPart.name, rank), step=step))
        for i, name in enumerate(of_kind["object"]):
            folder.object(i, state(name))
    return str(directory)


def _once(state: Mapping[str, Any], part: str) -> dict[str, torch.Tensor]:
    """Each tensor under one of its names, since safetensors has no tied ones."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name in sorted(state):
        tensor = state[name]
        if not isinstance(tensor, torch.Tensor):
            raise UnsupportedStateError(
                "Accelerate's folder holds nothing but the tensors of a model",
                where=f"{part}/{name}",
                why="it is the extra state of a module",
                remedy="read it with open_checkpoint(...).state_dict(...)",
            )
        if id(tensor) not in seen:
            found[name] = tensor
            seen.add(id(tensor))
    return found


def _numbered(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state with numbers for names, in the order of its parameters."""
    names = [name for group in state["groups"] for name in group["params"]]
    number = {name: i for i, name in enumerate(names)}
    return {
        "state": {number.get(name, name): each for name, each in state["state"].items()},
        "param_groups": [
            {**group, "params": [number[name] for name in group["params"]]}
            for group in state["groups"]
        ],
        **state.get("extra", {}),
    }


@contextmanager
def _appearing(directory: Path) -> Iterator[Path]:
    """A new directory that becomes `directory` when all of it is written."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointExistsError(
            "the directory to write to is not empty",
            where=str(directory),
            remedy="convert to a new directory, or empty this one first",
        )
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".writing-") as temporary:
            path = Path(temporary, directory.name)
            path.mkdir()
            yield path
            path.replace(directory)
    except AccelCkptError:
        raise
    except (OSError, RuntimeError, SafetensorError) as e:
        raise StorageError(
            "the folder could not be written",
            where=str(directory),
            why=str(e),
            remedy="see whether there is space, and whether it may be written there",
        ) from e
