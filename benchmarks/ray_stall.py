"""How long a save holds up training under Ray Train, beside what reports checkpoints to Ray.

Two workers. Each way is a run of its own, since Lightning and Transformers have loops of their
own; between two saves training goes on for some seconds, so that none waits for the one before:

    python benchmarks/ray_stall.py --megabytes 200 --rounds 5

See benchmarks/README.md for what is measured.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import WIDTH, machine, network, spread

PAUSE = 4.0
"""Seconds of training between two saves: Ray takes a report with each poll of 2 s."""


class Timed:
    """Writes down the seconds of each save of this worker."""

    def __init__(self, out: str) -> None:
        import ray.train

        rank = ray.train.get_context().get_world_rank()
        self._log = Path(out, f"blocked-{rank}")
        self._begun = 0.0

    def begin(self) -> None:
        self._begun = time.perf_counter()

    def end(self) -> None:
        with self._log.open("a") as log:
            print(json.dumps(time.perf_counter() - self._begun), file=log)


# --- ways ------------------------------------------------------------------------------


def _loop(config: dict[str, Any], make: Callable[..., Callable[[int], None]]) -> None:
    """A plain loop of a data parallel model; `make` returns what saves."""
    from ray.train.torch import prepare_model

    torch.set_num_threads(1)
    bare = network(config["megabytes"])
    model = prepare_model(bare)
    optimizer = torch.optim.Adam(model.parameters())
    save = make(model, optimizer)
    timed = Timed(config["out"])
    for step in range(1, config["saves"] + 1):
        model(torch.ones(1, WIDTH)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        timed.begin()
        save(step)
        timed.end()
        time.sleep(PAUSE)


def ours(config: dict[str, Any]) -> None:
    from ray_accel_ckpt import Checkpointer, EverySteps

    def make(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[int], None]:
        ckpt = Checkpointer(save=EverySteps(1), overlap=config["overlap"])
        ckpt.prepare(model, optimizer)
        return lambda step: ckpt.step()

    _loop(config, make)


def torch_save(config: dict[str, Any]) -> None:
    """Rank 0 writes to a temporary directory, and all report: as in Ray's guide."""
    import ray.train
    from ray.train import CheckpointUploadMode

    mode = CheckpointUploadMode[config["mode"]]
    rank = ray.train.get_context().get_world_rank()

    def make(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[int], None]:
        def save(step: int) -> None:
            directory = tempfile.mkdtemp(dir=config["out"])
            saved = None
            if rank == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, Path(directory, "state.pt"))
                saved = ray.train.Checkpoint.from_directory(directory)
            ray.train.report(
                {},
                checkpoint=saved,
                checkpoint_upload_mode=mode,
                delete_local_checkpoint_after_upload=True,
            )

        return save

    _loop(config, make)


def accelerate(config: dict[str, Any]) -> None:
    """`save_state` to a temporary directory, and all report, as in Ray's guide to Accelerate."""
    import ray.train
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)

    def make(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[int], None]:
        accelerator.prepare(model.module, optimizer)

        def save(step: int) -> None:
            directory = tempfile.mkdtemp(dir=config["out"])
            accelerator.save_state(directory)
            saved = ray.train.Checkpoint.from_directory(directory)
            ray.train.report({}, checkpoint=saved, delete_local_checkpoint_after_upload=True)

        return save

    _loop(config, make)


def transformers(config: dict[str, Any]) -> None:
    """`Trainer`, and the callback that Ray has for it."""
    from ray.train.huggingface.transformers import RayTrainReportCallback, prepare_trainer
    from torch.utils.data import Dataset
    from transformers import Trainer, TrainingArguments

    timed = Timed(config["out"])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network(config["megabytes"])

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.network(x).sum()}

    class Data(Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return 2 * config["saves"]

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"x": torch.ones(WIDTH)}

    class TimedTrainer(Trainer):  # type: ignore[misc]
        def _save_checkpoint(self, *args: Any, **options: Any) -> None:
            timed.begin()
            super()._save_checkpoint(*args, **options)

    class TimedCallback(RayTrainReportCallback):  # type: ignore[misc]
        def on_save(self, *args: Any, **options: Any) -> None:
            super().on_save(*args, **options)
            timed.end()
            time.sleep(PAUSE)

    arguments = TrainingArguments(
        output_dir=f"{config['out']}/trainer",
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        max_steps=config["saves"],
        per_device_train_batch_size=1,
        optim="adamw_torch",
        remove_unused_columns=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = TimedTrainer(
        model=Model(), args=arguments, train_dataset=Data(), callbacks=[TimedCallback()]
    )
    prepare_trainer(trainer).train()


def lightning(config: dict[str, Any]) -> None:
    """Lightning's `Trainer`, and the callback that Ray has for it."""
    import lightning.pytorch as pl
    from ray.train.lightning import (
        RayDDPStrategy,
        RayLightningEnvironment,
        RayTrainReportCallback,
        prepare_trainer,
    )
    from torch.utils.data import DataLoader, TensorDataset

    timed = Timed(config["out"])

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = network(config["megabytes"])

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            return self.network(batch[0]).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

    class TimedCallback(RayTrainReportCallback):  # type: ignore[misc]
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            timed.begin()
            super().on_train_epoch_end(trainer, pl_module)
            timed.end()
            time.sleep(PAUSE)

    trainer = pl.Trainer(
        max_epochs=config["saves"],
        accelerator="cpu",
        devices="auto",
        strategy=RayDDPStrategy(),
        plugins=[RayLightningEnvironment()],
        callbacks=[TimedCallback()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
    )
    data = DataLoader(TensorDataset(torch.ones(2, WIDTH)), batch_size=1)
    prepare_trainer(trainer).fit(Module(), data)


WAYS: dict[str, tuple[Callable[[dict[str, Any]], None], dict[str, Any]]] = {
    "ray_accel_ckpt step": (ours, {"overlap": False}),
    "ray_accel_ckpt, overlap": (ours, {"overlap": True}),
    "torch.save + report": (torch_save, {"mode": "SYNC"}),
    "torch.save + report, ASYNC": (torch_save, {"mode": "ASYNC"}),
    "Accelerate save_state + report": (accelerate, {}),
    "Transformers, Ray's callback": (transformers, {}),
    "Lightning, Ray's callback": (lightning, {}),
}


# --- measuring -------------------------------------------------------------------------


def measure(name: str, directory: Path, *, megabytes: float, rounds: int) -> list[float]:
    """Seconds of each save, the slower worker's. The first is not counted."""
    from ray.train import CheckpointConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    loop, options = WAYS[name]
    directory.mkdir(parents=True)
    TorchTrainer(
        loop,
        train_loop_config={
            "out": str(directory),
            "megabytes": megabytes,
            "saves": rounds + 1,
            **options,
        },
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name="run",
            storage_path=str(directory / "storage"),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    ).fit()
    ranks = [
        [json.loads(line) for line in (directory / f"blocked-{rank}").open()] for rank in range(2)
    ]
    return [max(each) for each in zip(*ranks, strict=True)][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=200, help="state (default: 200)")
    parser.add_argument("--rounds", type=int, default=5, help="saves that count (default: 5)")
    parser.add_argument("--directory", help="storage (default: a new one in /var/tmp)")
    args = parser.parse_args()
    import ray

    parent = Path(args.directory or tempfile.mkdtemp(prefix="ray_stall-", dir="/var/tmp"))
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    print(f"{machine(parent)}; 2 workers, {args.megabytes:g} MB, {args.rounds} saves", flush=True)
    found: dict[str, list[float]] = {}
    for name in random.Random(0).sample(list(WAYS), len(WAYS)):
        directory = parent / f"{list(WAYS).index(name)}"
        found[name] = measure(name, directory, megabytes=args.megabytes, rounds=args.rounds)
        shutil.rmtree(directory, ignore_errors=True)
    print(f"{'':32}{'blocked, ms':>26}")
    for name in sorted(WAYS, key=lambda name: statistics.median(found[name])):
        print(f"{name:32}{spread(found[name]):>26}", flush=True)


if __name__ == "__main__":
    main()
