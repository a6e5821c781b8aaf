"""A checkpoint as one file of `torch.save`, for scripts that know nothing else."""

from __future__ import annotations

import os
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import IO, Any

import torch

from ray_accel_ckpt.errors import (
    CheckpointExistsError,
    ConfigurationError,
    CorruptCheckpointError,
    UnsupportedStateError,
)
from ray_accel_ckpt.state.optimizer import OptimizerPart, positional
from ray_accel_ckpt.state.part import SavedPart
from ray_accel_ckpt.state.tree import tensor_refs, unflatten
from ray_accel_ckpt.storage.access import listed
from ray_accel_ckpt.storage.filesystem import Filesystem, resolve
from ray_accel_ckpt.storage.opened import StoredTensors, open_stored, part_of, shared_parts
from ray_accel_ckpt.storage.writer import write_file

_TIMEOUT = 600.0
_CHUNK = 8 * 2**20
_PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray)
_TORCH = (torch.Tensor, torch.dtype, torch.device, torch.Size)


def export_torch(
    checkpoint: Any,
    output_file: str | os.PathLike[str],
    *,
    parts: tuple[str, ...] | None = None,
) -> str:
    """Write a dict of the states of parts, which ``torch.load(..., weights_only=True)`` reads.

    Each state is what the object's own `load_state_dict` takes; an optimizer's numbers its
    parameters in the order they were given to it. Tensors are on the host; tied
    weights stay tied. Every byte is proved before it is written. The file appears whole.
    What each worker has for itself, its random streams say, has no one value and is left out.

    Host memory: once the parts. The file passes through this machine's temporary directory.

    Args:
        checkpoint: a path, a URI, or a `ray.train.Checkpoint`.
        output_file: a path or URI, ``model.pt``.
        parts: names of those to write. None: all that the workers share.

    Returns:
        The file's path.

    Raises:
        CheckpointExistsError: something is there already. Nothing is overwritten.
        UnsupportedStateError: a value that torch reads only by unpickling anything, by its place.
        ConfigurationError: no such part, or each worker has its own of it.
        CorruptCheckpointError, NotACheckpointError, FormatVersionError: see `open_checkpoint`.
        StorageError: what storage refused.
    """
    filesystem, path = resolve(output_file)
    _refuse_existing(filesystem, path)
    snapshot, fetch = open_stored(checkpoint)
    shared = shared_parts(snapshot)
    own = [name for name in parts or () if name in snapshot.per_rank_parts()]
    if own:
        raise ConfigurationError(
            f"each worker has a part {own[0]!r} of its own: which one is to be written?",
            where=snapshot.where,
            remedy=f"these are shared: {', '.join(shared)}",
        )
    tensors = StoredTensors(snapshot, fetch, 0)
    chosen = {name: part_of(snapshot, name, 0) for name in (shared if parts is None else parts)}
    states = {name: _state(name, saved, tensors) for name, saved in chosen.items()}
    with tempfile.TemporaryFile() as file:
        torch.save(states, file)
        write_file(
            filesystem,
            path,
            lambda: _chunks(file),
            what="write a file of torch.save",
            timeout=_TIMEOUT,
        )
    return path


def _state(name: str, saved: SavedPart, tensors: StoredTensors) -> Any:
    """One part's state. Of a tied weight the names share one tensor."""
    state = unflatten(saved.value, {ref: tensors[ref] for ref in tensor_refs(saved.value)})
    if saved.kind == OptimizerPart.kind:
        try:
            names = [each for group in state["groups"] for each in group["params"]]
            state = positional(state, names)
        except (LookupError, TypeError, AttributeError) as e:
            raise CorruptCheckpointError(
                "the state of an optimizer is not one that this library writes",
                where=name,
                why=f"{type(e).__name__}: {e}",
                remedy="use another checkpoint",
            ) from e
    _require_safe(state, name)
    return state


def _require_safe(value: Any, where: str) -> None:
    """What torch's own unpickler refuses would make a file that cannot be read safely."""
    if type(value) in (dict, OrderedDict, Counter):
        for key, member in value.items():
            _require_safe(key, f"{where}/key")
            _require_safe(member, f"{where}/{key}")
    elif type(value) in (list, tuple, set):
        for i, member in enumerate(value):
            _require_safe(member, f"{where}/{i}")
    elif type(value) not in (*_PLAIN, *_TORCH):
        kind = type(value)
        raise UnsupportedStateError(
            f"torch.load(weights_only=True) reads no {kind.__module__}.{kind.__qualname__}",
            where=where,
            why="it would have to unpickle it",
            remedy="leave this part out: name those to export",
        )


def _refuse_existing(filesystem: Filesystem, path: str) -> None:
    directory, _, name = path.rpartition("/")
    beside = {entry.name for entry in listed(filesystem, directory, timeout=_TIMEOUT)}
    if name in beside or listed(filesystem, path, timeout=_TIMEOUT):
        raise CheckpointExistsError(
            "the file to write is there already",
            where=path,
            remedy="give another name, or remove this one first",
        )


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    file.seek(0)
    while chunk := file.read(_CHUNK):
        yield chunk
