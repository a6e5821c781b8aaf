"""`verify`: each byte proved, each bad file named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ray_accel_ckpt.runtime import progress
from ray_accel_ckpt.storage.filesystem import LocalFilesystem
from ray_accel_ckpt.storage.proving import prove
from tests.cli import runs
from tests.cli.commands import document, refused, run, told
from tests.helpers_image import edited, flip

MANIFEST = "manifest-00000-of-00002.json"
SHARDS = ["shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors"]
VERSION_1 = Path(__file__).parents[1] / "data" / "version_1" / "checkpoint_3"


class Bytes:
    """Counts what is read."""

    def __init__(self) -> None:
        self.expected = self.read = 0

    def begins(self, path: str, nbytes: int) -> None:
        self.expected += nbytes

    def has_read(self, nbytes: int) -> None:
        self.read += nbytes


def test_a_good_one_is_good(checkpoint: Path) -> None:
    found = document("verify", checkpoint)
    sizes = [(checkpoint / name).stat().st_size for name in SHARDS]
    assert found == {
        "good": True,
        "checkpoints": [
            {
                "name": checkpoint.name,
                "path": str(checkpoint),
                "condition": "good",
                "files": 2,
                "nbytes": sum(sizes),
                "faults": [],
            }
        ],
    }
    assert "1 of 1 checkpoint good" in told("verify", checkpoint)


def test_of_version_1_too() -> None:
    assert document("verify", VERSION_1)["good"]


def test_each_byte_is_read_once(tmp_path: Path) -> None:
    name = runs.saved(tmp_path, 20, frozen=True)
    counted = Bytes()
    proof = prove(LocalFilesystem(), str(tmp_path / name), counted)
    files = [p.stat().st_size for p in (tmp_path / name).glob("*.safetensors")]
    assert (proof.files, len(files)) == (4, 4)
    assert sum(files) == proof.nbytes == counted.expected
    # Between a header and the first tensor, and between tensors, lies nothing.
    assert counted.read == counted.expected


def test_a_changed_bit_is_found_in_each_file(checkpoint: Path) -> None:
    for name in SHARDS:
        runs.damage(checkpoint / name)
    [found] = document("verify", checkpoint, status=1)["checkpoints"]
    assert found["condition"] == "damaged"
    assert len(found["faults"]) == 2
    for fault, name in zip(found["faults"], SHARDS, strict=True):
        assert fault["where"].startswith(f"{checkpoint}/{name}, bytes ")
        assert "are not those that were written" in fault["what"]
    screen = told("verify", checkpoint, status=1)
    assert all(f"{checkpoint}/{name}" in screen for name in SHARDS)
    assert "0 of 1 checkpoint good" in screen


def test_the_tensor_is_named(checkpoint: Path) -> None:
    flip(checkpoint, "model/0.weight")
    assert "bytes of tensor 'model/0.weight'" in told("verify", checkpoint, status=1)


def test_a_changed_header_is_found(checkpoint: Path) -> None:
    shard = checkpoint / SHARDS[0]
    data = bytearray(shard.read_bytes())
    data[20] ^= 1
    shard.write_bytes(data)
    assert "the header of a shard is not the one" in told("verify", checkpoint, status=1)


@pytest.mark.parametrize(
    ("harm", "condition", "where"),
    [
        (lambda c: (c / MANIFEST).unlink(), "not whole", MANIFEST),
        (lambda c: (c / SHARDS[1]).unlink(), "damaged", SHARDS[1]),
        (lambda c: (c / MANIFEST).write_bytes(b"{"), "damaged", MANIFEST),
        (
            lambda c: (c / MANIFEST).write_bytes(
                edited((c / MANIFEST).read_bytes(), lambda body: body.update(version=9))
            ),
            "newer format",
            MANIFEST,
        ),
        (
            lambda c: (c / MANIFEST).write_bytes(
                edited(
                    (c / MANIFEST).read_bytes(),
                    lambda body: body["parts"]["model"]["value"].update(
                        x={"!": "tensor", "name": "model/x", "device": "cpu"}
                    ),
                )
            ),
            "damaged",
            "",
        ),
    ],
    ids=["no manifest", "no shard", "torn manifest", "newer format", "a tensor nobody has"],
)
def test_what_cannot_be_opened_is_not_good(
    checkpoint: Path, harm: Any, condition: str, where: str
) -> None:
    harm(checkpoint)
    [found] = document("verify", checkpoint, status=1)["checkpoints"]
    assert found["condition"] == condition
    assert f"{checkpoint}/{where}".rstrip("/") in found["faults"][0]["where"]


def test_all_of_a_run_are_proved(digits: Path) -> None:
    runs.damage(digits / "checkpoint_00000020_5d8e3f" / SHARDS[0])
    found = document("verify", digits, status=1)
    conditions = [each["condition"] for each in found["checkpoints"]]
    assert conditions == ["not whole", "good", "good", "damaged"]
    assert not found["good"]


def test_a_run_whose_checkpoints_are_all_good(tmp_path: Path) -> None:
    for step in (10, 20):
        runs.saved(tmp_path, step)
    found = document("verify", tmp_path)
    assert (found["good"], len(found["checkpoints"])) == (True, 2)


def test_where_nothing_is_nothing_can_be_told(tmp_path: Path) -> None:
    assert "no checkpoints there" in refused("verify", tmp_path, status=2)
    assert run("verify").exit_code == 2


def test_a_bar_is_drawn_on_terminals_only(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, counts: list[progress._Far]
) -> None:
    """By bytes: it ends where the files do."""
    told("verify", checkpoint)
    assert counts == []
    monkeypatch.setattr(progress, "_on_terminal", lambda: True)
    told("verify", checkpoint)
    total = sum((checkpoint / name).stat().st_size for name in SHARDS)
    assert [(far.name, far.read, far.nbytes) for far in counts] == [(checkpoint.name, total, total)]
