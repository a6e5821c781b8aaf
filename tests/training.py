"""One small training loop with everything that makes resuming hard, for gloo and Ray tests.

Batch normalisation (buffers that differ between ranks), dropout, shuffling,
random augmentation from three sources, AdamW, a schedule, a scaler-free CPU run.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ray_accel_ckpt import Checkpointer

SAMPLES, BATCH, EPOCHS = 94, 4, 3


class Augmented(Dataset[tuple[torch.Tensor, int]]):
    """Samples that come out differently each time, unless the streams are the same."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        fixed = torch.randn(8, generator=torch.Generator().manual_seed(index))
        noise = random.random() + float(np.random.rand()) + torch.rand(8)
        return fixed + 0.1 * noise, index % 3


def network() -> nn.Module:
    # Declared in an order unlike that of use, so that gradients become ready in another order.
    layers = {"last": nn.Linear(300, 3), "first": nn.Linear(8, 300), "norm": nn.BatchNorm1d(300)}
    drop = nn.Dropout(0.3)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict(layers)
            self.drop = drop

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.relu(self.layers["norm"](self.layers["first"](x)))
            return self.layers["last"](self.drop(hidden))

    return Net()


def seed_everything(rank: int) -> None:
    torch.manual_seed(7 + rank)
    random.seed(7 + rank)
    np.random.seed(7 + rank)


def train(
    ckpt: Checkpointer,
    rank: int,
    *,
    epochs: int = EPOCHS,
    loader_workers: int = 0,
    on_step: Callable[[int], None] = lambda step: None,
    on_epoch_end: Callable[[int], None] = lambda epoch: None,
    on_loaded: Callable[[bool], None] = lambda resumed: None,
    shard: Callable[[nn.Module], nn.Module] = lambda model: model,
    metrics: Callable[[int], dict[str, Any]] = lambda step: {},
) -> str:
    """Train and return a digest of everything this rank ended with."""
    torch.manual_seed(7)
    model = shard(network())
    seed_everything(rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(Augmented(), batch_size=BATCH, shuffle=True, num_workers=loader_workers)
    model, optimizer, loader = ckpt.prepare(model, optimizer, loader)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    ckpt.register_for_checkpointing(scheduler)
    on_loaded(ckpt.load_state())
    seen = hashlib.sha256()
    for epoch in ckpt.epochs(epochs):
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x), y)
            ckpt.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            seen.update(x.numpy().tobytes())
            ckpt.step(metrics=lambda loss=loss: {"loss": loss, **metrics(ckpt.global_step)})
            on_step(ckpt.global_step)
        on_epoch_end(epoch)
    return digest(model, optimizer, scheduler)


def digest(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> str:
    """SHA-256 over parameters, buffers, moments, schedule and this rank's random streams."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            value = value.to_local() if hasattr(value, "to_local") else value
            found.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key, each in value.items():
                found.update(repr(key).encode())
                add(each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                add(each)
        else:
            found.update(repr(value).encode())

    add({name.removeprefix("module."): t for name, t in model.state_dict().items()})
    add(optimizer.state_dict())
    add(scheduler.state_dict())
    add([torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()])
    return found.hexdigest()
