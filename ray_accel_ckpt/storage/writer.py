"""Write one image: the shard straight out of the staging buffer, then its manifest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from ray_accel_ckpt.errors import CheckpointError, CheckpointExistsError, StorageError
from ray_accel_ckpt.image import manifest as manifests
from ray_accel_ckpt.image.frozen import Frozen, Written
from ray_accel_ckpt.image.hashing import shard_info
from ray_accel_ckpt.image.image import Hashing, Image, SaveInfo
from ray_accel_ckpt.image.manifest import FrozenInfo, frozen_name, manifest_name, shard_name
from ray_accel_ckpt.storage.access import listed
from ray_accel_ckpt.storage.catalog import prove_file, read_manifest
from ray_accel_ckpt.storage.filesystem import Filesystem
from ray_accel_ckpt.storage.retry import making, retried

logger = logging.getLogger(__name__)

LINK_TIMEOUT = 30.0
"""Seconds that passing errors of a link, or of a copy by the server, are retried for."""


def write_image(
    filesystem: Filesystem,
    directory: str,
    image: Image,
    *,
    timeout: float,
    before_manifest: Callable[[], None] = lambda: None,
) -> None:
    """Make one rank's share durable. No peer is asked; the manifest is the last thing written.

    Cut off at any moment, it leaves a directory that does not count as a
    checkpoint; it never touches another one.

    Args:
        timeout: seconds that passing errors are retried for, each file for itself.
        before_manifest: called when the shard is durable; if it raises, there is no manifest.

    Raises:
        StorageError, StorageTimeoutError: naming the path, the cause and the remedy.
        TornSnapshotError: the image cannot be trusted. No manifest was written.
    """
    image.wait()
    info = image.info
    hashing = Hashing(image)
    shard = f"{directory}/{shard_name(info.rank, info.world_size)}"
    write_file(filesystem, shard, hashing.chunks, what="write a shard", timeout=timeout)
    before_manifest()
    write_rest(filesystem, directory, image, hashing, timeout=timeout)


def write_rest(
    filesystem: Filesystem, directory: str, image: Image, hashing: Hashing, *, timeout: float
) -> None:
    """As `write_image`, of a share whose shard is there already.

    Args:
        hashing: of this image; gone through.
    """
    info = image.info
    frozen = None
    if image.frozen is not None:
        name = frozen_name(info.rank, info.world_size)
        frozen = _write_frozen(filesystem, directory, name, image.frozen, timeout)
    manifest = f"{directory}/{manifest_name(info.rank, info.world_size)}"
    data = manifests.encode(hashing.manifest(frozen))
    write_file(filesystem, manifest, lambda: [data], what="write a manifest", timeout=timeout)


def _write_frozen(
    filesystem: Filesystem, directory: str, name: str, frozen: Frozen, timeout: float
) -> FrozenInfo:
    """Link to the file of frozen tensors that was written before, or write one."""
    path = f"{directory}/{name}"
    shard = shard_info(name, frozen.layout)
    known = frozen.known(filesystem, shard)
    if known is not None and _linked(filesystem, known, path, timeout):
        frozen.durable(filesystem, path, known.info, linked=True)
        return known.info
    file = frozen.file()
    write_file(filesystem, path, file.chunks, what="write frozen tensors", timeout=timeout)
    info = FrozenInfo(shard=shard, slices=file.slices())
    frozen.durable(filesystem, path, info, linked=False)
    return info


def _linked(filesystem: Filesystem, known: Written, path: str, timeout: float) -> bool:
    """Whether `path` is a link to, or a copy of, the known file. If not, a warning says why."""

    def copy() -> None:
        filesystem.copy(known.path, path)

    try:
        # Writing in full helps where this does not: it is not tried for long.
        retried(copy, what="link frozen tensors", where=path, timeout=min(timeout, LINK_TIMEOUT))
        if known.mark is None:
            # Another process wrote it, and somebody may have put another in its place since.
            prove_file(filesystem, path, known.info.shard, known.info.slices, timeout=timeout)
    except (StorageError, CheckpointError, FileNotFoundError) as e:
        logger.warning("writing frozen tensors in full: %s cannot be linked to: %s", known.path, e)
        return False
    return True


def refuse_other_checkpoint(
    filesystem: Filesystem, directory: str, *, attempt: str, step: int, timeout: float
) -> None:
    """Raise `CheckpointExistsError` if files of another save lie in `directory`.

    Files that other ranks have written for this very save are no obstacle.
    """
    entries = listed(filesystem, directory, timeout=timeout)
    for entry in entries:
        parsed = manifests.parse_name(entry.name)
        if parsed is None or parsed[0] != "manifest":
            continue
        path = f"{directory}/{entry.name}"
        try:
            found = read_manifest(filesystem, path, entry.nbytes, timeout=timeout)
            same = (found.attempt, found.step) == (attempt, step)
        except CheckpointError:
            same = False
        if not same:
            raise CheckpointExistsError(
                "the directory already holds files of another checkpoint",
                where=path,
                why="overwriting it would leave neither the old one nor the new one whole, "
                "if this process died on the way",
                remedy="save to a new directory, or delete this one first; "
                "ProjectConfiguration(automatic_checkpoint_naming=True) picks new names",
            )


def refuse_overwriting(
    filesystem: Filesystem, directory: str, info: SaveInfo, *, timeout: float
) -> None:
    """Raise `CheckpointExistsError` if this rank's manifest, or one of another world, is there.

    To be asked shortly before it is written: where storage cannot give a directory to one
    caller alone, another process may have been given the same.
    """
    for entry in listed(filesystem, directory, timeout=timeout):
        kind, rank, world_size = manifests.parse_name(entry.name) or ("", -1, -1)
        if kind == "manifest" and (rank == info.rank or world_size != info.world_size):
            raise CheckpointExistsError(
                "another process saves to the same directory",
                where=f"{directory}/{entry.name}",
                why="it was not there when this save began; it may be damaged now",
                remedy="see whether the script runs twice, and end one; give each run its own "
                "directory. ray-accel-ckpt verify tells whether the checkpoint is good",
            )


def write_file(
    filesystem: Filesystem,
    path: str,
    chunks: Callable[[], Iterable[memoryview | bytes]],
    *,
    what: str,
    timeout: float,
) -> None:
    """Make one file durable. Errors that may pass are retried, each time from its beginning.

    Raises:
        StorageError, StorageTimeoutError: naming the path, the cause and the remedy.
    """
    making(lambda: filesystem.write(path, chunks()), what=what, where=path, timeout=timeout)
