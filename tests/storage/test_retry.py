"""What may pass is tried again; what will not is said at once; nothing older is touched."""

from __future__ import annotations

import errno
import logging
import random
from collections.abc import Callable

import pytest
import torch
from torch import nn

from ray_accel_ckpt import Checkpointer
from ray_accel_ckpt.errors import StorageError, StorageTimeoutError
from ray_accel_ckpt.image import hashing as images
from ray_accel_ckpt.storage.fakes import Fault, FaultyFilesystem, MemoryFilesystem
from ray_accel_ckpt.storage.filesystem import Filesystem
from ray_accel_ckpt.storage.retry import may_pass, retried
from ray_accel_ckpt.storage.writer import write_image
from tests.helpers_image import RUN, Small, newest, opened, save, small_image

pytestmark = pytest.mark.usefixtures("no_waits")

NEW = f"{RUN}/checkpoint_2"


class _HttpError(Exception):
    """What an fsspec client raises."""

    def __init__(self, status: int) -> None:
        super().__init__("something of the server's")
        self.status = status


PASSING = [
    OSError(
        "When uploading part for key 'a' in bucket 'b': AWS Error SLOW_DOWN during UploadPart "
        "operation: Please reduce your request rate. (HTTP response code 503)"
    ),
    OSError("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 28, Timeout"),
    OSError("AWS Error INTERNAL_FAILURE during PutObject operation: We encountered an error"),
    OSError("google::cloud::Status(UNAVAILABLE: Retry policy exhausted: Service Unavailable)"),
    OSError("Received HTTP status code: 429"),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    BrokenPipeError(errno.EPIPE, "Broken pipe"),
    TimeoutError("timed out"),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
    _HttpError(503),
    _HttpError(429),
    _HttpError(408),
]
LASTING = [
    OSError(errno.ENOSPC, "No space left on device"),
    PermissionError(errno.EACCES, "Permission denied"),
    OSError(errno.EROFS, "Read-only file system"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError("AWS Error ACCESS_DENIED during PutObject operation: Access Denied"),
    OSError("AWS Error NO_SUCH_BUCKET during PutObject operation: not found"),
    _HttpError(403),
    _HttpError(404),
    ValueError("a programming error"),
]


def _write(filesystem: Filesystem, *, timeout: float = 60.0) -> None:
    write_image(filesystem, NEW, small_image(2), timeout=timeout)


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_may_pass(error: Exception) -> None:
    assert may_pass(error)


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_will_not(error: Exception) -> None:
    assert not may_pass(error)


@pytest.mark.parametrize("error", PASSING, ids=repr)
@pytest.mark.parametrize("path", ["*shard*", "*manifest*"])
def test_a_passing_error_does_not_keep_a_save_from_succeeding(
    memory: MemoryFilesystem, error: Exception, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    _write(FaultyFilesystem(memory, Fault(error, operation="write", path=path, times=3)))
    into = Small(9)
    newest(memory, into)
    assert into.bits() == Small(2).bits()
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3
    assert NEW in caplog.text


def test_a_write_cut_off_halfway_begins_anew(
    memory: MemoryFilesystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunks are gone through again, and hashed again, from the first on."""
    monkeypatch.setattr(images, "_CHUNK", 1)
    faults = [
        Fault(ConnectionResetError("reset"), operation="write", nth=n, after_chunks=n)
        for n in (1, 2, 3)
    ]
    _write(FaultyFilesystem(memory, *faults))
    opened(memory, NEW).verify()


def test_a_passing_error_does_not_keep_a_load_from_succeeding(memory: MemoryFilesystem) -> None:
    save(memory, 2)
    reset = ConnectionResetError("reset")
    faults = [
        Fault(reset, operation="list", times=2),
        Fault(reset, operation="read_into", path="*manifest*", times=2),
        Fault(reset, operation="read_into", path="*shard*", times=2),
    ]
    into = Small(9)
    newest(FaultyFilesystem(memory, *faults), into)
    assert into.bits() == Small(2).bits()


def test_what_keeps_failing_is_given_up(memory: MemoryFilesystem) -> None:
    save(memory, 1)
    slow = PASSING[0]
    filesystem = FaultyFilesystem(memory, Fault(slow, path="*shard*", times=None))
    with pytest.raises(StorageTimeoutError) as caught:
        _write(filesystem, timeout=0.001)
    error = caught.value
    assert isinstance(error, TimeoutError)
    assert error.where == f"{NEW}/shard-00000-of-00001.safetensors"
    assert "SLOW_DOWN" in error.why
    assert "storage_timeout" in error.remedy
    assert "0.001 s" in error.what
    assert error.__cause__ is slow


@pytest.mark.parametrize("error", [PASSING[0], LASTING[0], LASTING[1]], ids=repr)
@pytest.mark.parametrize("path", ["*shard*", "*manifest*"])
@pytest.mark.parametrize("chunks", [None, 0])
def test_the_checkpoint_before_it_stays_usable(
    memory: MemoryFilesystem, error: Exception, path: str, chunks: int | None
) -> None:
    save(memory, 1)
    fault = Fault(error, path=path, times=None, after_chunks=chunks)
    with pytest.raises(StorageError):
        _write(FaultyFilesystem(memory, fault), timeout=0.001)
    into = Small(9)
    newest(memory, into)
    assert into.bits() == Small(1).bits()


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "write permission"),
        (errno.EPERM, "write permission"),
        (errno.EROFS, "writable"),
    ],
)
def test_what_will_not_pass_fails_at_once(
    memory: MemoryFilesystem, number: int, remedy: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Only the first attempt is struck: a second one would succeed.
    fault = Fault(OSError(number, "no"), operation="write")
    with pytest.raises(StorageError) as caught:
        _write(FaultyFilesystem(memory, fault))
    assert not isinstance(caught.value, StorageTimeoutError)
    assert remedy in caught.value.remedy
    assert "untouched" in caught.value.remedy
    assert NEW in caught.value.where
    assert not caplog.records


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), EOFError("short")])
def test_answers_are_passed_on(error: Exception) -> None:
    def operation() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        retried(operation, what="read", where="there", timeout=60.0)
    assert caught.value is error


def _trainer(storage_timeout: float) -> tuple[Checkpointer, nn.Module]:
    ckpt = Checkpointer(storage_timeout=storage_timeout)
    return ckpt, ckpt.prepare(nn.Linear(2, 2))


def test_a_checkpointer_saves_through_an_outage(
    memory: MemoryFilesystem, route: Callable[[Filesystem], None]
) -> None:
    route(FaultyFilesystem(memory, Fault(PASSING[0], operation="write", times=5)))
    ckpt, model = _trainer(60.0)
    ckpt.save_state("there")
    found = opened(memory, "there").state_dict("model")
    assert all(torch.equal(found[n], t) for n, t in model.state_dict().items())


def test_a_checkpointer_says_what_storage_refused_and_can_go_on(
    memory: MemoryFilesystem, route: Callable[[Filesystem], None]
) -> None:
    """Also more often than there are slots: a failed save gives its slot back."""
    full = OSError(errno.ENOSPC, "No space left on device")
    route(FaultyFilesystem(memory, Fault(full, operation="write", path="full*", times=None)))
    ckpt, _ = _trainer(60.0)
    for n in range(5):
        with pytest.raises(StorageError, match="free space"):
            ckpt.save_state(f"full{n}")
    ckpt.save_state("there")
    opened(memory, "there").verify()


def test_a_checkpointer_gives_up_after_its_timeout(
    memory: MemoryFilesystem, route: Callable[[Filesystem], None]
) -> None:
    route(FaultyFilesystem(memory, Fault(TimeoutError("slow"), operation="write", times=None)))
    with pytest.raises(StorageTimeoutError, match=r"within 0\.001 s"):
        _trainer(0.001)[0].save_state("there")


def test_trying_again_draws_nothing_from_the_streams_of_the_training() -> None:
    random.seed(3)
    before = random.getstate()
    failures = iter([OSError("slow down"), OSError("slow down")])

    def operation() -> str:
        for failure in failures:
            raise failure
        return "done"

    assert retried(operation, what="write", where="there", timeout=30) == "done"
    assert random.getstate() == before
