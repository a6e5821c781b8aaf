"""The commands on a server that speaks S3, found by options, by the URI, by the environment."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from moto.moto_server.werkzeug_app import DomainDispatcherApplication
from safetensors.torch import load

from ray_accel_ckpt import open_checkpoint
from ray_accel_ckpt.runtime.record import SNAPSHOT
from ray_accel_ckpt.storage.filesystem import Filesystem, resolve
from tests.cli import runs
from tests.cli.commands import document, refused, told
from tests.storage.conftest import BUCKET

NAMES = ["checkpoint_00000040_5d8e3f", "checkpoint_00000020_5d8e3f"]
CUT_OFF = "checkpoint_00000060_5d8e3f"


@pytest.fixture
def options(s3: str) -> list[str]:
    return ["--endpoint-url", f"http://{s3}", "--region", "us-east-1"]


@pytest.fixture
def bucket(s3: str) -> Filesystem:
    uri = f"s3://{BUCKET}?endpoint_override={s3}&scheme=http&region=us-east-1"
    return resolve(uri)[0]


@pytest.fixture
def run(bucket: Filesystem, tmp_path: Path) -> str:
    """A run in the bucket, without the scheme."""
    path = f"{BUCKET}/{secrets.token_hex(4)}"
    for name, step in zip(NAMES, (40, 20), strict=True):
        runs.save(bucket, f"{path}/{name}", step)
    runs.save(bucket, f"{path}/{CUT_OFF}", 60, ranks=1)
    runs.register(tmp_path, *reversed(NAMES))
    bucket.write(f"{path}/{SNAPSHOT}", [(tmp_path / SNAPSHOT).read_bytes()])
    return path


def _read(filesystem: Filesystem, path: str) -> bytearray:
    directory, _, name = path.rpartition("/")
    nbytes = next(e.nbytes for e in filesystem.list(directory) if e.name == name)
    data = bytearray(nbytes or 0)
    filesystem.read_into(path, 0, memoryview(data))
    return data


def _way(kind: str, run: str, s3: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments that lead to the run."""
    if kind == "options":
        return [f"s3://{run}", "--endpoint-url", f"http://{s3}", "--region", "us-east-1"]
    if kind == "uri":
        return [f"s3://{run}?endpoint_override={s3}&scheme=http&region=us-east-1"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return [f"s3://{run}", "--region", "us-east-1"]


@pytest.mark.parametrize("kind", ["options", "uri", "environment"])
def test_listing(run: str, s3: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = document("ls", *_way(kind, run, s3, monkeypatch))
    assert listing["run"] == run
    conditions = {each["name"]: each["condition"] for each in listing["checkpoints"]}
    assert conditions == {CUT_OFF: "not whole", NAMES[0]: "good", NAMES[1]: "good"}
    assert [each["latest"] for each in listing["checkpoints"]] == [False, True, False]


def test_proving(run: str, bucket: Filesystem, options: list[str]) -> None:
    place = f"s3://{run}/{NAMES[0]}"
    assert document("verify", place, *options)["good"]
    shard = f"{run}/{NAMES[0]}/shard-00001-of-00002.safetensors"
    data = _read(bucket, shard)
    data[-1] ^= 1
    bucket.write(shard, [data])
    [found] = document("verify", place, *options, status=1)["checkpoints"]
    assert found["faults"][0]["where"].startswith(f"{shard}, bytes ")


def test_comparing_with_one_on_this_disk(run: str, checkpoint: Path, options: list[str]) -> None:
    assert "the same" in told("diff", f"s3://{run}/{NAMES[1]}", checkpoint, *options)
    found = document("diff", checkpoint, f"s3://{run}/{NAMES[0]}", *options, status=1)
    assert "model/0.weight" in [each["path"] for each in found["changed"]]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("to", ["safetensors", "torch", "dcp"])
def test_exporting(
    run: str, bucket: Filesystem, options: list[str], to: str, tmp_path: Path
) -> None:
    source = f"s3://{run}/{NAMES[1]}"
    written = document("export", source, f"s3://{run}/{to}", "--to", to, *options)["written"]
    assert all(path.startswith(f"{run}/{to}") for path in written)
    weights = runs.Worker(20, 0, 2).model.state_dict()
    if to == "safetensors":
        found: Any = load(bytes(_read(bucket, written[0])))
    elif to == "torch":
        (tmp_path / "model.pt").write_bytes(_read(bucket, written[0]))
        found = torch.load(tmp_path / "model.pt", weights_only=True)["model"]
    else:
        assert {entry.name for entry in bucket.list(written[0])} == {".metadata", "__0_0.distcp"}
        return
    assert all(torch.equal(tensor, found[name]) for name, tensor in weights.items())


def test_healing_and_sweeping(run: str, bucket: Filesystem, options: list[str]) -> None:
    assert document("heal", f"s3://{run}", *options)["mended"] == []
    assert "the run may be going" in refused("sweep", f"s3://{run}", *options)
    swept = document("sweep", f"s3://{run}", "--older-than", "0s", *options)
    assert [each["name"] for each in swept["directories"]] == [CUT_OFF]
    assert {e.name for e in bucket.list(run) if e.nbytes is None} == set(NAMES)


def test_a_time_is_told_of_every_object(run: str, bucket: Filesystem) -> None:
    entries = bucket.list(f"{run}/{NAMES[0]}")
    assert entries
    assert all(entry.modified is not None for entry in entries)


@pytest.fixture
def signed(s3: str, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each request that reaches the server, whether somebody has signed it."""
    del s3
    seen: list[bool] = []
    passed_on = DomainDispatcherApplication.__call__

    def seeing(app: Any, environ: dict[str, Any], start_response: Any) -> Any:
        seen.append("HTTP_AUTHORIZATION" in environ)
        return passed_on(app, environ, start_response)

    monkeypatch.setattr(DomainDispatcherApplication, "__call__", seeing)
    return seen


@pytest.mark.parametrize("kind", ["options", "uri", "environment"])
def test_a_public_bucket_is_read_without_credentials(
    run: str, s3: str, kind: str, signed: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though there are some in the environment."""
    way = _way(kind, run, s3, monkeypatch)
    document("ls", *way)
    assert signed.pop()
    signed.clear()
    listing = document("ls", *way, "--anonymous")
    assert len(listing["checkpoints"]) == 3
    assert signed
    assert not any(signed)


def test_who_asks_may_be_said_in_the_uri(
    run: str, s3: str, signed: list[bool], options: list[str], tmp_path: Path
) -> None:
    """Of one of two, too."""
    public = f"s3://anonymous@{run}/{NAMES[0]}"
    assert document("verify", public, *options)["good"]
    assert not any(signed)
    document("export", public, f"s3://{run}/weights", "--to", "safetensors", *options)
    assert {*signed} == {True, False}
    endpoint = f"endpoint_override={s3}&scheme=http&region=us-east-1"
    signed.clear()
    ckpt = open_checkpoint(f"{public}?{endpoint}")
    assert torch.equal(
        ckpt.state_dict("model")["0.weight"], runs.Worker(40, 0, 2).model.state_dict()["0.weight"]
    )
    assert not any(signed)


def test_a_name_is_the_same_to_nobody(s3: str, bucket: Filesystem) -> None:
    """What is escaped in a URI."""
    path = f"{BUCKET}/{secrets.token_hex(4)} +ü"
    bucket.write(f"{path}/a", [b"1"])
    query = f"?endpoint_override={s3}&scheme=http&region=us-east-1"
    for who in ("", "anonymous@"):
        filesystem, found = resolve(f"s3://{who}{quote(path)}/{query}")
        assert found == path
        assert [entry.name for entry in filesystem.list(found)] == ["a"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["ls", "s3://b/r", "--endpoint-url", "localhost:9000"], "is no URL of a server"),
        (["ls", "s3://b/r", "--endpoint-url", "http://h/bucket"], "is no URL of a server"),
        (["ls", "/disk/run", "--region", "eu"], "nothing that lies there"),
        (["ls", "s3://b/r?region=eu", "--region", "us"], "the URI says region already"),
        (["ls", "/disk/run", "--anonymous"], "nothing is given that could be read without"),
        (["ls", "az://b/r", "--anonymous"], "nothing is given that could be read without"),
        (["ls", "s3://key:secret@b/r", "--anonymous"], "the URI says who asks already"),
        (["ls", "s3://anonymous@b/r?tls=no", "--region", "us"], "a public bucket says tls"),
    ],
)
def test_an_endpoint_that_cannot_be_is_refused(arguments: list[str], why: str) -> None:
    said = refused(*arguments)
    assert why in said
    assert "secret" not in said


def test_a_bucket_that_is_not_there(s3: str, options: list[str]) -> None:
    del s3
    said: Callable[..., str] = refused
    assert "what to do" in said("ls", "s3://nobodys-bucket/run", *options)


def test_an_object_is_told_to_be_a_file(run: str, options: list[str]) -> None:
    for command in ("ls", "show"):
        said = refused(command, f"s3://{run}/{SNAPSHOT}", *options)
        assert "it is a file" in said
