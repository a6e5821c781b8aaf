"""What a Trainer's run is made of beside model, optimizer, scheduler and data: as state."""

from __future__ import annotations

import json
import logging
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from ray_accel_ckpt.checkpointer import Checkpointer
from ray_accel_ckpt.errors import ElasticDataError
from ray_accel_ckpt.integrations.transformers.batches import Batches
from ray_accel_ckpt.state import rng

logger = logging.getLogger(__name__)

_STATE = (
    *("epoch", "global_step", "num_input_tokens_seen", "total_flos"),
    *("best_metric", "best_global_step"),
)
"""Of `TrainerState`: what training changes. The rest is the script's to say, each time anew."""


class Run:
    """What Trainer's run is made of, beside its model, optimizer, scheduler and data."""

    def __init__(self, trainer: Trainer, ckpt: Checkpointer) -> None:
        self.ckpt = ckpt
        self.batches: Batches | None = None
        self.updates_per_epoch: int | None = None
        self.grad_norm: torch.Tensor | float | None = None
        self.learning_rate: float | None = None
        self.epochs = self.epoch_began = 0
        self.ended = False
        self.share = Share(trainer)
        self.loaded: dict[str, Any] | None = None
        self.streams: dict[str, Any] | None = None
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        state, control = trainer.state, trainer.control
        return {
            "state": {name: getattr(state, name) for name in _STATE},
            # As text: it grows all the time, and nobody looks into it.
            "log_history": json.dumps(state.log_history, default=float),
            "callbacks": [[type(c).__name__, c.state()["attributes"]] for c in self._callbacks()],
            "loss": trainer._total_loss_scalar,
            "logged_at": trainer._globalstep_last_logged,
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            # Not the passes over the loader: a callback may have made some of its own.
            "epochs": self.epochs,
            "epoch_began": self.epoch_began,
            "epoch_stopped": control.should_epoch_stop and not self.ended,
            "stopped": control.should_training_stop and state.global_step < state.max_steps,
            "ended": self.ended,
            "updates_per_epoch": self.updates_per_epoch,
            "batch": trainer.get_total_train_batch_size(trainer.args),
            "workers": trainer.args.world_size,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.loaded = saved

    def resume(self) -> dict[str, Any] | None:
        """Load the newest checkpoint, if there is one, and set Trainer's state to it."""
        if not self.ckpt.load_state() or self.loaded is None:
            return None
        self._require_the_same_steps(self.loaded)
        self.epochs = self.loaded["epochs"]
        # Much may draw before the first step of this life.
        self.streams = rng.capture()
        state = self._trainer.state
        for name, value in self.loaded["state"].items():
            setattr(state, name, value)
        state.log_history = json.loads(self.loaded["log_history"])
        self._set_callbacks(self.loaded["callbacks"])
        return self.loaded

    def set_losses(self) -> None:
        """As they were: what Trainer has set to zero since `resume`."""
        if self.loaded is None:
            return
        trainer = self._trainer
        trainer._initial_global_step = 0
        trainer._total_loss_scalar = self.loaded["loss"]
        if self.loaded["workers"] == trainer.args.world_size:
            trainer._globalstep_last_logged = self.loaded["logged_at"]
            self.share.set()

    def set_stops(self) -> bool:
        """As they were: Trainer has taken them back. Whether the epoch that goes on is to stop."""
        control = self._trainer.control
        control.should_training_stop = self.stopped()
        control.should_epoch_stop = self.loaded is not None and self.loaded["epoch_stopped"]
        return bool(control.should_training_stop or control.should_epoch_stop)

    def stopped(self) -> bool:
        """No more steps are to be made."""
        state = self._trainer.state
        early = self.loaded is not None and self.loaded["stopped"]
        return bool(early or state.global_step >= state.max_steps)

    def metrics(self) -> dict[str, Any]:
        """The latest value of everything that was logged."""
        return {k: v for log in self._trainer.state.log_history for k, v in log.items()}

    def _require_the_same_steps(self, saved: dict[str, Any]) -> None:
        trainer = self._trainer
        batch = trainer.get_total_train_batch_size(trainer.args)
        if (saved["batch"], saved["updates_per_epoch"]) == (batch, self.updates_per_epoch):
            return
        raise ElasticDataError(
            f"the run took {saved['batch']} samples a step, {saved['updates_per_epoch']} steps an "
            f"epoch, and would now take {batch}, and {self.updates_per_epoch}",
            why=f"it was saved by {saved['workers']} workers, and has {trainer.args.world_size}",
            remedy="set gradient_accumulation_steps or per_device_train_batch_size so that workers "
            f"x per_device_train_batch_size x gradient_accumulation_steps is {saved['batch']}",
        )

    def _callbacks(self) -> list[Any]:
        handler = self._trainer.callback_handler
        return [c for c in handler.callbacks if isinstance(c, ExportableState)]

    def _set_callbacks(self, saved: list[list[Any]]) -> None:
        left = [(name, attributes) for name, attributes in saved]
        for callback in self._callbacks():
            name = type(callback).__name__
            own = next((each for each in left if each[0] == name), None)
            if own is None:
                logger.warning("the checkpoint has no state of %s: it begins anew", name)
                continue
            left.remove(own)
            for attribute, value in own[1].items():
                setattr(callback, attribute, value)
        for name, _ in left:
            logger.warning("the checkpoint has the state of %s, which is not there any more", name)


class Share:
    """What each worker has summed up since Trainer last asked all of them."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self._trainer._tr_loss, "flos": self._trainer.current_flos}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._loaded = saved

    def set(self) -> None:
        if self._loaded is not None:
            self._trainer._tr_loss.copy_(self._loaded["loss"])
            self._trainer.current_flos = self._loaded["flos"]
