"""What is frozen is written once: later checkpoints have it as a link, and need no other one."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn

from ray_accel_ckpt import Checkpointer, open_checkpoint
from ray_accel_ckpt.errors import CheckpointError
from ray_accel_ckpt.integrations.dcp import CheckpointReader
from ray_accel_ckpt.integrations.export import export_safetensors
from ray_accel_ckpt.storage.fakes import (
    Fault,
    FaultyFilesystem,
    MemoryFilesystem,
    RecordingFilesystem,
    replay,
)
from ray_accel_ckpt.storage.filesystem import Filesystem
from tests.helpers_image import opened
from tests.pure.helpers import OnStep, assert_survives, checkpoints, live

WIDTH = 600
"""A weight of more than 1 MiB, and of more than one block."""


class Adapted(nn.Module):
    """A frozen base with a few trained weights beside it, as LoRA makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down = nn.Linear(WIDTH, 2, bias=False)
        self.up = nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def prepared(ckpt: Checkpointer) -> tuple[Adapted, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = Adapted()
    # As many write it: all parameters, those that are not trained too.
    found: tuple[Adapted, torch.optim.Optimizer] = ckpt.prepare(
        model, torch.optim.AdamW(model.parameters(), lr=0.01)
    )
    return found


def step(ckpt: Checkpointer, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    ckpt.backward(model(torch.ones(1, WIDTH)).square().mean())
    optimizer.step()
    optimizer.zero_grad()
    ckpt.step()


def script(ckpt: Checkpointer, on_step: OnStep) -> Any:
    model, optimizer = prepared(ckpt)
    ckpt.load_state()
    for _ in ckpt.epochs(1):
        while ckpt.global_step < 8:
            step(ckpt, model, optimizer)
            on_step()
    return model, optimizer


def frozen_files(directory: Path) -> list[Path]:
    return sorted((directory / "checkpoints").glob("*/frozen-*"))


# --- the whole of it --------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_killed_anywhere_it_ends_with_the_same_bits(tmp_path: Path, overlap: bool) -> None:
    assert_survives(script, tmp_path, kills=(3, 4), every=1, overlap=overlap)


def test_many_checkpoints_hold_the_bytes_once(tmp_path: Path) -> None:
    live(script, tmp_path, every=1)
    files = frozen_files(tmp_path)
    assert len(files) == 9
    assert len({file.stat().st_ino for file in files}) == 1


def test_a_life_links_to_what_the_life_before_it_wrote(tmp_path: Path) -> None:
    live(script, tmp_path, every=2, die_at=3)
    live(script, tmp_path, every=2)
    assert len(frozen_files(tmp_path)) == 5
    assert len({file.stat().st_ino for file in frozen_files(tmp_path)}) == 1


def test_a_checkpoint_needs_no_other_one(tmp_path: Path) -> None:
    live(script, tmp_path, every=2)
    *earlier, last = checkpoints(tmp_path)
    for name in earlier:
        for file in (tmp_path / "checkpoints" / name).iterdir():
            file.unlink()
    saved = open_checkpoint(tmp_path / "checkpoints" / last)
    saved.verify()
    torch.manual_seed(3)
    base = Adapted().base
    assert torch.equal(saved.state_dict("model")["base.weight"], base.weight)


def test_a_save_writes_what_is_trained_and_no_more(
    recorded: RecordingFilesystem, ckpt: Checkpointer
) -> None:
    model, optimizer = prepared(ckpt)
    step(ckpt, model, optimizer)
    written = []
    for n in range(3):
        before = len(recorded.operations)
        ckpt.save_state(f"there/{n}")
        written.append(sum(len(o.data) for o in recorded.operations[before:]))
    base = model.base.weight.nbytes
    assert written[0] > base
    assert written[1] == written[2] < base / 5


def test_an_unchanged_state_is_written_in_under_a_hundredth(
    recorded: RecordingFilesystem, ckpt: Checkpointer
) -> None:
    model = nn.Linear(2000, 2000).requires_grad_(False)
    ckpt.prepare(model)
    written = []
    for n in range(2):
        before = len(recorded.operations)
        ckpt.save_state(f"there/{n}")
        written.append(sum(len(o.data) for o in recorded.operations[before:]))
    assert written[1] < written[0] / 100


# --- what has changed all the same ------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> RecordingFilesystem:
    recording = RecordingFilesystem(MemoryFilesystem())
    _use(monkeypatch, recording)
    return recording


def _use(monkeypatch: pytest.MonkeyPatch, filesystem: Filesystem) -> None:
    found = lambda location: (filesystem, str(location))  # noqa: E731
    monkeypatch.setattr("ray_accel_ckpt.runtime.sinks.resolve", found)
    monkeypatch.setattr("ray_accel_ckpt.runtime.session.resolve", found)


@pytest.fixture
def ckpt() -> Checkpointer:
    return Checkpointer()


def _loads(path: str, weight: torch.Tensor) -> bool:
    other = Checkpointer()
    model, _ = prepared(other)
    with torch.no_grad():
        model.base.weight.zero_()
    other.load_state(path)
    return torch.equal(model.base.weight, weight)


@pytest.mark.parametrize("how", ["in place", "around the count of versions", "unfrozen"])
def test_what_changed_all_the_same_is_written_anew(
    recorded: RecordingFilesystem, ckpt: Checkpointer, how: str
) -> None:
    model, optimizer = prepared(ckpt)
    step(ckpt, model, optimizer)
    ckpt.save_state("there/0")
    if how == "in place":
        with torch.no_grad():
            model.base.weight[-1, -1] += 1
    elif how == "around the count of versions":
        model.base.weight.data[-1, -1] += 1
    else:
        model.base.requires_grad_(True)
        step(ckpt, model, optimizer)
    ckpt.save_state("there/1")
    assert _loads("there/1", model.base.weight)
    assert not [o for o in recorded.operations if o.kind == "copy"]
    ckpt.save_state("there/2")
    assert _loads("there/2", model.base.weight)
    assert len([o for o in recorded.operations if o.kind == "copy"]) == (how != "unfrozen")


@pytest.mark.parametrize("why", ["gone", "another disk"])
def test_where_it_cannot_be_linked_it_is_written(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ckpt: Checkpointer,
    why: str,
) -> None:
    memory = MemoryFilesystem()
    fault = Fault(OSError(errno.EXDEV, "another disk"), operation="copy")
    _use(monkeypatch, FaultyFilesystem(memory, fault) if why == "another disk" else memory)
    model, optimizer = prepared(ckpt)
    step(ckpt, model, optimizer)
    ckpt.save_state("there/0")
    if why == "gone":
        memory.delete("there/0")
    ckpt.save_state("there/1")
    assert "writing frozen tensors in full" in caplog.text
    assert _loads("there/1", model.base.weight)


@pytest.mark.parametrize("torn", [False, True])
def test_cut_off_anywhere_the_save_before_it_is_whole(
    recorded: RecordingFilesystem, ckpt: Checkpointer, torn: bool
) -> None:
    model, optimizer = prepared(ckpt)
    step(ckpt, model, optimizer)
    ckpt.save_state("run/checkpoint_1")
    before = replay(recorded.operations).files
    done = len(recorded.operations)
    step(ckpt, model, optimizer)
    ckpt.save_state("run/checkpoint_2")
    operations = recorded.operations[done:]
    assert [o.kind for o in operations].count("copy") == 1
    for n in range(len(operations)):
        crashed = replay(operations[:n], onto=before, torn=torn, atomic=not torn)
        opened(crashed, "run/checkpoint_1").verify()
        with pytest.raises(CheckpointError):
            opened(crashed, "run/checkpoint_2")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_other_tools_read_it(tmp_path: Path) -> None:
    live(script, tmp_path, every=4)
    checkpoint = tmp_path / "checkpoints" / checkpoints(tmp_path)[-1]
    saved = open_checkpoint(checkpoint).state_dict("model")
    export_safetensors(checkpoint, tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert all(torch.equal(exported[name], saved[name]) for name in saved)
    model = Adapted()
    state = {"model": model.state_dict()}
    dcp.load(state, storage_reader=CheckpointReader(checkpoint), no_dist=True)
    assert all(torch.equal(state["model"][name], saved[name]) for name in saved)


def test_a_few_frozen_bytes_are_no_file_of_their_own(
    recorded: RecordingFilesystem, ckpt: Checkpointer
) -> None:
    ckpt.prepare(nn.Linear(500, 500).requires_grad_(False))
    ckpt.save_state("there")
    names = {o.path for o in recorded.operations}
    assert names == {
        "there/shard-00000-of-00001.safetensors",
        "there/manifest-00000-of-00001.json",
    }
