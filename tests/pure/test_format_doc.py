"""The small example in docs/format.md is what the library writes."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_accel_ckpt import Checkpointer
from tests.pages import snippets

PLACE, ENVELOPE, HEADER, DATA, MANIFEST = snippets("docs/format.md", "")

# What differs from one writing to the next: names drawn, times, random streams and their checksums.
_DRAWN = re.compile(
    r'("(?:checksum|library|attempt)":|"blocks":\[|"saved_at":|"pos":)("[^"]*"|[\d.]+)'
)


class _Notes:
    def state_dict(self) -> dict[Any, Any]:
        return {"best": float("nan"), ("a", 1): b"\x00\xff"}

    def load_state_dict(self, state: dict[Any, Any]) -> None: ...


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.arange(6.0).reshape(2, 3))
        model.bias.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ckpt = Checkpointer(seed=1)
    model, optimizer = ckpt.prepare(model, optimizer)
    ckpt.register_for_checkpointing(notes=_Notes())
    ckpt.backward(model(torch.ones(1, 3)).sum())
    optimizer.step()
    optimizer.zero_grad()
    ckpt.step()
    # As streams are from which nothing was drawn yet.
    random.seed(0)
    np.random.seed(0)
    place = tmp_path_factory.mktemp("example") / "x"
    ckpt.save_state(place)
    return place


def test_the_files_are_named_as_on_the_page(example: Path) -> None:
    assert sorted(path.name for path in example.iterdir()) == [
        "manifest-00000-of-00001.json",
        "shard-00000-of-00001.safetensors",
    ]
    shown = re.findall(r"(shard|manifest)-(\d{5})-of-(\d{5})\.(\w+)", PLACE)
    assert {(kind, suffix) for kind, _, _, suffix in shown} == {
        ("manifest", "json"),
        ("shard", "safetensors"),
    }


def test_the_shard_is_that_on_the_page(example: Path) -> None:
    data = (example / "shard-00000-of-00001.safetensors").read_bytes()
    assert len(data) == 8128
    assert data[:8] == bytes.fromhex("f801000000000000")
    assert json.loads(data[8:512]) == json.loads(HEADER)
    assert data[8:512].decode().rstrip() == HEADER.replace("\n", "")
    shown = "".join(line.partition("  ")[0] for line in DATA.splitlines())
    assert data[512:576] == bytes.fromhex(shown)


def test_the_manifest_is_that_on_the_page(example: Path) -> None:
    written = (example / "manifest-00000-of-00001.json").read_text()
    body = written[len('{"checksum":"') + 32 + len('","body":') : -2]
    envelope = ENVELOPE.strip().replace("\\n", "\n").replace("BODY}", f"{body}}}")
    assert written == envelope.replace("<checksum of BODY>", written[13:45])
    # Laid out on the page: what stands between two "..." is there, in this order.
    real, at = _DRAWN.sub(r"\1", written), 0
    for piece in "".join(line.strip() for line in MANIFEST.splitlines()).split("..."):
        # A space follows the commas about something left out.
        wanted = _DRAWN.sub(r"\1", piece.strip(" ,"))
        assert wanted in real[at:], wanted
        at = real.index(wanted, at) + len(wanted)
