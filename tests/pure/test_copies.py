"""Copies that go on beside training: whatever writes a tensor at whatever moment, none is torn."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from torch import nn
from torch.optim import optimizer as of_torch

from ray_accel_ckpt import Checkpointer, EverySteps, ProjectConfiguration, open_checkpoint
from ray_accel_ckpt.errors import ConfigurationError, TornSnapshotError
from ray_accel_ckpt.image import copies as module
from ray_accel_ckpt.image.copies import Copies, Copy, may_be_late
from ray_accel_ckpt.image.staging import Slot
from ray_accel_ckpt.state.bundle import StateBundle
from ray_accel_ckpt.storage.fakes import MemoryFilesystem
from ray_accel_ckpt.storage.writer import write_image
from tests.helpers_image import image_of, part_of

COUNT = 4
PATIENCE = 60.0


class Gate:
    """Lets so many copies of the thread through, and no more until it is opened."""

    def __init__(self, passes: int) -> None:
        self._passes = threading.Semaphore(passes)
        self.reached = threading.Event()

    def run(self, copy: Copy) -> None:
        if threading.current_thread() is threading.main_thread():
            return
        if not self._passes.acquire(blocking=False):
            self.reached.set()
            assert self._passes.acquire(timeout=PATIENCE)

    def open(self) -> None:
        self._passes.release(COUNT)


@pytest.fixture
def gate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate, run = Gate(request.param), Copy.run

    def gated(copy: Copy) -> None:
        gate.run(copy)
        run(copy)

    monkeypatch.setattr(Copy, "run", gated)
    yield gate
    gate.open()


def _trained() -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    parameters = [nn.Parameter(torch.arange(5.0) + i) for i in range(COUNT)]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    for parameter in parameters:
        parameter.grad = torch.ones(5)
    return parameters, optimizer


def _begin(parameters: list[nn.Parameter]) -> tuple[Copies, list[torch.Tensor]]:
    targets = [torch.zeros(5) for _ in parameters]
    late = [
        Copy(name=str(i), source=p.detach(), target=t, watched=(p,))
        for i, (p, t) in enumerate(zip(parameters, targets, strict=True))
    ]
    return Copies([], late), targets


@pytest.mark.parametrize("gate", range(COUNT + 1), indirect=True)
def test_an_optimizer_steps_when_all_is_copied(gate: Gate) -> None:
    parameters, optimizer = _trained()
    before = [p.detach().clone() for p in parameters]
    begun, targets = _begin(parameters)
    stepping = threading.Thread(target=optimizer.step)
    stepping.start()
    gate.open()
    stepping.join()
    begun.wait()
    assert all(map(torch.equal, targets, before))
    assert not any(map(torch.equal, parameters, before))


@pytest.mark.parametrize("gate", range(COUNT), indirect=True)
def test_until_then_it_waits(gate: Gate) -> None:
    parameters, optimizer = _trained()
    before = [p.detach().clone() for p in parameters]
    begun, _ = _begin(parameters)
    assert gate.reached.wait(PATIENCE)
    stepping = threading.Thread(target=optimizer.step)
    stepping.start()
    stepping.join(0.05)
    assert stepping.is_alive()
    assert all(map(torch.equal, parameters, before))
    gate.open()
    stepping.join()
    begun.wait()


@pytest.mark.parametrize("gate", range(COUNT), indirect=True)
@pytest.mark.parametrize("written", range(COUNT))
def test_what_something_else_wrote_is_not_saved(gate: Gate, written: int) -> None:
    parameters, _ = _trained()
    begun, _ = _begin(parameters)
    assert gate.reached.wait(PATIENCE)
    with torch.no_grad():
        parameters[written].add_(1)
    gate.open()
    with pytest.raises(TornSnapshotError) as caught:
        begun.settle()
    assert caught.value.where == str(written)
    with pytest.raises(TornSnapshotError):
        begun.wait()
    # Told once: the save is given up, training may go on.
    begun.settle()


def test_nobody_is_told_that_all_is_well_while_a_write_may_be_under_way() -> None:
    """Torch counts a version when the write is through: here memory changes before the count."""
    parameters, _ = _trained()
    begun, _ = _begin(parameters)
    parameters[0].detach().numpy()[:] = -1
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            begun.wait()
        except TornSnapshotError as e:
            raised.append(e)

    waiting = threading.Thread(target=wait)
    waiting.start()
    waiting.join(0.2)
    with torch.no_grad():
        parameters[0].add_(0)
    with pytest.raises(TornSnapshotError):
        begun.settle()
    waiting.join()
    assert raised


def test_without_another_step_a_save_is_through_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_ONE_WRITE", 0.0)
    parameters, _ = _trained()
    begun, targets = _begin(parameters)
    begun.wait()
    assert all(map(torch.equal, targets, parameters))
    # And what is written later does not take that back.
    with torch.no_grad():
        parameters[0].add_(1)
    begun.wait()
    begun.settle()


@pytest.mark.parametrize("gate", [1], indirect=True)
def test_each_of_several_threads_waits(gate: Gate) -> None:
    """As with optimizers in backward: each device has a thread of its own."""
    parameters, _ = _trained()
    optimizers = [torch.optim.SGD([p], lr=1.0) for p in parameters]
    before = [p.detach().clone() for p in parameters]
    begun, targets = _begin(parameters)
    assert gate.reached.wait(PATIENCE)
    stepping = [threading.Thread(target=optimizer.step) for optimizer in optimizers]
    for thread in stepping:
        thread.start()
    for thread in stepping:
        thread.join(0.05)
        assert thread.is_alive()
    gate.open()
    for thread in stepping:
        thread.join()
    begun.wait()
    assert all(map(torch.equal, targets, before))
    assert begun.waited > 0


def test_hooks_of_others_are_left_alone() -> None:
    """Two saves at once, and a hook that was made after them."""
    parameters, optimizer = _trained()
    begun = [_begin(parameters)[0] for _ in range(2)]
    called = []
    hook = of_torch.register_optimizer_step_pre_hook(lambda *_: called.append(1))
    optimizer.step()
    hook.remove()
    assert called == [1]
    for each in begun:
        each.wait()


def test_an_optimizer_that_steps_again_waits_for_nothing() -> None:
    gc.collect()
    parameters, optimizer = _trained()
    begun, _ = _begin(parameters)
    assert [*module._UNSETTLED] == [begun]
    optimizer.step()
    assert [*module._UNSETTLED] == []
    begun, _ = _begin(parameters)
    del begun
    gc.collect()
    assert [*module._UNSETTLED] == []


def test_an_error_of_a_copy_is_told_to_who_waits() -> None:
    source = torch.zeros(3)
    copy = Copy(name="x", source=source, target=torch.zeros(4), watched=(source,))
    begun = Copies([], [copy])
    begun.settle()
    with pytest.raises(RuntimeError, match="size"):
        begun.wait()


def test_small_tensors_and_those_without_versions_are_not_late() -> None:
    large = torch.zeros(2**14)
    assert may_be_late(large, [large])
    assert not may_be_late(large, [])
    assert not may_be_late(large[1:], [large])
    with torch.inference_mode():
        assert not may_be_late(large, [torch.zeros(2**14)])


@pytest.mark.parametrize("gate", [0], indirect=True)
def test_a_slot_is_not_used_again_before_its_copies_are_done(gate: Gate) -> None:
    """As when Ray drops a report without uploading it."""
    slot, tensor = Slot(), torch.arange(2.0**15)
    image = image_of(part_of({"x": tensor}))
    slot.fill(image.layout, {"part/x": tensor}, late={"part/x": (tensor,)})
    assert gate.reached.wait(PATIENCE)
    got: list[torch.Tensor] = []
    again = threading.Thread(target=lambda: got.append(slot.reserve(10)))
    again.start()
    again.join(0.05)
    assert got == []
    gate.open()
    again.join()
    assert len(got) == 1


def test_nothing_is_written_of_a_torn_image() -> None:
    storage, slot, tensor = MemoryFilesystem(), Slot(), torch.arange(2.0**15)
    image = image_of(part_of({"x": tensor}))
    data = slot.fill(image.layout, {"part/x": tensor}, late={"part/x": (tensor,)})
    tensor.add_(1)
    torn = replace(image, data=data, wait=slot.copies.wait)
    with pytest.raises(TornSnapshotError):
        slot.settle()
    with pytest.raises(TornSnapshotError):
        write_image(storage, "there", torn, timeout=1.0)
    assert storage.list("there") == []


def test_late_is_what_prepared_optimizers_hold() -> None:
    bundle = StateBundle()
    model, average = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.Linear(3, 3)
    head = nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1))
    other = torch.optim.SGD(head.parameters(), momentum=0.9)
    for each in (model, average, head):
        bundle.add_model(each)
    bundle.add_optimizer(optimizer)
    bundle.add_object("other", other, kind="object")
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    captured = bundle.capture(with_gradients=True)
    parameters = [name for name, _ in model.named_parameters()]
    moments = ("exp_avg", "exp_avg_sq", "step")
    assert set(bundle.written_by_optimizers(captured)) == {
        *(f"model/{name}" for name in parameters),
        *(f"optimizer/state/model.{name}/{moment}" for name in parameters for moment in moments),
    }


def _project(directory: Path) -> ProjectConfiguration:
    return ProjectConfiguration(directory, automatic_checkpoint_naming=True)


def _other() -> Checkpointer:
    ckpt = Checkpointer()
    ckpt.prepare(nn.Linear(3, 3))
    return ckpt


@pytest.mark.parametrize("overlap", [False, True])
def test_a_checkpointer_tells_who_wrote_in_between(
    tmp_path: Path, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SMALL", 0)
    ckpt = Checkpointer(save=EverySteps(1), overlap=overlap, project_config=_project(tmp_path))
    bare = nn.Linear(3, 3)
    model, optimizer = ckpt.prepare(bare, torch.optim.SGD(bare.parameters()))
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    ckpt.step()
    with torch.no_grad():
        model.weight.clamp_(-0.1, 0.1)
    if overlap:
        with pytest.raises(TornSnapshotError, match="overlap=False"):
            optimizer.step()
        with pytest.raises(TornSnapshotError, match="model/weight"):
            ckpt.flush()
    else:
        optimizer.step()
        ckpt.flush()


@pytest.mark.parametrize("gate", [0], indirect=True)
def test_loading_waits_for_the_copies(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SMALL", 0)
    ckpt = Checkpointer(overlap=True, save=EverySteps(2), project_config=_project(tmp_path))
    bare = nn.Linear(3, 3)
    model, _ = ckpt.prepare(bare, torch.optim.SGD(bare.parameters()))
    _other().save_state(tmp_path / "zero")
    with torch.no_grad():
        model.weight.fill_(1)
    ckpt.step()
    ckpt.step()
    assert gate.reached.wait(PATIENCE)
    loading = threading.Thread(target=lambda: ckpt.load_state(tmp_path / "zero", parts=("model",)))
    loading.start()
    loading.join(0.05)
    assert loading.is_alive()
    gate.open()
    loading.join()
    ckpt.flush()
    saved = open_checkpoint(tmp_path / "checkpoints" / "checkpoint_0").state_dict("model")
    assert torch.equal(saved["weight"], torch.ones(3, 3))


def test_a_save_that_was_given_up_takes_no_slot_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SMALL", 0)
    ckpt = Checkpointer(
        overlap=True, slots=1, save=EverySteps(1), project_config=_project(tmp_path)
    )
    bare = nn.Linear(3, 3)
    model, optimizer = ckpt.prepare(bare, torch.optim.SGD(bare.parameters()))
    model(torch.ones(3)).sum().backward()
    ckpt.step()
    with torch.no_grad():
        model.weight.fill_(1)
    with pytest.raises(TornSnapshotError):
        optimizer.step()
    # Until the thread that writes has given up, too.
    given_up: SimpleQueue[None] = SimpleQueue()
    ckpt._session.writer._jobs.put(lambda: given_up.put(None))
    given_up.get()
    with pytest.raises(TornSnapshotError):
        ckpt.step()
    for _ in range(3):
        optimizer.step()
        ckpt.step()
    ckpt.flush()
    assert open_checkpoint(tmp_path / "checkpoints" / "checkpoint_4").step == 5


def test_a_second_save_waits_for_no_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slot is free when the first is written, and that waits for nobody's step."""
    monkeypatch.setattr(module, "_SMALL", 0)
    monkeypatch.setattr(module, "_ONE_WRITE", 10 * PATIENCE)
    ckpt = Checkpointer(
        overlap=True, slots=1, save=EverySteps(1), project_config=_project(tmp_path)
    )
    bare = nn.Linear(3, 3)
    ckpt.prepare(bare, torch.optim.SGD(bare.parameters()))
    ckpt.step()
    saving = threading.Thread(target=ckpt.step, daemon=True)
    saving.start()
    saving.join(PATIENCE)
    assert not saving.is_alive()
    ckpt.flush()


def test_what_an_optimizer_waited_is_a_cost_of_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = Checkpointer(overlap=True, save=EverySteps(1), project_config=_project(tmp_path))
    ckpt.prepare(nn.Linear(3, 3))
    ckpt.step()
    ckpt.flush()
    (alone,) = ckpt._heartbeat._blocked
    monkeypatch.setattr(ckpt._slots, "take_waited", lambda: 1000.0)
    ckpt.step()
    ckpt.flush()
    assert ckpt._heartbeat._blocked[0] == alone + 1000.0


def test_a_first_save_inside_an_evaluation_spoils_no_later_one(tmp_path: Path) -> None:
    ckpt = Checkpointer()
    model = ckpt.prepare(nn.Linear(3, 3))
    with torch.inference_mode():
        ckpt.save_state(tmp_path / "a")
    ckpt.save_state(tmp_path / "b")
    assert torch.equal(open_checkpoint(tmp_path / "b").state_dict("model")["bias"], model.bias)


def test_overlap_is_yes_or_no() -> None:
    with pytest.raises(ConfigurationError, match="overlap"):
        Checkpointer(overlap="yes")  # type: ignore[arg-type]
