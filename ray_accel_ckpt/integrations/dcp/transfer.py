"""Directories for DCP's own files: where they are to lie, or on this disk on the way there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ray_accel_ckpt.errors import CheckpointExistsError, NotACheckpointError
from ray_accel_ckpt.storage.access import listed
from ray_accel_ckpt.storage.filesystem import Filesystem, LocalFilesystem, resolve
from ray_accel_ckpt.storage.retry import retried
from ray_accel_ckpt.storage.writer import write_file

METADATA = ".metadata"
_CHUNK = 8 * 2**20


@contextmanager
def fetched(source: str | os.PathLike[str], *, timeout: float) -> Iterator[Path]:
    """A directory of this machine with the files of a DCP checkpoint; a copy if it is remote.

    Raises:
        NotACheckpointError: DCP wrote nothing whole there.
        StorageError: it could not be read.
    """
    filesystem, directory = resolve(source)
    entries = listed(filesystem, directory, timeout=timeout)
    sizes = {entry.name: entry.nbytes for entry in entries if entry.nbytes is not None}
    if METADATA not in sizes:
        raise NotACheckpointError(
            "not a checkpoint of torch.distributed.checkpoint: no .metadata there",
            where=directory,
            why="the directory is absent, holds something else, or the save was cut off",
            remedy="give the directory that holds .metadata",
        )
    if isinstance(filesystem, LocalFilesystem):
        yield Path(directory)
        return
    with tempfile.TemporaryDirectory() as temporary:
        for name, nbytes in sizes.items():
            _fetch(filesystem, f"{directory}/{name}", Path(temporary) / name, nbytes, timeout)
        yield Path(temporary)


@contextmanager
def sent(output_dir: str | os.PathLike[str], *, timeout: float) -> Iterator[Path]:
    """An empty directory of this machine, whose files are in `output_dir` afterwards.

    Raises:
        CheckpointExistsError: something is there already.
        StorageError: what storage refused.
    """
    filesystem, directory = resolve(output_dir)
    entries = listed(filesystem, directory, timeout=timeout)
    if entries:
        raise CheckpointExistsError(
            "the directory to write to is not empty",
            where=f"{directory}/{entries[0].name}",
            remedy="convert to a new directory, or empty this one first",
        )
    if isinstance(filesystem, LocalFilesystem):
        yield Path(directory)
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)
        # Without its metadata a directory is no checkpoint: so that is the last to come.
        for file in sorted(Path(temporary).iterdir(), key=lambda p: (p.name == METADATA, p.name)):
            write_file(
                filesystem,
                f"{directory}/{file.name}",
                partial(_chunks, file),
                what="write a file of DCP",
                timeout=timeout,
            )


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            yield chunk


def _fetch(filesystem: Filesystem, path: str, target: Path, nbytes: int, timeout: float) -> None:
    with target.open("wb") as file:
        for begin in range(0, nbytes, _CHUNK):
            buffer = bytearray(min(_CHUNK, nbytes - begin))
            retried(
                partial(filesystem.read_into, path, begin, memoryview(buffer)),
                what="read a file of DCP",
                where=path,
                timeout=timeout,
            )
            file.write(buffer)
