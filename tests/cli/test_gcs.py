"""The commands on a server that speaks GCS, through pyarrow's client, and what Azure is asked."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ray_accel_ckpt.storage.filesystem import resolve
from tests.cli import runs
from tests.cli.commands import document, refused
from tests.storage.conftest import BUCKET

NAME = "checkpoint_00000020_5d8e3f"
CUT_OFF = "checkpoint_00000060_5d8e3f"


@pytest.fixture
def run(gcs: str) -> tuple[str, str]:
    """A run in the bucket, without the scheme, and what leads to the server."""
    path = f"{BUCKET}/{secrets.token_hex(4)}"
    options = f"?endpoint_override={gcs}&scheme=http&retry_limit_seconds=5"
    bucket, _ = resolve(f"gs://anonymous@{BUCKET}{options}")
    runs.save(bucket, f"{path}/{NAME}", 20)
    runs.save(bucket, f"{path}/{CUT_OFF}", 60, ranks=1)
    return path, options


@pytest.mark.parametrize(("who", "option"), [("anonymous@", []), ("", ["--anonymous"])])
def test_a_bucket_of_gcs(run: tuple[str, str], who: str, option: list[str], tmp_path: Path) -> None:
    path, options = run
    listing = document("ls", f"gs://{who}{path}{options}", *option)
    assert listing["run"] == path
    conditions = {each["name"]: each["condition"] for each in listing["checkpoints"]}
    assert conditions == {CUT_OFF: "not whole", NAME: "good"}
    place = f"gs://{who}{path}/{NAME}{options}"
    assert document("verify", place, *option)["good"]
    assert document("show", place, *option)["step"] == 20
    out = tmp_path / "weights"
    document("export", place, out, "--to", "safetensors", *option)
    found = load_file(out / "model.safetensors")
    weights = runs.Worker(20, 0, 2).model.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in weights.items())


def test_exporting_into_a_bucket(run: tuple[str, str]) -> None:
    path, options = run
    place, out = (f"gs://{path}/{each}{options}" for each in (NAME, "weights"))
    written = document("export", place, out, "--to", "safetensors", "--anonymous")["written"]
    assert written[0] == f"{path}/weights/model.safetensors"


# --- Azure ------------------------------------------------------------------------------------


@pytest.fixture
def asked() -> Iterator[tuple[str, list[bool]]]:
    """A server that refuses all, and of each request, whether somebody has signed it."""
    seen: list[bool] = []

    class Refusing(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            seen.append("Authorization" in self.headers)
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}", seen
        server.shutdown()
        thread.join()


def test_azure_is_asked_without_credentials(asked: tuple[str, list[bool]]) -> None:
    """No more than that: there is no server here that speaks Azure's protocol."""
    host, signed = asked
    said = refused("ls", f"abfs://account@{host}/container/run?enable_tls=false", "--anonymous")
    assert "403 Forbidden" in said
    assert signed
    assert not any(signed)
