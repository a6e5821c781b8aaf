"""A real run loses a worker in the middle of an epoch and ends with the same bits.

Trains a small convolutional network on scikit-learn's handwritten digits with
two Ray Train workers, twice: once untouched, once with a worker killed
(SIGKILL) on the way. Then compares everything both runs ended with.

    python examples/resume_digits.py
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

import numpy
import ray
import torch
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ray_accel_ckpt import Checkpointer, EverySteps, open_checkpoint, run_config

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


def network() -> nn.Module:
    return nn.Sequential(
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


def note(path: Path, **values: Any) -> None:
    """For the driver to show where this worker is. Not part of training."""
    path.write_text(json.dumps({"pid": os.getpid(), **values}))


def train_loop_per_worker(config: dict[str, Any]) -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rank = ray.train.get_context().get_world_rank()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(Digits(), batch_size=BATCH, shuffle=True)

    ckpt = Checkpointer(save=EverySteps(SAVE_EVERY))
    model, optimizer, loader = ckpt.prepare(model, optimizer, loader)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, EPOCHS * len(loader))
    ckpt.register_for_checkpointing(scheduler)
    notes = Path(config["notes"])
    if ckpt.load_state() and rank == 0:
        note(notes / "resumed", step=ckpt.global_step, epoch=ckpt.epoch)
    for epoch in ckpt.epochs(EPOCHS):
        right = seen = 0
        for images, labels in loader:
            scores = model(images)
            ckpt.backward(nn.functional.cross_entropy(scores, labels))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            right += int((scores.argmax(1) == labels).sum())
            seen += len(labels)
            accuracy = right / seen
            ckpt.step(metrics={"accuracy": accuracy, "epoch": epoch})
            note(notes / f"rank-{rank}", step=ckpt.global_step, epoch=epoch, accuracy=accuracy)


class Watcher(threading.Thread):
    """Shows where the workers are, and kills rank 1's with SIGKILL at step `kill_at`."""

    def __init__(self, notes: Path, kill_at: int | None) -> None:
        super().__init__(daemon=True)
        self._notes = notes
        self._kill_at = kill_at
        self.killed: dict[str, int] | None = None
        self.resumed: int | None = None
        self.done = threading.Event()

    def run(self) -> None:
        shown = 0
        while not self.done.wait(0.002):
            first, second, resumed = (self._note(n) for n in ("rank-0", "rank-1", "resumed"))
            if self.killed is None and self._kill_at and second and second["step"] >= self._kill_at:
                os.kill(second["pid"], signal.SIGKILL)
                self.killed = second
                print(
                    f"    killed the worker of rank 1 (pid {second['pid']}) at step "
                    f"{second['step']}, in epoch {second['epoch']}; Ray starts the workers again",
                    flush=True,
                )
            if resumed and self.resumed is None:
                self.resumed = shown = resumed["step"]
                print(f"    resumed at step {shown}, in epoch {resumed['epoch']}", flush=True)
            if first and first["step"] >= shown + 15 and (self.killed is None) == (not resumed):
                shown = first["step"]
                print(
                    f"    step {shown:3}, epoch {first['epoch']}, accuracy in training "
                    f"{first['accuracy']:.3f}",
                    flush=True,
                )

    def _note(self, name: str) -> dict[str, Any] | None:
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads((self._notes / name).read_text()))
        return None


def fit(name: str, storage: str, *, kill_at: int | None) -> tuple[Any, Watcher]:
    notes = Path(storage, f"notes-{name}")
    notes.mkdir(parents=True)
    watcher = Watcher(notes, kill_at)
    watcher.start()
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"notes": str(notes)},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=run_config(name=name, storage_path=storage),
    )
    try:
        return trainer.fit(), watcher
    finally:
        watcher.done.set()
        watcher.join()


def digest(checkpoint: Any) -> str:
    """SHA-256 over every tensor and value of the final state, both workers' random streams too."""
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
        for rank in range(saved.world_size if part == "rng" else 1):
            add(saved.state_dict(part, rank=rank))
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storage", help="directory for both runs (default: a temporary one)")
    storage = parser.parse_args().storage or tempfile.mkdtemp(prefix="resume_digits-")
    started = time.monotonic()
    print("starting Ray on this machine", flush=True)
    # The workers' own output is Ray's usual flood; the notes tell what matters.
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    print(f"run 1: two workers, untouched, saving to {storage}/untouched", flush=True)
    untouched, _ = fit("untouched", storage, kill_at=None)
    print(f"run 2: the same, and a worker is killed in mid-epoch, {storage}/killed", flush=True)
    killed, watcher = fit("killed", storage, kill_at=KILL_AT)
    ray.shutdown()

    if watcher.killed is None or watcher.resumed is None:
        raise SystemExit("the run ended before the worker could be killed: nothing was shown")
    lost = watcher.killed["step"] - watcher.resumed
    first, second = digest(untouched.checkpoint), digest(killed.checkpoint)
    print(f"killed at step {watcher.killed['step']}, in epoch {watcher.killed['epoch']}")
    print(f"resumed at step {watcher.resumed}: {lost} steps were lost and done again")
    print(f"untouched run ended with {first}")
    print(f"killed run ended with    {second}")
    print(f"{time.monotonic() - started:.0f} s in all")
    print(f"identical bits: {'yes' if first == second else 'NO'}")
    raise SystemExit(first != second)


if __name__ == "__main__":
    main()
