"""A callback that lets a Lightning `Trainer` save through a `Checkpointer`, and go on exactly."""

from __future__ import annotations

from datetime import timedelta

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Checkpoint,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from ray_accel_ckpt.checkpointer import Checkpointer
from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.integrations.lightning.fit import FitState


class CheckpointerCallback(Checkpoint):  # type: ignore[misc]
    """Saves everything that ``trainer.fit()`` is made of, and brings it back before it begins.

    A save is made between two batches, after the step's validation, schedules and logging.
    The Checkpointer's steps are batches after which an optimizer has stepped. The newest
    checkpoint is loaded by ``trainer.fit()`` itself; the last state is saved at its end.

    Args:
        ckpt: nothing may be prepared with it yet.

    Raises:
        ConfigurationError: from ``trainer.fit()``: a trainer that cannot be resumed exactly.
    """

    def __init__(self, ckpt: Checkpointer) -> None:
        self._ckpt = ckpt
        self._state: FitState | None = None

    # --- Lightning's hooks -------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or trainer.fast_dev_run:
            return
        _refuse(trainer, pl_module, self._ckpt)
        if self._state is not None:
            raise ConfigurationError(
                "this callback's Checkpointer has been through a fit",
                remedy="make another trainer, callback and Checkpointer",
            )
        self._state = FitState(trainer, self._ckpt)
        self._state.install()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._state is not None:
            self._state.begin()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._state is not None:
            self._state.end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self._state is not None:
            self._state.teardown()


def _refuse(trainer: Trainer, module: LightningModule, ckpt: Checkpointer) -> None:
    """Raise `ConfigurationError` for what cannot be done exactly."""
    strategy = trainer.strategy
    supported = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy))
    refused = {
        "this version of Lightning": (
            not hasattr(trainer.fit_loop, "restarted_mid_epoch"),
            "use one that this was tested with: 2.6",
        ),
        "trainer.fit(ckpt_path=...)": (
            trainer.ckpt_path is not None,
            "leave it out: the newest checkpoint of the Checkpointer is loaded",
        ),
        f"strategy {type(strategy).__name__}": (
            not supported,
            "use one device or DDP; for FSDP2 write the loop with Checkpointer.prepare",
        ),
        "manual optimization": (
            not module.automatic_optimization,
            "write the loop with Checkpointer.prepare: which gradients wait for a step is known "
            "to nobody but training_step",
        ),
        "reload_dataloaders_every_n_epochs": (
            trainer.reload_dataloaders_every_n_epochs > 0,
            "leave it out",
        ),
        "a callback that tries values out": (
            any(isinstance(c, (BatchSizeFinder, LearningRateFinder)) for c in trainer.callbacks),
            "find the value in a fit of its own, and give it",
        ),
        # What they put in is not part of the state, nor there when a state is loaded.
        "StochasticWeightAveraging, which puts a schedule of its own in": (
            any(isinstance(c, StochasticWeightAveraging) for c in trainer.callbacks),
            "use WeightAveraging, and return a torch.optim.swa_utils.SWALR from "
            "configure_optimizers",
        ),
        "a finetuning callback, which adds groups to the optimizer": (
            any(isinstance(c, BaseFinetuning) for c in trainer.callbacks),
            "give the optimizer all parameters from the beginning, and set requires_grad of those "
            "that wait in on_train_batch_start",
        ),
        "overfit_batches": (trainer.overfit_batches > 0, "leave it out"),
        "a val_check_interval of time": (
            isinstance(trainer.val_check_interval, (str, timedelta, dict)),
            "validate every so many batches",
        ),
        f"device {strategy.root_device}, while the Checkpointer's is {ckpt.device}": (
            supported and strategy.root_device.type != ckpt.device.type,
            "use the accelerator that torch has, and Ray has given to the worker",
        ),
    }
    for what, (found, remedy) in refused.items():
        if found:
            raise ConfigurationError(f"a fit cannot be resumed exactly with {what}", remedy=remedy)
