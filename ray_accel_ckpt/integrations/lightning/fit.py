"""What a fit is made of beside model, optimizers, schedulers and data: as state, and resumed."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer import call
from torch.utils.data import DataLoader

from ray_accel_ckpt.checkpointer import Checkpointer
from ray_accel_ckpt.errors import ConfigurationError, ElasticDataError
from ray_accel_ckpt.integrations.lightning.batches import Batches
from ray_accel_ckpt.integrations.lightning.logged import Logged
from ray_accel_ckpt.runtime.prepare import prepare_model
from ray_accel_ckpt.state import rng
from ray_accel_ckpt.state.tree import same_view

_ELSEWHERE = ("state_dict", "optimizer_states", "lr_schedulers")
"""Of Lightning's checkpoint: what is saved as parts of their own."""


class FitState:
    """Of one fit."""

    def __init__(self, trainer: Trainer, ckpt: Checkpointer) -> None:
        self._trainer, self._ckpt = trainer, ckpt
        self._logged = Logged(trainer)
        self._batches: Batches | None = None
        self._counted = 0
        self._ended = self._resuming = False
        self._loaded: dict[str, Any] | None = None
        self._streams: dict[str, Any] | None = None

    # --- as an object with a state -----------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        whole = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        described = {
            name
            for each in (trainer.lightning_module, trainer.datamodule)
            if each is not None
            for name in (
                each.CHECKPOINT_HYPER_PARAMS_KEY,
                each.CHECKPOINT_HYPER_PARAMS_NAME,
                each.CHECKPOINT_HYPER_PARAMS_TYPE,
            )
        }
        # Hyperparameters are the script's to say; nothing of them is restored.
        rest = {k: v for k, v in whole.items() if k not in {*_ELSEWHERE, *described}}
        weights = whole["state_dict"]
        if not _same(weights, trainer.lightning_module.state_dict()):
            # A callback has put others in their place: an average of them, say.
            rest["state_dict"] = weights
        return {
            "lightning": rest,
            "should_stop": trainer.should_stop,
            "ended": self._ended,
            "shape": self._shape(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state

    def _shape(self) -> dict[str, int]:
        trainer = self._trainer
        return {
            "workers": trainer.world_size,
            "batches an epoch": int(trainer.num_training_batches),
            "batches a step": trainer.accumulate_grad_batches,
        }

    # --- a fit -------------------------------------------------------------------------

    def install(self) -> None:
        """Before Lightning wraps the model and asks for the data."""
        trainer, strategy = self._trainer, self._trainer.strategy
        if isinstance(strategy, DDPStrategy) and trainer.world_size > 1:
            # As Checkpointer.prepare wraps: the same buckets in each life.
            strategy._setup_model = lambda model: prepare_model(
                model,
                strategy.root_device,
                world_size=trainer.world_size,
                ddp_kwargs=strategy._ddp_kwargs,
            )
        source = trainer.fit_loop._data_source
        made = source.dataloader
        source.dataloader = lambda: self._prepared(made())

    def begin(self) -> None:
        """Everything is made: load what there is of it."""
        trainer, ckpt = self._trainer, self._ckpt
        trainer.fit_loop.setup_data()
        if self._batches is None:
            # limit_train_batches=0: nothing will be trained.
            return
        ckpt.prepare(trainer.strategy.model)
        for optimizer in trainer.optimizers:
            ckpt.prepare(optimizer)
        for config in trainer.lr_scheduler_configs:
            ckpt.prepare(config.scheduler)
        ckpt.register_for_checkpointing(trainer=self)
        ckpt.register_for_checkpointing(per_rank=True, logged=self._logged)
        if ckpt.load_state() and self._loaded is not None:
            self._resume(self._loaded)

    def end(self) -> None:
        if self._batches is None:
            return
        self._batches.end()
        self._ended = True
        self._count()
        self._ckpt.finish()

    def teardown(self) -> None:
        """The fit is over. If no batch was asked for, nothing has set this since."""
        self._logged.set()

    def _prepared(self, loader: Any) -> Batches:
        if not isinstance(loader, DataLoader) or not _has_length(loader):
            raise ConfigurationError(
                f"a train loader of type {type(loader).__name__} cannot be resumed exactly"
                if not isinstance(loader, DataLoader)
                else "a train loader without a length cannot be resumed exactly",
                why="Lightning goes on by counting the batches of one loader, and reads ahead if "
                "it does not know their number",
                remedy="return one DataLoader, over a dataset that has a length",
            )
        self._batches = Batches(self._ckpt.prepare(loader), self._between)
        return self._batches

    def _between(self) -> None:
        """Between two batches: what is saved here is whole, and what is loaded begins here."""
        if self._resuming:
            # A hook looks at a batch, before the epoch goes on.
            return
        if self._streams is not None:
            self._logged.set()
            # Much may have drawn since they were loaded.
            rng.restore(self._streams)
            self._streams = None
        else:
            self._count()

    def _count(self) -> None:
        if self._trainer.global_step > self._counted:
            self._counted = self._trainer.global_step
            self._ckpt.step(self._metrics)

    def _metrics(self) -> dict[str, Any]:
        trainer = self._trainer
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        return {**metrics, "epoch": trainer.current_epoch, "step": trainer.global_step}

    def _resume(self, loaded: dict[str, Any]) -> None:
        if loaded["shape"] != self._shape():
            raise ElasticDataError(
                f"the fit that was saved had {_told(loaded['shape'])}; this one has "
                f"{_told(self._shape())}",
                why="Lightning goes on by counting batches",
                remedy="start it as it was, or write the loop with Checkpointer.prepare, which "
                "deals the data out to any number of workers",
            )
        self._streams = rng.capture()
        trainer, fit_loop = self._trainer, self._trainer.fit_loop
        connector = trainer._checkpoint_connector
        connector._loaded_checkpoint = {
            "state_dict": trainer.lightning_module.state_dict(),
            **loaded["lightning"],
        }
        call._call_lightning_module_hook(
            trainer, "on_load_checkpoint", connector._loaded_checkpoint
        )
        connector.restore_datamodule()
        connector.restore_callbacks()
        connector.restore_precision_plugin_state()
        connector.restore_loops()
        connector._loaded_checkpoint = {}
        trainer.should_stop = loaded["should_stop"]
        self._counted = trainer.global_step
        if not loaded["ended"]:
            self._go_on_as_if_nothing_had_been()
        elif not fit_loop.done:
            # More epochs are asked for than there were: the next one is new.
            _not_restarting(fit_loop)
        else:
            # Lightning leaves at once, and tells nobody of an end.
            self.end()

    def _go_on_as_if_nothing_had_been(self) -> None:
        """Restarting, Lightning skips what it thinks was done before the save, or
        cannot be: a validation, schedules that follow a metric. None of it was skipped."""
        fit_loop = self._trainer.fit_loop
        epoch_loop = fit_loop.epoch_loop
        begin = epoch_loop.on_run_start
        self._resuming = True

        def begun(fetcher: Any) -> None:
            begin(fetcher)
            self._resuming = False
            if self._batches is not None:
                self._batches.reenter()
            del epoch_loop.on_run_start
            _not_restarting(fit_loop)

        epoch_loop.on_run_start = begun


def _not_restarting(loop: Any) -> None:
    # Not by `restarting`, which a fit that ends by steps does not let be set to False.
    loop._restarting = loop._resuming_from_checkpoint = False
    for inner in vars(loop).values():
        if isinstance(inner, _Loop):
            _not_restarting(inner)


def _same(some: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether these are the very same tensors, in the same memory."""
    return some.keys() == others.keys() and all(
        same_view(t) == same_view(others[name])
        for name, t in some.items()
        if isinstance(t, torch.Tensor)
    )


def _told(shape: dict[str, int]) -> str:
    return ", ".join(f"{number} {what}" for what, number in shape.items())


def _has_length(loader: Any) -> bool:
    try:
        return len(loader) >= 0
    except TypeError:
        return False
