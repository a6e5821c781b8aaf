"""Ways of setting up a Trainer that cannot be resumed exactly: refused, each with a remedy."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer
from transformers.trainer_utils import SaveStrategy

from ray_accel_ckpt.checkpointer import Checkpointer
from ray_accel_ckpt.errors import ConfigurationError

_OVERRIDDEN = ("_init_training_state", "_prepare_for_training", "_run_epoch")
"""What Trainer's loop is made of in the versions that this fits."""


def refuse_inexact(trainer: Trainer, ckpt: Checkpointer) -> None:
    """Raise `ConfigurationError` for what cannot be done exactly."""
    args = trainer.args
    missing = [name for name in _OVERRIDDEN if not hasattr(Trainer, name)]
    refused = {
        f"this version of transformers (its Trainer has no {', '.join(missing)})": (
            missing,
            "use one that this was tested with: 5.23",
        ),
        f"save_strategy={args.save_strategy.value!r}": (
            args.save_strategy != SaveStrategy.NO,
            'save_strategy="no": the Checkpointer saves, and it says when. To keep the best, '
            "give run_config a checkpoint_config with a score",
        ),
        "ignore_data_skip=True": (args.ignore_data_skip, "leave it out: skipping reads nothing"),
        "auto_find_batch_size=True": (
            args.auto_find_batch_size,
            "leave it out: each life could find another size",
        ),
        f"data_seed={args.data_seed}": (
            args.data_seed is not None,
            f"Checkpointer(seed={args.data_seed}), which the order of the data is drawn from",
        ),
        "accelerator_config with split_batches": (
            args.accelerator_config.split_batches,
            "leave it out: each worker's batches are of per_device_train_batch_size",
        ),
        "train_sampling_strategy='batch_rebalance'": (
            args.train_sampling_strategy == "batch_rebalance",
            "use another: it deals the data out to ranks itself",
        ),
        "DeepSpeed, FSDP or a tensor parallel plan": (
            trainer.is_deepspeed_enabled
            or trainer.is_fsdp_enabled
            or getattr(trainer, "is_distributed_loading_by_transformers", False),
            "use data parallelism; for FSDP2 write the loop with Checkpointer.prepare",
        ),
        "several devices in one process": (args.n_gpu > 1, "use one worker for each"),
        f"device {args.device}, while the Checkpointer's is {ckpt.device}": (
            args.device.type != ckpt.device.type,
            "leave use_cpu out: train on the device that Ray has given to the worker",
        ),
    }
    for what, (found, remedy) in refused.items():
        if found:
            raise ConfigurationError(
                f"a Trainer cannot be resumed exactly with {what}", remedy=remedy
            )


def refuse_loader(loader: Any, workers: int) -> None:
    """Raise `ConfigurationError` for a train loader whose position could not be known."""
    if not isinstance(loader, DataLoader) or getattr(loader, "_is_accelerate_prepared", False):
        raise ConfigurationError(
            f"a Trainer cannot be resumed exactly with a {type(loader).__name__} as train loader",
            why="it is no DataLoader, or Accelerate has dealt it out to ranks before",
            remedy="let get_train_dataloader() return a torch.utils.data.DataLoader",
        )
    dataset = loader.dataset
    split = getattr(dataset, "_distributed", None) is not None
    if isinstance(dataset, IterableDataset) and workers > 1 and not split:
        raise ConfigurationError(
            "an iterable dataset would be read by every worker from its beginning",
            where=type(dataset).__qualname__,
            why="Accelerate has rank 0 read and hand batches out, which has no place to go on from",
            remedy="give each worker a part of it, by "
            "datasets.distributed.split_dataset_by_node, or use a map-style dataset",
        )
