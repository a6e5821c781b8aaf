"""`torch.set_default_device`: what the library needs on the host is there all the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ray_accel_ckpt import Checkpointer, ProjectConfiguration, open_checkpoint
from ray_accel_ckpt.image.shared import SharedSlot
from tests.pure.helpers import digest


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """Memory on the meta device has no bytes: whoever took it for the host's would fail."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def _made(directory: Path, *, broadcast: bool = True) -> tuple[Checkpointer, Any, Any, Any]:
    """A model with something frozen that is worth a file, what trains it, and its data."""
    with torch.device("cpu"):
        model = nn.Sequential(nn.Linear(4, 2), nn.Linear(600, 600).requires_grad_(False))
        optimizer = torch.optim.AdamW(model.parameters())
        data = TensorDataset(torch.arange(40.0).reshape(10, 4))
    project = ProjectConfiguration(directory, automatic_checkpoint_naming=True)
    ckpt = Checkpointer(project_config=project, broadcast=broadcast)
    # torch's own samplers shuffle on the default device; the order here is this library's.
    loader = DataLoader(data, batch_size=2, shuffle=True)
    return ckpt, *ckpt.prepare(model, optimizer, loader)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("broadcast", [True, False])
def test_a_state_is_saved_and_comes_back(tmp_path: Path, broadcast: bool) -> None:
    ckpt, model, optimizer, loader = _made(tmp_path)
    whole = []
    for number, (x,) in enumerate(loader):
        whole.append(x)
        with torch.device("cpu"):
            model[0](x).sum().backward()
            optimizer.step()
        if number in (1, 2):
            path = ckpt.save_state()
            saved = digest(model, optimizer)
        if number == 2:
            break
    again, model, optimizer, loader = _made(tmp_path, broadcast=broadcast)
    assert again.load_state()
    assert digest(model, optimizer) == saved
    rest = [x for (x,) in loader]
    assert sorted(float(x) for batch in (*whole, *rest) for x in batch[:, 0]) == [
        4.0 * i for i in range(10)
    ]
    stored = open_checkpoint(path).state_dict("model")
    assert all(torch.equal(stored[name], t) for name, t in model.state_dict().items())


@pytest.mark.usefixtures("elsewhere")
def test_shared_memory_is_the_hosts(tmp_path: Path) -> None:
    slot = SharedSlot(lambda: tmp_path / "slot")
    assert slot.reserve(100).device.type == "cpu"
    slot.free()
    slot = SharedSlot(lambda: None)
    assert slot.reserve(100).device.type == "cpu"
