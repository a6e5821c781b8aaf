"""What is frozen is written once: later checkpoints have it as a link, and need no other one."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn

from ray_accel_ckpt import Checkpointer, EverySteps, ProjectConfiguration, open_checkpoint
from ray_accel_ckpt.errors import CheckpointError
from ray_accel_ckpt.image import mark
from ray_accel_ckpt.image.frozen import Frozen
from ray_accel_ckpt.integrations.dcp import CheckpointReader
from ray_accel_ckpt.integrations.export import export_safetensors
from ray_accel_ckpt.storage import writer
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
    project = ProjectConfiguration("project", automatic_checkpoint_naming=True)
    return Checkpointer(project_config=project)


def _written(recorded: RecordingFilesystem, save: Callable[[], object]) -> int:
    before = len(recorded.operations)
    save()
    return sum(len(o.data) for o in recorded.operations[before:])


def _copies(recorded: RecordingFilesystem) -> int:
    return sum(o.kind == "copy" for o in recorded.operations)


def test_a_save_writes_what_is_trained_and_no_more(
    recorded: RecordingFilesystem, ckpt: Checkpointer
) -> None:
    model, optimizer = prepared(ckpt)
    step(ckpt, model, optimizer)
    written = [_written(recorded, ckpt.save_state) for _ in range(3)]
    base = model.base.weight.nbytes
    assert written[0] > base
    assert max(written[1:]) < base / 5


def test_an_unchanged_state_is_written_in_under_a_hundredth(
    recorded: RecordingFilesystem, ckpt: Checkpointer
) -> None:
    ckpt.prepare(nn.Linear(2000, 2000).requires_grad_(False))
    written = [_written(recorded, ckpt.save_state) for _ in range(2)]
    assert written[1] < written[0] / 100


def test_nothing_is_copied_once_a_link_has_been_made(
    recorded: RecordingFilesystem, ckpt: Checkpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []
    copy = Frozen._copy
    monkeypatch.setattr(Frozen, "_copy", lambda frozen: copied.append(1) or copy(frozen))
    prepared(ckpt)
    for _ in range(4):
        ckpt.save_state()
    assert (len(copied), _copies(recorded)) == (2, 3)


# --- what has changed all the same ------------------------------------------------------


def _loads(path: str, weight: torch.Tensor) -> bool:
    other = Checkpointer()
    model, _ = prepared(other)
    with torch.no_grad():
        model.base.weight.zero_()
    other.load_state(path)
    return torch.equal(model.base.weight, weight)


@pytest.mark.parametrize("how", ["in place", "through data", "negated", "unfrozen"])
@pytest.mark.parametrize("device", ["host", "accelerator"])
@pytest.mark.parametrize("links", [1, 3])
def test_what_changed_all_the_same_is_written_anew(
    recorded: RecordingFilesystem,
    ckpt: Checkpointer,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    device: str,
    links: int,
) -> None:
    if device == "accelerator":
        monkeypatch.setattr(mark, "_on_host", lambda rows: [])
    model, optimizer = prepared(ckpt)
    step(ckpt, model, optimizer)
    for _ in range(links):
        ckpt.save_state()
    if how == "in place":
        with torch.no_grad():
            model.base.weight[-1, -1] += 1
    elif how == "through data":
        model.base.weight.data[-1, -1] += 1
    elif how == "negated":
        model.base.weight.data.neg_()
    else:
        model.base.requires_grad_(True)
        step(ckpt, model, optimizer)
    path = ckpt.save_state()
    assert _loads(path, model.base.weight)
    assert _copies(recorded) == links - 1
    path = ckpt.save_state()
    assert _loads(path, model.base.weight)
    assert _copies(recorded) == links - (how == "unfrozen")


@pytest.mark.parametrize("why", ["gone", "another disk", "not implemented"])
def test_where_it_cannot_be_linked_it_is_written(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ckpt: Checkpointer,
    why: str,
) -> None:
    monkeypatch.setattr(writer, "LINK_TIMEOUT", 0.0)
    memory = MemoryFilesystem()
    error = OSError(errno.EXDEV, "another disk") if why == "another disk" else OSError("HTTP 501")
    fault = Fault(error, operation="copy", times=None)
    _use(monkeypatch, memory if why == "gone" else FaultyFilesystem(memory, fault))
    model, optimizer = prepared(ckpt)
    step(ckpt, model, optimizer)
    path = ckpt.save_state()
    for _ in range(3):
        if why == "gone":
            memory.delete(path)
        path = ckpt.save_state()
        assert "writing frozen tensors in full" in caplog.text
        caplog.clear()
        assert _loads(path, model.base.weight)


def test_where_links_fail_a_save_is_of_its_moment(
    monkeypatch: pytest.MonkeyPatch, ckpt: Checkpointer
) -> None:
    """The bytes must not be looked for when they are written: by then they may have changed."""
    memory = MemoryFilesystem()
    fault = Fault(OSError(errno.EXDEV, "another disk"), operation="copy", times=None)
    _use(monkeypatch, FaultyFilesystem(memory, fault))
    project = ProjectConfiguration("project", automatic_checkpoint_naming=True)
    ckpt = Checkpointer(save=EverySteps(1), project_config=project)
    model, optimizer = prepared(ckpt)
    for number in range(3):
        before = model.base.weight.clone()
        step(ckpt, model, optimizer)
        model.base.weight.data.mul_(2)
        ckpt.flush()
        assert _loads(f"project/checkpoints/checkpoint_{number}", before)


def test_another_file_in_its_place_is_not_linked_to(
    recorded: RecordingFilesystem, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a checkpoint that was loaded, by somebody who has replaced it since."""
    first, other = Checkpointer(), Checkpointer()
    prepared(first)
    first.save_state("shared/best")
    project = ProjectConfiguration("project", automatic_checkpoint_naming=True)
    ckpt = Checkpointer(project_config=project)
    model, _ = prepared(ckpt)
    ckpt.load_state("shared/best")
    changed, _ = prepared(other)
    changed.base.weight.data.mul_(2)
    other.save_state("other")
    name = "frozen-00000-of-00001.safetensors"
    recorded.write(f"shared/best/{name}", [_read(recorded, f"other/{name}")])
    assert _loads(ckpt.save_state(), model.base.weight)
    assert "in full" in caplog.text


def _read(filesystem: Filesystem, path: str) -> bytes:
    directory, _, name = path.rpartition("/")
    (nbytes,) = (e.nbytes for e in filesystem.list(directory) if e.name == name)
    data = bytearray(nbytes or 0)
    filesystem.read_into(path, 0, memoryview(data))
    return bytes(data)


def test_what_lies_in_a_directory_of_a_users_is_not_linked_to(
    recorded: RecordingFilesystem, ckpt: Checkpointer
) -> None:
    """Whose it is may be replaced. It may be a link to what is the run's own."""
    model, _ = prepared(ckpt)
    for path in ("mine/1", "mine/2"):
        ckpt.save_state(path)
    assert _copies(recorded) == 0
    ckpt.save_state()
    ckpt.save_state("mine/3")
    assert _copies(recorded) == 1
    assert _loads("mine/3", model.base.weight)


@pytest.mark.parametrize("torn", [False, True])
def test_cut_off_anywhere_the_save_before_it_is_whole(
    recorded: RecordingFilesystem, ckpt: Checkpointer, torn: bool
) -> None:
    model, optimizer = prepared(ckpt)
    step(ckpt, model, optimizer)
    first = ckpt.save_state()
    before = replay(recorded.operations).files
    done = len(recorded.operations)
    step(ckpt, model, optimizer)
    second = ckpt.save_state()
    operations = recorded.operations[done:]
    assert [o.kind for o in operations].count("copy") == 1
    for n in range(len(operations)):
        crashed = replay(operations[:n], onto=before, torn=torn, atomic=not torn)
        opened(crashed, first).verify()
        with pytest.raises(CheckpointError):
            opened(crashed, second)


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
