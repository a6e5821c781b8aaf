"""The one seam to where bytes lie: six operations on paths.

`LocalFilesystem` for disks, `ArrowFilesystem` for whatever pyarrow speaks (S3,
GCS, HDFS, and any fsspec filesystem in pyarrow's wrapping). `storage.fakes` has
two more for tests.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
from fsspec.implementations.local import LocalFileSystem

from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.location import require_location
from ray_accel_ckpt.storage.anonymous import is_anonymous_s3, open_anonymous_s3

_OBJECT_STORE = re.compile(r"\b(s3a?|gcs|gs|abfss?|az|adl|oss)\b")
_BY_ARROW = ("s3", "gs", "gcs", "abfs", "abfss")
"""Schemes of buckets that pyarrow has clients for."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing in a directory: `nbytes` is None for a directory.

    Attributes:
        modified: when a file was last written, in seconds since the epoch; None if the
            storage does not tell.
    """

    name: str
    nbytes: int | None
    modified: float | None = field(default=None, compare=False)


class Readable(Protocol):
    """Where checkpoints can be read. Errors are `OSError`s or what the client raises."""

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on. Raises `EOFError` if the file is too short."""
        ...

    def list(self, path: str) -> list[Entry]:
        """What lies directly in the directory `path`; nothing if it does not exist."""
        ...


class Claim(Enum):
    """What came of claiming a directory."""

    MADE = "made"
    """It was not there. Of several that claim it at once, one alone is told so."""
    TAKEN = "taken"
    """Something is there."""
    FREE = "free"
    """Nothing is there, and nothing was made. Others that claim it at once may be told the same."""


class Filesystem(Readable, Protocol):
    """Storage as this library uses it."""

    def claim(self, path: str) -> Claim:
        """Make the directory `path`, and those above it, for whoever comes first.

        A directory is durable with the first file in it. `Claim.FREE` is the answer of
        storage that has no directories, or no way to make one for a single caller.
        """
        ...

    def write(self, path: str, chunks: Iterable[memoryview | bytes]) -> None:
        """Create the file `path` of these bytes, and the directories above it.

        When it returns, the file is durable as far as the storage can tell. If it
        raises, or the process dies, the file may be absent, whole or, on some
        storage, cut off.
        """
        ...

    def copy(self, source: str, path: str) -> None:
        """Make the file `path`, and the directories above it, of the bytes of the file `source`.

        The bytes stay where they are: a hard link on disks, a copy by the server on
        object stores. Neither file changes or goes with the other. Durable when it
        returns. Where storage cannot do that, it raises, and nothing is there.
        """
        ...

    def delete(self, path: str) -> None:
        """Remove a file, or a directory with all in it. Absent is as good as removed."""
        ...


@dataclass(frozen=True)
class LocalFilesystem:
    """A disk of this machine or one that is mounted.

    A file appears whole or not at all, by renaming. It is fsynced, and so are its directory,
    the one above that, which may have been made by `claim`, and those above new ones.

    fsync is skipped on memory-backed filesystems by the kernel itself.
    """

    def claim(self, path: str) -> Claim:
        target = Path(path)
        _fsync_above(_make(target.parent))
        try:
            target.mkdir()
        except FileExistsError:
            return Claim.TAKEN
        return Claim.MADE

    def write(self, path: str, chunks: Iterable[memoryview | bytes]) -> None:
        target = Path(path)
        made = _make(target.parent)
        # Under another name until it is whole: a peer that looks must not find half a manifest.
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(partial, flags, 0o644)
        try:
            try:
                for chunk in chunks:
                    rest = memoryview(chunk)
                    while rest:
                        rest = rest[os.write(descriptor, rest) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            partial.replace(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _fsync_directory(target.parent)
        _fsync_above({target.parent, *made})

    def copy(self, source: str, path: str) -> None:
        target = Path(path)
        made = _make(target.parent)
        # Tried again after an error that came too late: what is there may be what is wanted.
        if not target.exists() or not target.samefile(source):
            target.unlink(missing_ok=True)
            target.hardlink_to(source)
        _fsync_directory(target.parent)
        _fsync_above({target.parent, *made})

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        # Without O_NONBLOCK, a pipe under the name of a file would be waited for, for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            done = 0
            while done < len(buffer):
                got = os.preadv(descriptor, [buffer[done:]], offset + done)
                if got == 0:
                    raise _too_short(path, offset, len(buffer), done)
                done += got
        finally:
            os.close(descriptor)

    def list(self, path: str) -> list[Entry]:
        try:
            with os.scandir(path) as found:
                return sorted((_local_entry(e) for e in found), key=lambda e: e.name)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def delete(self, path: str) -> None:
        target = Path(path)
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target, ignore_errors=False, onerror=_ignore_absent)
        else:
            target.unlink(missing_ok=True)


@dataclass(frozen=True)
class ArrowFilesystem:
    """Any `pyarrow.fs.FileSystem`. An object appears whole or not at all."""

    filesystem: pafs.FileSystem

    def claim(self, path: str) -> Claim:
        return Claim.TAKEN if self.list(path) else Claim.FREE

    def write(self, path: str, chunks: Iterable[memoryview | bytes]) -> None:
        if _has_directories(self.filesystem):
            self.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        # Should a chunk fail, closing may leave a cut-off object. It is written anew by the
        # next try, and a shard counts for nothing before its manifest is there.
        with self.filesystem.open_output_stream(path) as stream:
            for chunk in chunks:
                stream.write(chunk)

    def copy(self, source: str, path: str) -> None:
        if _has_directories(self.filesystem):
            self.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        self.filesystem.copy_file(source, path)

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        with self.filesystem.open_input_file(path) as file:
            # Known since opening. What reading beyond it raises differs from client to client.
            size = file.size()
            if offset + len(buffer) > size:
                raise _too_short(path, offset, len(buffer), max(0, size - offset))
            done = 0
            while done < len(buffer):
                data = file.read_at(len(buffer) - done, offset + done)
                if not data:
                    raise _too_short(path, offset, len(buffer), done)
                buffer[done : done + len(data)] = data
                done += len(data)

    def list(self, path: str) -> list[Entry]:
        _forget_listings(self.filesystem, path)
        # pyarrow's GCS client does not tell of directories that only their files make.
        deep = self.filesystem.type_name == "gcs"
        selector = pafs.FileSelector(path, allow_not_found=True, recursive=deep)
        found: dict[str, Entry] = {}
        for info in self.filesystem.get_file_info(selector):
            name = info.base_name or info.path.rstrip("/").rpartition("/")[2]
            is_file = info.type != pafs.FileType.Directory
            if deep:
                name, below, _ = info.path.removeprefix(f"{path}/").rstrip("/").partition("/")
                is_file = is_file and not below
            found[name] = _arrow_entry(name, info) if is_file else Entry(name=name, nbytes=None)
        return [found[name] for name in sorted(found)]

    def delete(self, path: str) -> None:
        _forget_listings(self.filesystem, path)
        info = self.filesystem.get_file_info(path)
        try:
            if info.type == pafs.FileType.Directory:
                self.filesystem.delete_dir(path)
            elif info.type == pafs.FileType.File:
                self.filesystem.delete_file(path)
        except FileNotFoundError:
            return


def wrap(filesystem: pafs.FileSystem) -> Filesystem:
    """The seam over a pyarrow filesystem. Local disks are spoken to directly, to fsync."""
    if _is_local(filesystem):
        return LocalFilesystem()
    return ArrowFilesystem(filesystem)


def resolve(location: str | os.PathLike[str], filesystem: Any = None) -> tuple[Filesystem, str]:
    """A path, a URI (``s3://``, ``gs://``, ``memory://``, ...) or a path on `filesystem`.

    Args:
        location: local paths may be relative and may begin with ``~``.
        filesystem: a `pyarrow.fs.FileSystem` or an fsspec filesystem that
            `location` is a path on.

    Raises:
        ConfigurationError: no installed package knows the URI's scheme; an empty location, or
            one that is none.
    """
    if filesystem is not None:
        path = os.fspath(location)
        found = to_arrow(filesystem)
        if _is_local(found):
            path = LocalFileSystem._strip_protocol(path)
        return wrap(found), path.rstrip("/")
    path = require_location(location)
    scheme, separator, _ = path.partition("://")
    if not separator:
        return LocalFilesystem(), str(Path(path).expanduser().absolute())
    try:
        if is_anonymous_s3(path):
            found, inner = open_anonymous_s3(path)
        else:
            found, inner = pafs.FileSystem.from_uri(path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as e:
        found, inner = _through_fsspec(path, scheme, refused=str(e))
    return wrap(found), inner.rstrip("/")


def to_arrow(filesystem: Any) -> pafs.FileSystem:
    """A pyarrow filesystem as it is, an fsspec one wrapped."""
    if isinstance(filesystem, pafs.FileSystem):
        return filesystem
    if isinstance(filesystem, fsspec.AbstractFileSystem):
        return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem))
    raise ConfigurationError(
        f"not a filesystem: {type(filesystem).__module__}.{type(filesystem).__qualname__}",
        remedy="pass a pyarrow.fs.FileSystem or an fsspec filesystem",
    )


def _is_local(filesystem: pafs.FileSystem) -> bool:
    """Whether it is this machine's disks, by pyarrow or by fsspec in pyarrow's wrapping."""
    handler = getattr(filesystem, "handler", None)
    by_fsspec = isinstance(handler, pafs.FSSpecHandler) and isinstance(handler.fs, LocalFileSystem)
    return by_fsspec or isinstance(filesystem, pafs.LocalFileSystem)


def _forget_listings(filesystem: pafs.FileSystem, path: str) -> None:
    """Have a directory, and those above it, be asked for anew.

    fsspec's clients of object stores keep listings until they write there themselves. What other
    ranks have written would stay unseen, and a checkpoint that is whole pass for one that is not.
    """
    handler = getattr(filesystem, "handler", None)
    if isinstance(handler, pafs.FSSpecHandler):
        handler.fs.invalidate_cache(path)


def _through_fsspec(uri: str, scheme: str, *, refused: str) -> tuple[pafs.FileSystem, str]:
    """By fsspec what pyarrow refused, and by what."""
    try:
        found, inner = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as e:
        if scheme in _BY_ARROW:
            # A package more would not help: the URI is wrong, an option or the bucket's name.
            raise ConfigurationError(
                f"not a {scheme}:// URI that can be opened",
                where=uri,
                why=refused,
                remedy="see the name of the bucket, and the options after the ?",
            ) from e
        raise ConfigurationError(
            f"no filesystem for {scheme}:// URIs",
            where=uri,
            why=str(e),
            remedy=f"install the fsspec package for {scheme}, or pass a path this machine knows",
        ) from e
    return to_arrow(found), inner


def _has_directories(filesystem: pafs.FileSystem) -> bool:
    """Object stores have none: making one would leave an empty object or ask for a bucket."""
    return _OBJECT_STORE.search(filesystem.type_name) is None


def _arrow_entry(name: str, info: pafs.FileInfo) -> Entry:
    modified = None if info.mtime_ns is None else info.mtime_ns / 1e9
    return Entry(name=name, nbytes=info.size, modified=modified)


def _local_entry(entry: os.DirEntry[str]) -> Entry:
    try:
        if entry.is_dir():
            return Entry(name=entry.name, nbytes=None)
        status = entry.stat()
        return Entry(name=entry.name, nbytes=status.st_size, modified=status.st_mtime)
    except OSError as e:
        # Removed between listing and asking, or a link to nowhere: nothing to read there.
        if isinstance(e, FileNotFoundError) or entry.is_symlink():
            return Entry(name=entry.name, nbytes=0)
        raise


def _ignore_absent(function: Any, path: str, info: Any) -> None:
    if not isinstance(info[1], FileNotFoundError):
        raise info[1]


def _make(directory: Path) -> list[Path]:
    """Make a directory and those above it; which were not there before."""
    missing = list(takewhile(lambda each: not each.exists(), (directory, *directory.parents)))
    directory.mkdir(parents=True, exist_ok=True)
    return missing


def _fsync_above(directories: Iterable[Path]) -> None:
    """Make the names of directories durable in those that they are in."""
    for parent in {directory.parent for directory in directories}:
        try:
            _fsync_directory(parent)
        except PermissionError:
            # Not to be read by us, so what is in it was hardly made by us.
            continue


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as e:
        # Some network filesystems have no such call; the file itself is synced.
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _too_short(path: str, offset: int, wanted: int, got: int) -> EOFError:
    return EOFError(f"{path} ends {wanted - got} bytes before byte {offset + wanted}")
