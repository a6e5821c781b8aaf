"""Ctrl-C in the middle of a save, caught by the loop: later saves are made, and are right."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ray_accel_ckpt import open_checkpoint
from ray_accel_ckpt.image import copies, staging
from ray_accel_ckpt.runtime import sinks
from ray_accel_ckpt.storage import background
from tests.pure.helpers import checkpointer, checkpoints


def _then_interrupted(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `function`, and when all is done and before anyone has what it returns, Ctrl-C."""

    def called(*args: Any, **options: Any) -> None:
        function(*args, **options)
        raise KeyboardInterrupt

    return called


def _interrupted(*args: Any, **options: Any) -> None:
    raise KeyboardInterrupt


def _strike(patched: pytest.MonkeyPatch, where: str) -> None:
    acquire, fill, freeze = staging.SlotPool.acquire, staging.Slot.fill, sinks.freeze
    submit = background.BackgroundWriter.submit
    match where:
        case "slot taken":
            patched.setattr(staging.SlotPool, "acquire", _then_interrupted(acquire))
        case "copied":
            patched.setattr(staging.Slot, "fill", _then_interrupted(fill))
        case "frozen":
            patched.setattr(sinks, "freeze", _then_interrupted(freeze))
        case "not handed over":
            patched.setattr(background.BackgroundWriter, "submit", _interrupted)
        case "handed over":
            patched.setattr(background.BackgroundWriter, "submit", _then_interrupted(submit))


@pytest.mark.parametrize(
    "where", ["slot taken", "copied", "frozen", "not handed over", "handed over"]
)
def test_no_slot_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    ckpt = checkpointer(tmp_path, every=1, slots=1)
    model = ckpt.prepare(nn.Linear(1, 1))
    with monkeypatch.context() as patched:
        _strike(patched, where)
        with pytest.raises(KeyboardInterrupt):
            ckpt.step()
    with torch.no_grad():
        model.weight.fill_(3)
    # By another thread: if there is no slot, this test fails and does not hang.
    saving = threading.Thread(target=ckpt.step, daemon=True)
    saving.start()
    saving.join(60)
    assert not saving.is_alive()
    ckpt.flush()
    newest = open_checkpoint(tmp_path / "checkpoints" / checkpoints(tmp_path)[-1])
    assert newest.state_dict("model")["weight"].item() == 3


def test_what_an_interrupted_save_still_copies_goes_into_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Struck when a thread has begun to copy, and nobody knows of it yet."""
    ckpt = checkpointer(tmp_path, every=1, slots=1, overlap=True)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer = ckpt.prepare(model, optimizer)
    monkeypatch.setattr(copies, "_SMALL", 0)
    going_on, ended = threading.Event(), threading.Event()
    run, write_image = copies._run, background.write_image

    def late(several: Any) -> None:
        assert going_on.wait(60)
        run(several)
        ended.set()

    with monkeypatch.context() as patched:
        patched.setattr(copies, "_run", late)
        patched.setattr(staging, "Copies", _then_interrupted(staging.Copies))
        with pytest.raises(KeyboardInterrupt):
            ckpt.step()
    stepped = threading.Event()

    def write(*args: Any, **options: Any) -> None:
        assert stepped.wait(60)
        going_on.set()
        assert ended.wait(60)
        write_image(*args, **options)

    monkeypatch.setattr(background, "write_image", write)
    saved = model.weight.clone()
    ckpt.step()
    model.weight.grad = torch.ones_like(model.weight)
    # Without settling the save that is gone: it would wait for it.
    copies._UNSETTLED.clear()
    with torch.no_grad():
        ckpt._slots.settle()
        model.weight.add_(1)
    stepped.set()
    ckpt.flush()
    newest = open_checkpoint(tmp_path / "checkpoints" / checkpoints(tmp_path)[-1])
    assert torch.equal(newest.state_dict("model")["weight"], saved)
