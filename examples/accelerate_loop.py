"""An Accelerate loop loses a worker in the middle of an epoch and ends with the same bits.

A loop of 🤗 Accelerate (accumulation, clipping, its own loaders) inside Ray's TorchTrainer,
made resumable by `Checkpointer.from_accelerator`. It runs twice with two workers: once
untouched, once with a worker that is killed (SIGKILL) on the way. Then everything both
runs ended with is compared.

    python examples/accelerate_loop.py
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ray_accel_ckpt import Checkpointer, EverySteps, open_checkpoint, run_config

EPOCHS, BATCH, SAVE_EVERY, KILL_AT = 3, 32, 10, 45


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(256, 10),
    )


def digits() -> TensorDataset:
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    return TensorDataset(images, torch.tensor(found.target))


def train_loop_per_worker(config: dict[str, Any]) -> None:
    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.set_num_threads(1)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    loader = DataLoader(digits(), batch_size=BATCH, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

    ckpt = Checkpointer.from_accelerator(accelerator, save=EverySteps(SAVE_EVERY))
    life = Life(Path(config["notes"]), accelerator.process_index)
    if ckpt.load_state():
        life.resumed(ckpt.global_step, ckpt.epoch)
    for epoch in ckpt.epochs(EPOCHS):
        model.train()
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            ckpt.step(metrics={"loss": loss.item(), "epoch": epoch})
            if config["kill_at"] and ckpt.global_step >= config["kill_at"]:
                life.end_if_something_is_saved(ckpt.global_step, epoch)


class Life:
    """For this show: one life of a worker, which the second one's first ends by SIGKILL."""

    def __init__(self, notes: Path, rank: int) -> None:
        self._notes, self._rank = notes, rank

    def resumed(self, step: int, epoch: int) -> None:
        if self._rank == 0:
            (self._notes / "resumed").write_text(json.dumps({"step": step, "epoch": epoch}))

    def end_if_something_is_saved(self, step: int, epoch: int) -> None:
        note = self._notes / "killed"
        saved = list(self._notes.parent.glob("killed/checkpoint_*/manifest-*"))
        if self._rank == 1 and len(saved) >= 2 and not note.exists():
            note.write_text(json.dumps({"step": step, "epoch": epoch, "pid": os.getpid()}))
            os.kill(os.getpid(), signal.SIGKILL)


def fit(name: str, storage: str, *, kill_at: int) -> Any:
    notes = Path(storage, f"notes-{name}")
    notes.mkdir(parents=True)
    return TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"notes": str(notes), "kill_at": kill_at},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=run_config(name=name, storage_path=storage),
    ).fit()


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
    storage = parser.parse_args().storage or tempfile.mkdtemp(prefix="accelerate_loop-")
    started = time.monotonic()
    print("starting Ray on this machine", flush=True)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    print(f"run 1: two workers, untouched, saving to {storage}/untouched", flush=True)
    untouched = fit("untouched", storage, kill_at=0)
    print(f"run 2: the same, and a worker is killed in mid-epoch, {storage}/killed", flush=True)
    killed = fit("killed", storage, kill_at=KILL_AT)
    ray.shutdown()

    notes = Path(storage, "notes-killed")
    if not (notes / "killed").exists() or not (notes / "resumed").exists():
        raise SystemExit("the run ended before the worker could be killed: nothing was shown")
    end, begin = (json.loads((notes / name).read_text()) for name in ("killed", "resumed"))
    first, second = digest(untouched.checkpoint), digest(killed.checkpoint)
    print(f"killed at step {end['step']}, in epoch {end['epoch']} (pid {end['pid']})")
    print(
        f"resumed at step {begin['step']}, in epoch {begin['epoch']}: "
        f"{end['step'] - begin['step']} steps were lost and done again"
    )
    print(f"untouched run ended with {first}")
    print(f"killed run ended with    {second}")
    print(f"{time.monotonic() - started:.0f} s in all")
    print(f"identical bits: {'yes' if first == second else 'NO'}")
    raise SystemExit(first != second)


if __name__ == "__main__":
    main()
