"""Whole DCP checkpoints on this disk, read and written by this process alone."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict, unflatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ray_accel_ckpt.errors import CorruptCheckpointError, StorageError, UnsupportedStateError


def read_whole(directory: Path) -> dict[str, Any]:
    """All of a checkpoint, nested as it was saved. Unpickles what it finds there.

    Raises:
        CorruptCheckpointError: DCP cannot read it.
    """
    try:
        reader = FileSystemReader(directory)
        metadata = reader.read_metadata()
        flat: dict[str, Any] = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
            if isinstance(entry, TensorStorageMetadata)
            else None
            for name, entry in metadata.state_dict_metadata.items()
        }
        with _without_word_of_being_one():
            load(flat, storage_reader=reader, no_dist=True)
        paths = metadata.planner_data
        return unflatten_state_dict(flat, paths) if paths else flat
    except (
        *(CheckpointException, pickle.UnpicklingError, OSError, EOFError),
        *(AttributeError, LookupError, ImportError, TypeError, ValueError),
    ) as e:
        raise CorruptCheckpointError(
            "torch.distributed.checkpoint cannot read its checkpoint",
            where=str(directory),
            why=_causes(e) if isinstance(e, CheckpointException) else f"{type(e).__name__}: {e}",
            remedy="use another checkpoint, or the version of torch that wrote this one",
        ) from e


def write_whole(state: dict[str, Any], directory: Path) -> None:
    """Save `state` as a checkpoint of its own.

    Raises:
        UnsupportedStateError: DCP would not give the same names and values back.
        StorageError: it could not be written.
    """
    for name, value in state.items():
        _require_text(value, name)
    try:
        flatten_state_dict(state)
    except ValueError as e:
        raise UnsupportedStateError(
            "DCP cannot tell two values apart",
            why=str(e),
            remedy="leave this part out: to_dcp(..., parts=...)",
        ) from e
    writer = FileSystemWriter(directory, overwrite=False)
    try:
        with _without_word_of_being_one():
            save(state, storage_writer=writer, no_dist=True)
    except CheckpointException as e:
        raise StorageError(
            "torch.distributed.checkpoint could not write the checkpoint",
            where=str(directory),
            why=_causes(e),
            remedy="see whether there is space; convert to a new directory then",
        ) from e


def _causes(error: CheckpointException) -> str:
    """What DCP failed by. As text it is a traceback, which is for whoever writes DCP."""
    causes = [cause for cause, _ in error.failures.values()]
    return "; ".join(f"{type(each).__name__}: {each}" for each in causes)


def _require_text(value: Any, where: str) -> None:
    """DCP makes every key of a dict a text: number 1 would come back as "1"."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            if type(key) is not str:
                raise UnsupportedStateError(
                    f"DCP has no dict with the key {key!r}",
                    where=where,
                    why="it would come back as a text",
                    remedy="leave this part out: to_dcp(..., parts=...)",
                )
            _require_text(each, f"{where}/{key}")
    elif isinstance(value, list):
        for i, each in enumerate(value):
            _require_text(each, f"{where}/{i}")


@contextmanager
def _without_word_of_being_one() -> Iterator[None]:
    """DCP warns that only one process takes part: that is what is wanted here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
