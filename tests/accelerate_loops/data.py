"""What both loops train: a small network on scikit-learn's handwritten digits."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

EPOCHS, BATCH, SAVE_EVERY, SAMPLES = 2, 16, 3, 150


class Progress:
    """Where the loop stands."""

    def __init__(self) -> None:
        self.epoch = self.batch = self.step = 0

    def state_dict(self) -> dict[str, int]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
        vars(self).update(state)


def made() -> tuple[nn.Module, torch.optim.Optimizer, Any, DataLoader[Any], DataLoader[Any]]:
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32)[: 2 * SAMPLES] / 16
    labels = torch.tensor(digits.target)[: 2 * SAMPLES]
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.7)
    train = DataLoader(
        TensorDataset(images[:SAMPLES], labels[:SAMPLES]), batch_size=BATCH, shuffle=True
    )
    held_out = DataLoader(
        TensorDataset(images[SAMPLES:], labels[SAMPLES:]), batch_size=BATCH, drop_last=False
    )
    return model, optimizer, scheduler, train, held_out
