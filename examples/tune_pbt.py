"""Population based training on real data: a trial takes over another's weights, one is killed.

Ray Tune searches a learning rate for a small convolutional network on scikit-learn's
handwritten digits with two trials of one Ray Train worker each. The trial that does
worse is given the checkpoint of the better one, and a learning rate near the
better one's. On the way one trial is killed (SIGKILL) and goes on.

    python examples/tune_pbt.py
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.train import ScalingConfig
from ray.tune.schedulers import PopulationBasedTraining
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ray_accel_ckpt import Checkpointer, EverySteps, open_checkpoint
from ray_accel_ckpt.integrations.tune import trainable

EPOCHS, BATCH, SAVE_EVERY = 4, 32, 28
EXPLOIT_EVERY = 5  # reports, of which there is one a save
KILL_AT = 7


def digits() -> TensorDataset:
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    return TensorDataset(images, torch.tensor(found.target))


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(512, 10),
    )


def train_loop_per_worker(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"])
    loader = DataLoader(digits(), batch_size=BATCH, shuffle=True)

    ckpt = Checkpointer(save=EverySteps(SAVE_EVERY))
    model, optimizer, loader = ckpt.prepare(model, optimizer, loader)
    if ckpt.load_state():
        note(config["notes"], loaded=ckpt.resumed_from, weights=digest(model.state_dict()))
        # What was loaded may be another trial's, its learning rate too. This one's decides.
        for group in optimizer.param_groups:
            group["lr"] = config["lr"]
    for _ in ckpt.epochs(EPOCHS):
        right = seen = 0
        for images, labels in loader:
            scores = model(images)
            ckpt.backward(nn.functional.cross_entropy(scores, labels))
            optimizer.step()
            optimizer.zero_grad()
            right += int((scores.argmax(1) == labels).sum())
            seen += len(labels)
            ckpt.step(metrics={"accuracy": right / seen, "step": ckpt.global_step + 1})


def note(directory: str, **values: Any) -> None:
    """For the driver to show what was loaded. Not part of training."""
    Path(directory, f"{time.time_ns()}.json").write_text(json.dumps(values))


def digest(weights: Mapping[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().contiguous()
        found.update(name.removeprefix("module.").encode())
        found.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Watcher(tune.Callback):
    """Shows each report, and kills the process of the first trial to make `KILL_AT` of them."""

    def __init__(self) -> None:
        self.killed: str | None = None

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        print(
            f"    trial {short(trial.trial_id)}: step {result['step']:3}, "
            f"lr {trial.config['lr']:.6f}, accuracy {result['accuracy']:.3f}",
            flush=True,
        )
        if result["training_iteration"] == KILL_AT and self.killed is None:
            self.killed = short(trial.trial_id)
            os.kill(result["pid"], signal.SIGKILL)
            print(f"    killed trial {self.killed}; Tune starts it again", flush=True)


def short(trial_id: str) -> str:
    return trial_id.rpartition("_")[2].lstrip("0") or "0"


def fit(storage: str, notes: Path, watcher: Watcher) -> tune.ResultGrid:
    scheduler = PopulationBasedTraining(
        time_attr="training_iteration",
        perturbation_interval=EXPLOIT_EVERY,
        hyperparam_mutations={"lr": tune.loguniform(1e-3, 1e-2)},
        resample_probability=0,
        synch=True,
    )
    return tune.Tuner(
        trainable(train_loop_per_worker, scaling_config=ScalingConfig(num_workers=1)),
        param_space={"lr": tune.grid_search([1e-5, 3e-3]), "notes": str(notes)},
        tune_config=tune.TuneConfig(
            metric="accuracy", mode="max", scheduler=scheduler, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name="pbt",
            storage_path=storage,
            callbacks=[watcher],
            failure_config=tune.FailureConfig(max_failures=3),
            verbose=0,
        ),
    ).fit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storage", help="directory for the experiment (default: temporary)")
    storage = parser.parse_args().storage or tempfile.mkdtemp(prefix="tune_pbt-")
    notes = Path(storage, "notes")
    notes.mkdir(parents=True)
    watcher = Watcher()
    started = time.monotonic()
    # Tune's own words about a trial that died fill a page.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    print("starting Ray on this machine", flush=True)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    print(f"two trials of one worker each, saving to {storage}/pbt", flush=True)
    results = fit(storage, notes, watcher)
    ray.shutdown()

    exploits, exact = 0, True
    for file in sorted(notes.glob("*.json")):
        found = json.loads(file.read_text())
        loaded = open_checkpoint(found["loaded"])
        exact = exact and digest(loaded.state_dict("model")) == found["weights"]
        run = Path(found["loaded"]).parent.name
        print(f"a trial went on from step {loaded.step} of run {run}")
    for origin in sorted(Path(storage, "pbt").glob("*/*/origin.json")):
        exploits += 1
        taken = Path(json.loads(origin.read_text())["checkpoint"])
        print(f"run {origin.parent.name} took over {taken.name} of run {taken.parent.name}")
    for result in results:
        saved = open_checkpoint(result.checkpoint)
        saved.verify()
        print(
            f"a trial ended at step {saved.step} with lr {result.config['lr']:.6f} and accuracy "
            f"{result.metrics['accuracy']:.3f}"
        )
    copied = [*Path(storage, "pbt").glob("*/checkpoint_*/*.safetensors")]
    print(f"{time.monotonic() - started:.0f} s in all")
    if results.errors or not exploits or watcher.killed is None:
        raise SystemExit("no trial exploited the other, or none was killed: nothing was shown")
    print(f"bytes of state copied for Tune: {sum(file.stat().st_size for file in copied)}")
    print(f"weights as they were saved, each time: {'yes' if exact else 'NO'}")
    raise SystemExit(not exact or bool(copied))


if __name__ == "__main__":
    main()
