"""A 🤗 Trainer under Ray loses a worker in mid-epoch and ends with the same bits.

Trains a small GPT-2, made from a configuration, on the source of Python's standard
library with two Ray Train workers, twice: once untouched, once with a worker killed
(SIGKILL) on the way. Then compares everything both runs ended with.

    python examples/transformers_trainer.py
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

import ray
import torch
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from ray_accel_ckpt import Checkpointer, EverySteps, open_checkpoint, run_config
from ray_accel_ckpt.integrations.transformers import checkpointed

EPOCHS, BATCH, LENGTH, SAMPLES, SAVE_EVERY, KILL_AT = 3, 4, 64, 320, 10, 55


class Source(Dataset[dict[str, torch.Tensor]]):
    """Bytes as tokens, some of them masked at random: that must come back the same, too."""

    def __init__(self) -> None:
        files = sorted(Path(os.__file__).parent.glob("*.py"))
        text = b"".join(path.read_bytes() for path in files)[: SAMPLES * LENGTH]
        self.tokens = torch.tensor(list(text)).view(SAMPLES, LENGTH)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self.tokens[index].clone()
        tokens[random.sample(range(LENGTH), 4)] = 0
        return {"input_ids": tokens, "labels": self.tokens[index]}


class Note(TrainerCallback):
    """For the driver to show where this worker is. Not part of training."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        values = {"pid": os.getpid(), "step": state.global_step, "epoch": state.epoch}
        self._path.write_text(json.dumps(values))


def train_loop_per_worker(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rank = ray.train.get_context().get_world_rank()
    notes = Path(config["notes"])
    ckpt = Checkpointer(save=EverySteps(SAVE_EVERY))
    trainer = Trainer(
        model=GPT2LMHeadModel(
            GPT2Config(
                vocab_size=256,
                n_positions=LENGTH,
                n_embd=64,
                n_layer=2,
                n_head=4,
                bos_token_id=0,
                eos_token_id=0,
            )
        ),
        args=TrainingArguments(
            output_dir=str(notes / "trainer"),
            save_strategy="no",  # The Checkpointer saves.
            per_device_train_batch_size=BATCH,
            num_train_epochs=EPOCHS,
            learning_rate=3e-3,
            logging_steps=5,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=Source(),
        callbacks=[Note(notes / f"rank-{rank}")],
    )
    checkpointed(trainer, ckpt)
    trainer.train()
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
    """SHA-256 over the final weights, moments, schedule, data position and random streams."""
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

    # Not "trainer": its log has how fast the last line's steps were.
    for part in sorted(set(saved.parts) - {"trainer"}):
        for rank in range(saved.world_size if part == "rng" else 1):
            add(saved.state_dict(part, rank=rank))
    return digest.hexdigest()


def losses(checkpoint: Any) -> list[float]:
    """What Trainer has logged."""
    log = json.loads(open_checkpoint(checkpoint).state_dict("trainer")["log_history"])
    return [line.get("loss", line.get("train_loss")) for line in log]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storage", help="directory for both runs (default: a temporary one)")
    storage = parser.parse_args().storage or tempfile.mkdtemp(prefix="transformers_trainer-")
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
    same = first == second and losses(untouched.checkpoint) == losses(killed.checkpoint)
    print(f"killed at step {at['step']}, in epoch {at['epoch']:.2f}")
    print(f"resumed from {Path((notes / 'resumed').read_text()).name}")
    print(f"losses logged: {len(losses(killed.checkpoint))}, the last {killed.metrics['loss']:.4f}")
    print(f"untouched run ended with {first}")
    print(f"killed run ended with    {second}")
    print(f"{time.monotonic() - started:.0f} s in all")
    print(f"identical bits: {'yes' if same else 'NO'}")
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
