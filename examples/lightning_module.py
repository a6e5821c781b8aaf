"""A Lightning fit under Ray loses a worker in mid-epoch and ends with the same bits.

Trains a small convolutional network on scikit-learn's handwritten digits with two Ray
Train workers, twice: once untouched, once with a worker killed (SIGKILL) on the way.
Then compares everything both runs ended with.

    python examples/lightning_module.py
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import ray
import torch
from ray.train import ScalingConfig
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, prepare_trainer
from ray.train.torch import TorchTrainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ray_accel_ckpt import Checkpointer, EverySteps, open_checkpoint, run_config
from ray_accel_ckpt.integrations.lightning import CheckpointerCallback

EPOCHS, BATCH, SAVE_EVERY, KILL_AT = 4, 32, 20, 70


class Digits(Dataset[tuple[torch.Tensor, int]]):
    """8x8 images, shifted at random: augmentation must come back the same, too."""

    def __init__(self) -> None:
        digits = load_digits()
        self.images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        self.labels = digits.target.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        shift = (random.randint(-1, 1), random.randint(-1, 1))
        return torch.roll(self.images[index], shift, dims=(1, 2)), self.labels[index]


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 128, 3, padding=1),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(512, 10),
        )

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        images, labels = batch
        scores = self.layers(images)
        right = (scores.argmax(1) == labels).float().mean()
        self.log("accuracy", right, on_step=True, on_epoch=True, sync_dist=True)
        return nn.functional.cross_entropy(scores, labels)

    def train_dataloader(self) -> Any:
        return DataLoader(Digits(), batch_size=BATCH, shuffle=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Note(pl.Callback):
    """For the driver to show where this worker is. Not part of training."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        values = {"pid": os.getpid(), "step": trainer.global_step, "epoch": trainer.current_epoch}
        self._path.write_text(json.dumps(values))


def train_loop_per_worker(config: dict[str, Any]) -> None:
    pl.seed_everything(0)
    torch.set_num_threads(1)
    rank = ray.train.get_context().get_world_rank()
    notes = Path(config["notes"])
    ckpt = Checkpointer(save=EverySteps(SAVE_EVERY))
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=1,
        strategy=RayDDPStrategy(),
        plugins=[RayLightningEnvironment()],
        callbacks=[Note(notes / f"rank-{rank}"), CheckpointerCallback(ckpt)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    prepare_trainer(trainer).fit(Net())
    if rank == 0 and ckpt.resumed_from is not None:
        (notes / "resumed").write_text(ckpt.resumed_from)


class Killer(threading.Thread):
    """Kills rank 1's worker with SIGKILL at step `KILL_AT`."""

    def __init__(self, notes: Path) -> None:
        super().__init__(daemon=True)
        self._note = notes / "rank-1"
        self.killed: dict[str, Any] | None = None
        self.done = threading.Event()

    def run(self) -> None:
        while self.killed is None and not self.done.wait(0.002):
            with contextlib.suppress(OSError, ValueError):
                note = json.loads(self._note.read_text())
                if note["step"] >= KILL_AT:
                    os.kill(note["pid"], signal.SIGKILL)
                    self.killed = note


def fit(name: str, storage: str, *, kill: bool) -> tuple[Any, Path, dict[str, Any] | None]:
    notes = Path(storage, f"notes-{name}")
    notes.mkdir(parents=True)
    killer = Killer(notes)
    if kill:
        killer.start()
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"notes": str(notes)},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=run_config(name=name, storage_path=storage),
    )
    try:
        return trainer.fit(), notes, killer.killed
    finally:
        killer.done.set()


def digest(checkpoint: Any) -> str:
    """SHA-256 over every tensor and value of the final state, both workers' own too."""
    saved = open_checkpoint(checkpoint)
    saved.verify()
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif hasattr(value, "items"):
            for key, each in value.items():
                digest.update(repr(key).encode())
                add(each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                add(each)
        else:
            digest.update(repr(value).encode())

    for part in saved.parts:
        for rank in range(saved.world_size if part in ("rng", "logged") else 1):
            add(saved.state_dict(part, rank=rank))
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storage", help="directory for both runs (default: a temporary one)")
    storage = parser.parse_args().storage or tempfile.mkdtemp(prefix="lightning_module-")
    started = time.monotonic()
    print("starting Ray on this machine", flush=True)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    print(f"run 1: two workers, untouched, saving to {storage}/untouched", flush=True)
    untouched, _, _ = fit("untouched", storage, kill=False)
    print(f"run 2: the same, and a worker is killed in mid-epoch, {storage}/killed", flush=True)
    killed, notes, at = fit("killed", storage, kill=True)
    ray.shutdown()

    if at is None or not (notes / "resumed").exists():
        raise SystemExit("the run ended before the worker could be killed: nothing was shown")
    first, second = digest(untouched.checkpoint), digest(killed.checkpoint)
    print(f"killed at step {at['step']}, in epoch {at['epoch']}")
    print(f"resumed from {Path((notes / 'resumed').read_text()).name}")
    print(f"accuracy in the last epoch: {killed.metrics['accuracy_epoch']:.4f}")
    print(f"untouched run ended with {first}")
    print(f"killed run ended with    {second}")
    print(f"{time.monotonic() - started:.0f} s in all")
    print(f"identical bits: {'yes' if first == second else 'NO'}")
    raise SystemExit(first != second)


if __name__ == "__main__":
    main()
