"""A training job for a cluster: the script that `cluster/` submits, and one to start your own from.

    python examples/digits_job.py --storage s3://bucket/runs --name digits

The pair (storage, name) is the run. Started again with the same pair, after a lost worker, driver
or cluster, it goes on where it was; once it is done, it only says so.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ray_accel_ckpt import Checkpointer, EverySteps, open_checkpoint, run_config


def train_loop_per_worker(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(images, torch.tensor(digits.target)), shuffle=True)

    ckpt = Checkpointer(save=EverySteps(50))
    model, optimizer = ckpt.prepare(model, optimizer)
    # The batch over all workers stays the same, whatever their number.
    loader = ckpt.prepare(loader, global_batch_size=32)
    ckpt.load_state()
    for epoch in ckpt.epochs(config["epochs"]):
        for pixels, labels in loader:
            loss = nn.functional.cross_entropy(model(pixels), labels)
            ckpt.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            ckpt.step(metrics={"loss": loss.item(), "epoch": epoch})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storage", required=True, help="directory or URI that all nodes reach")
    parser.add_argument("--name", required=True, help="the run's name: the same one goes on")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--gpu", action="store_true", help="one GPU a worker")
    chosen = parser.parse_args()
    result = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"epochs": chosen.epochs},
        scaling_config=ScalingConfig(num_workers=chosen.workers, use_gpu=chosen.gpu),
        run_config=run_config(name=chosen.name, storage_path=chosen.storage),
    ).fit()
    saved = open_checkpoint(result.checkpoint)
    print(f"run {chosen.name} is done: step {saved.step}, saved by {saved.world_size} workers")


if __name__ == "__main__":
    main()
