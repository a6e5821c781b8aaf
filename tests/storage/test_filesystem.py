"""One suite for every filesystem: what the rest of the library may rely on."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import gcsfs
import pyarrow.fs as pafs
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.storage.fakes import FaultyFilesystem, MemoryFilesystem, RecordingFilesystem
from ray_accel_ckpt.storage.filesystem import (
    ArrowFilesystem,
    Claim,
    Entry,
    Filesystem,
    LocalFilesystem,
    resolve,
    to_arrow,
)
from tests.storage.conftest import ANONYMOUS, BUCKET

Place = tuple[Filesystem, str]


def _local(request: pytest.FixtureRequest) -> Place:
    return LocalFilesystem(), str(request.getfixturevalue("tmp_path"))


def _memory(request: pytest.FixtureRequest) -> Place:
    return MemoryFilesystem(), "run"


def _wrapped(request: pytest.FixtureRequest) -> Place:
    return RecordingFilesystem(FaultyFilesystem(MemoryFilesystem())), "run"


def _subtree(request: pytest.FixtureRequest) -> Place:
    root = str(request.getfixturevalue("tmp_path"))
    return ArrowFilesystem(pafs.SubTreeFileSystem(root, pafs.LocalFileSystem())), "run"


def _arrow_local(request: pytest.FixtureRequest) -> Place:
    return ArrowFilesystem(pafs.LocalFileSystem()), str(request.getfixturevalue("tmp_path"))


def _fsspec_memory(request: pytest.FixtureRequest) -> Place:
    return resolve(f"memory://{secrets.token_hex(4)}/run")


def _s3(request: pytest.FixtureRequest) -> Place:
    return resolve(request.getfixturevalue("s3_uri")("run"))


def _gcs(request: pytest.FixtureRequest) -> Place:
    return resolve(request.getfixturevalue("gcs_uri")("run"))


def _gcsfs(request: pytest.FixtureRequest) -> Place:
    request.getfixturevalue("gcs")
    filesystem = gcsfs.GCSFileSystem(project="p", **ANONYMOUS)
    return resolve(f"{BUCKET}/{secrets.token_hex(4)}", filesystem)


PLACES = {
    "local": _local,
    "memory": _memory,
    "recording and faulty": _wrapped,
    "arrow subtree": _subtree,
    "arrow local": _arrow_local,
    "fsspec memory": _fsspec_memory,
    "s3": _s3,
    "gcs": _gcs,
    "gcsfs": _gcsfs,
}


@pytest.fixture(params=PLACES.values(), ids=PLACES.keys())
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    yield request.param(request)


def _read(filesystem: Filesystem, path: str, offset: int, nbytes: int) -> bytes:
    buffer = bytearray(nbytes)
    filesystem.read_into(path, offset, memoryview(buffer))
    return bytes(buffer)


def test_what_is_written_is_read(place: Place) -> None:
    filesystem, root = place
    filesystem.write(f"{root}/a", [b"one", memoryview(b"two"), b"", b"three"])
    assert _read(filesystem, f"{root}/a", 0, 11) == b"onetwothree"


def test_a_directory_that_holds_something_cannot_be_claimed(place: Place) -> None:
    filesystem, root = place
    assert filesystem.claim(f"{root}/one/a") is not Claim.TAKEN
    filesystem.write(f"{root}/one/a/b", [b"bytes"])
    assert filesystem.claim(f"{root}/one/a") is Claim.TAKEN
    assert filesystem.claim(f"{root}/one") is Claim.TAKEN


def test_a_copy_is_a_file_of_its_own(place: Place) -> None:
    filesystem, root = place
    filesystem.write(f"{root}/one/a", [b"bytes"])
    filesystem.copy(f"{root}/one/a", f"{root}/two/b")
    # Again, as after an error that came too late.
    filesystem.copy(f"{root}/one/a", f"{root}/two/b")
    filesystem.delete(f"{root}/one")
    assert filesystem.list(f"{root}/two") == [Entry(name="b", nbytes=5)]
    assert _read(filesystem, f"{root}/two/b", 0, 5) == b"bytes"


def test_of_an_absent_file_there_is_no_copy(place: Place) -> None:
    filesystem, root = place
    filesystem.write(f"{root}/one/a", [b"bytes"])
    with pytest.raises(OSError):
        filesystem.copy(f"{root}/one/b", f"{root}/one/c")
    assert [entry.name for entry in filesystem.list(f"{root}/one")] == ["a"]


def test_on_a_disk_a_copy_takes_no_room(tmp_path: Path) -> None:
    filesystem = LocalFilesystem()
    filesystem.write(f"{tmp_path}/a", [b"bytes"])
    filesystem.copy(f"{tmp_path}/a", f"{tmp_path}/b")
    assert (tmp_path / "a").samefile(tmp_path / "b")


def test_ranges_are_read(place: Place) -> None:
    filesystem, root = place
    data = bytes(range(200))
    filesystem.write(f"{root}/a", [data])
    for begin, end in [(0, 1), (0, 200), (7, 9), (199, 200), (50, 50), (200, 200)]:
        assert _read(filesystem, f"{root}/a", begin, end - begin) == data[begin:end]


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 6), (4, 2), (5, 1), (6, 1), (10**6, 10**3)])
def test_a_file_that_is_too_short(place: Place, offset: int, nbytes: int) -> None:
    filesystem, root = place
    filesystem.write(f"{root}/a", [b"12345"])
    with pytest.raises(EOFError, match="ends"):
        _read(filesystem, f"{root}/a", offset, nbytes)


def test_a_file_that_is_absent(place: Place) -> None:
    filesystem, root = place
    filesystem.write(f"{root}/a", [b"12345"])
    for name in ("b", "a2", "absent/a"):
        with pytest.raises(FileNotFoundError):
            _read(filesystem, f"{root}/{name}", 0, 1)


def test_an_empty_file(place: Place) -> None:
    filesystem, root = place
    filesystem.write(f"{root}/a", [])
    assert filesystem.list(root) == [Entry(name="a", nbytes=0)]
    assert _read(filesystem, f"{root}/a", 0, 0) == b""


def test_writing_again_replaces(place: Place) -> None:
    filesystem, root = place
    filesystem.write(f"{root}/a", [b"a long first version"])
    filesystem.write(f"{root}/a", [b"short"])
    assert filesystem.list(root) == [Entry(name="a", nbytes=5)]
    assert _read(filesystem, f"{root}/a", 0, 5) == b"short"


def test_an_absent_directory_lists_empty(place: Place) -> None:
    filesystem, root = place
    assert filesystem.list(f"{root}/never/made") == []


def test_a_directory_lists_what_lies_directly_in_it(place: Place) -> None:
    filesystem, root = place
    for name in ("b", "d/e/f", "d/g", "a", "da/x"):
        filesystem.write(f"{root}/{name}", [name.encode()])
    assert filesystem.list(root) == [
        Entry(name="a", nbytes=1),
        Entry(name="b", nbytes=1),
        Entry(name="d", nbytes=None),
        Entry(name="da", nbytes=None),
    ]
    assert filesystem.list(f"{root}/d") == [
        Entry(name="e", nbytes=None),
        Entry(name="g", nbytes=3),
    ]


def test_what_is_written_is_listed_at_once(place: Place) -> None:
    """Also after a listing that a client might have kept."""
    filesystem, root = place
    for n in range(3):
        assert [e.name for e in filesystem.list(root)] == [f"f{m}" for m in range(n)]
        filesystem.write(f"{root}/f{n}", [b"x"])


class _Remembering(MemoryFileSystem):
    """Keeps listings until it is told to forget them, as clients of object stores do."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self._listings: dict[str, Any] = {}

    def find(self, path: str, *args: Any, **kwargs: Any) -> Any:
        if path not in self._listings:
            self._listings[path] = super().find(path, *args, **kwargs)
        return self._listings[path]

    def invalidate_cache(self, path: str | None = None) -> None:
        self._listings.pop(str(path), None)


def test_what_another_has_written_is_listed_though_it_was_listed_before() -> None:
    ours, theirs = (ArrowFilesystem(to_arrow(_Remembering())) for _ in range(2))
    run = f"/{secrets.token_hex(4)}"
    ours.write(f"{run}/mine", [b"12"])
    assert [entry.name for entry in ours.list(run)] == ["mine"]
    theirs.write(f"{run}/theirs", [b"34"])
    assert [entry.name for entry in ours.list(run)] == ["mine", "theirs"]


def test_what_another_has_written_is_deleted_though_it_was_listed_before(gcs: str) -> None:
    del gcs  # the server they ask
    clients = (
        gcsfs.GCSFileSystem(project="p", skip_instance_cache=True, **ANONYMOUS) for _ in range(2)
    )
    ours, theirs = (ArrowFilesystem(to_arrow(client)) for client in clients)
    run = f"{BUCKET}/{secrets.token_hex(4)}"
    ours.write(f"{run}/mine", [b"12"])
    assert [entry.name for entry in ours.list(run)] == ["mine"]
    theirs.write(f"{run}/theirs", [b"34"])
    ours.delete(f"{run}/theirs")
    assert [entry.name for entry in theirs.list(run)] == ["mine"]


def test_a_deleted_file_is_gone(place: Place) -> None:
    filesystem, root = place
    for name in ("a", "b"):
        filesystem.write(f"{root}/{name}", [b"x"])
    filesystem.delete(f"{root}/a")
    assert filesystem.list(root) == [Entry(name="b", nbytes=1)]


def test_a_deleted_directory_is_gone_with_all_in_it(place: Place) -> None:
    filesystem, root = place
    for name in ("d/a", "d/e/f", "da/x", "b"):
        filesystem.write(f"{root}/{name}", [b"x"])
    filesystem.delete(f"{root}/d")
    assert [e.name for e in filesystem.list(root)] == ["b", "da"]
    assert filesystem.list(f"{root}/d") == []
    with pytest.raises(FileNotFoundError):
        _read(filesystem, f"{root}/d/a", 0, 1)


def test_deleting_what_is_absent_is_nothing(place: Place) -> None:
    filesystem, root = place
    filesystem.write(f"{root}/a", [b"x"])
    filesystem.delete(f"{root}/b")
    filesystem.delete(f"{root}/never/made")
    assert [e.name for e in filesystem.list(root)] == ["a"]


def test_a_file_of_several_chunks_larger_than_any_buffer(place: Place) -> None:
    filesystem, root = place
    chunks = [os.urandom(3 * 2**20 + 1) for _ in range(4)]
    filesystem.write(f"{root}/big", [memoryview(chunk) for chunk in chunks])
    data = b"".join(chunks)
    assert filesystem.list(root) == [Entry(name="big", nbytes=len(data))]
    assert _read(filesystem, f"{root}/big", 0, len(data)) == data
    assert _read(filesystem, f"{root}/big", 5 * 2**20, 2**20) == data[5 * 2**20 : 6 * 2**20]


def test_a_chunk_that_fails_is_raised(place: Place) -> None:
    """Whether a cut-off file is left may differ; what may not is that it goes unnoticed."""
    filesystem, root = place

    def chunks() -> Iterator[bytes]:
        yield b"first"
        raise KeyError("second")

    with pytest.raises(KeyError, match="second"):
        filesystem.write(f"{root}/a", chunks())
    filesystem.write(f"{root}/a", [b"whole"])
    assert _read(filesystem, f"{root}/a", 0, 5) == b"whole"


# --- the local disk ----------------------------------------------------------------------


def test_a_local_directory_is_claimed_once(tmp_path: Path) -> None:
    filesystem, path = LocalFilesystem(), f"{tmp_path}/runs/a"
    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(lambda _: filesystem.claim(path), range(8)))
    assert sorted(claim.value for claim in claims) == ["made"] + ["taken"] * 7
    (tmp_path / "a file").write_text("x")
    assert filesystem.claim(f"{tmp_path}/a file") is Claim.TAKEN
    with pytest.raises(FileExistsError):
        filesystem.claim(f"{tmp_path}/a file/below")


def test_a_local_file_cut_off_leaves_nothing(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"new"
        raise OSError(28, "No space left on device")

    place = tmp_path / "a"
    place.write_bytes(b"old")
    with pytest.raises(OSError, match="No space"):
        LocalFilesystem().write(str(place), chunks())
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert place.read_bytes() == b"old"


def test_a_local_file_is_synced_before_it_gets_its_name_and_its_directory_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    sync, replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_dir()))
        sync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        done.append(("rename", self.stat().st_size == 4))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    LocalFilesystem().write(str(tmp_path / "a"), [b"12", b"34"])
    assert done == [("sync", False), ("rename", True), ("sync", True), ("sync", True)]


@pytest.mark.parametrize("way", ["write", "copy", "claim"])
def test_new_directories_are_synced_in_those_that_they_are_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    filesystem = LocalFilesystem()
    (tmp_path / "source").write_bytes(b"x")
    synced, sync = set(), os.fsync

    def fsync(descriptor: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    one, two, three = tmp_path / "1", tmp_path / "1/2", tmp_path / "1/2/3"
    if way == "copy":
        filesystem.copy(f"{tmp_path}/source", f"{three}/a")
    else:
        if way == "claim":
            filesystem.claim(str(three))
            assert synced == {tmp_path, one}
        filesystem.write(f"{three}/a", [b"x"])
    assert synced >= {tmp_path, one, two, three}


def test_a_directory_above_that_cannot_be_read_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home/me").mkdir(parents=True)
    opened = os.open

    def open_(path: Any, *args: Any, **kwargs: Any) -> int:
        if Path(path).name == "home":
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_)
    LocalFilesystem().write(f"{tmp_path}/home/me/a", [b"x"])
    assert (tmp_path / "home/me/a").read_bytes() == b"x"


def test_a_write_that_the_kernel_does_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    LocalFilesystem().write(str(tmp_path / "a"), [b"0123456789"])
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_a_read_that_the_kernel_does_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, bufs, at: preadv(fd, [bufs[0][:3]], at))
    assert _read(LocalFilesystem(), str(tmp_path / "a"), 1, 8) == b"12345678"


# --- finding the filesystem --------------------------------------------------------------


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    for given, expected in [
        ("a/b", f"{tmp_path}/a/b"),
        (tmp_path / "c", f"{tmp_path}/c"),
        ("~/d", "/home/somebody/d"),
        (f"file://{tmp_path}/e/", f"{tmp_path}/e"),
        # pyarrow takes these for no URIs.
        (f"file://{tmp_path}/two words", f"{tmp_path}/two words"),
        (f"file://{tmp_path}/ü", f"{tmp_path}/ü"),
        (f"local://{tmp_path}/f", f"{tmp_path}/f"),
    ]:
        filesystem, path = resolve(given)
        assert isinstance(filesystem, LocalFilesystem)
        assert path == expected


@pytest.mark.parametrize(
    "filesystem",
    [
        pafs.LocalFileSystem(),
        fsspec.filesystem("file"),
        pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem("file"))),
    ],
)
def test_a_local_filesystem_that_is_given(tmp_path: Path, filesystem: Any) -> None:
    """Spoken to directly: fsspec and pyarrow neither fsync nor link."""
    found, path = resolve(f"{tmp_path}/x", filesystem)
    assert isinstance(found, LocalFilesystem)
    found.write(f"{path}/a", [b"x"])
    assert (tmp_path / "x/a").read_bytes() == b"x"


def test_an_unknown_scheme_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="no filesystem for nowhere://"):
        resolve("nowhere://x/y")


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("s3://bucket/run?endpoint_overide=localhost:9000", "endpoint_overide"),
        ("abfss://container@account/run?regoin=x", "regoin"),
    ],
)
def test_a_uri_with_a_mistake_in_it_is_told_by_that(uri: str, why: str) -> None:
    """And not by a package of fsspec's that is not installed, which would not help."""
    with pytest.raises(ConfigurationError, match="that can be opened") as caught:
        resolve(uri)
    assert why in caught.value.why


@pytest.mark.parametrize("scheme", ["s3", "s3a", "gs", "gcs", "abfs"])
@pytest.mark.parametrize("rest", ["", "/", "/run", "?region=x", "anonymous@", "anonymous@/run"])
def test_a_bucket_s_uri_without_a_bucket_is_refused_at_once(scheme: str, rest: str) -> None:
    """Clients ask the network for it, for minutes."""
    with pytest.raises(ConfigurationError, match="a URI without a bucket") as caught:
        resolve(f"{scheme}://{rest}")
    assert f"{scheme}://bucket/run" in caught.value.remedy


@pytest.mark.parametrize("scheme", ["file", "local"])
def test_a_host_in_the_uri_of_a_local_path_is_refused(scheme: str) -> None:
    """One slash is missing: it would be a path under the working directory."""
    with pytest.raises(ConfigurationError, match="does not begin with a slash") as caught:
        resolve(f"{scheme}://mnt/run")
    assert f"give {scheme}:///mnt/run" in caught.value.remedy


def test_something_else_is_no_filesystem() -> None:
    with pytest.raises(ConfigurationError, match=r"not a filesystem: builtins\.dict"):
        to_arrow({})
