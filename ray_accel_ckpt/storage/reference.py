"""References: a few bytes that stand for a checkpoint that lies elsewhere on the same storage.

    {"format":"ray_accel_ckpt.reference","version":1,"checkpoint":"../run/checkpoint_00000420_a1b2c3"}

The path is relative to the directory that holds the file, so that an experiment
can be moved as a whole. A reference names a checkpoint, never another reference.
"""

from __future__ import annotations

import posixpath
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ray_accel_ckpt.errors import CorruptCheckpointError, NotACheckpointError
from ray_accel_ckpt.storage.access import listed, read_file
from ray_accel_ckpt.storage.filesystem import Readable

REFERENCE: Final = "reference.json"
"""In a directory that stands for a checkpoint."""
ORIGIN: Final = "origin.json"
"""In the directory of a run that began from a checkpoint of another one."""
MAX_NBYTES = 2**16


class _Reference(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: Literal["ray_accel_ckpt.reference"] = "ray_accel_ckpt.reference"
    version: Literal[1] = 1
    checkpoint: Annotated[str, Field(min_length=1, max_length=4096)]


def encode(directory: str, checkpoint: str) -> bytes:
    """The bytes of a reference in `directory` to the checkpoint at path `checkpoint`."""
    relative = posixpath.relpath(checkpoint, directory)
    return _Reference(checkpoint=relative).model_dump_json().encode() + b"\n"


def decode(data: bytes, directory: str, where: str) -> str:
    """The path of the checkpoint that a reference in `directory` names.

    Raises:
        CorruptCheckpointError: it is not what `encode` writes.
    """
    try:
        relative = _Reference.model_validate_json(data).checkpoint
    except ValidationError as e:
        problem = e.errors(include_url=False, include_input=False, include_context=False)[0]
        raise _damaged(where, f"{problem['loc']}: {problem['msg']}") from e
    path = posixpath.normpath(f"{directory}/{relative}")
    whole = posixpath.normpath(relative) == relative and not relative.startswith("/")
    named = posixpath.basename(relative) not in ("", ".", "..") and "\0" not in relative
    if not (whole and named) or path.startswith(".."):
        raise _damaged(where, f"{relative!r} is no path to a checkpoint from here")
    return path


def read_reference(
    filesystem: Readable, directory: str, name: str = REFERENCE, *, timeout: float
) -> str | None:
    """The path that the file `name` in `directory` names; None if there is no such file.

    Raises:
        CorruptCheckpointError: it is damaged.
        StorageError: it could not be read.
    """
    entries = listed(filesystem, directory, timeout=timeout)
    nbytes = next((e.nbytes or 0 for e in entries if e.name == name), None)
    return None if nbytes is None else _read(filesystem, directory, name, nbytes, timeout)


def _read(filesystem: Readable, directory: str, name: str, nbytes: int, timeout: float) -> str:
    path = f"{directory}/{name}"
    if not 0 < nbytes <= MAX_NBYTES:
        raise _damaged(path, f"it has {nbytes} bytes, the limit is {MAX_NBYTES}")
    try:
        data = read_file(filesystem, path, nbytes, what="read a reference", timeout=timeout)
    except (FileNotFoundError, EOFError) as e:
        raise NotACheckpointError(
            "a reference is gone", where=path, why=str(e), remedy="use another checkpoint"
        ) from e
    return decode(data, directory, path)


def _damaged(where: str, why: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        "a reference to a checkpoint is damaged",
        where=where,
        why=why,
        remedy="use another checkpoint",
    )
