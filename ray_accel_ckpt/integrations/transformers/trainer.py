"""🤗 Transformers: a `Trainer` that saves through a `Checkpointer`, and goes on where it was.

Trainer's own ways of saving and resuming are replaced where they are not exact: its loader, which
reads ahead and draws from the streams of training; the place in the epoch, which it counts from
the number of steps; what it forgets, such as the losses since the last log. Everything
else, from `compute_loss` to callbacks, is the Trainer's that was given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar, cast

import torch
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from ray_accel_ckpt.checkpointer import Checkpointer
from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.integrations.transformers.batches import Batches
from ray_accel_ckpt.integrations.transformers.refusals import refuse_inexact, refuse_loader
from ray_accel_ckpt.integrations.transformers.run import Run
from ray_accel_ckpt.runtime.prepare import prepare_model
from ray_accel_ckpt.state import rng
from ray_accel_ckpt.state.seeding import identity

T = TypeVar("T", bound=Trainer)


def checkpointed(trainer: T, ckpt: Checkpointer) -> T:
    """Let ``trainer.train()`` save through `ckpt`, and go on from its newest checkpoint.

    Every rank calls it once, before ``trainer.train()``. Saves are made when `ckpt` says so,
    after a step has been logged and evaluated, and at the end; metrics are those of
    `TrainerState.log_history`. Trainer itself writes nothing.

    Args:
        trainer: a `Trainer`, or of a class derived from it. It is changed, and returned.
        ckpt: nothing may be prepared with it yet. What the script has beside the trainer is
            registered with it before ``trainer.train()``.

    Raises:
        ConfigurationError: the trainer is set up in a way that cannot be resumed exactly.
    """
    refuse_inexact(trainer, ckpt)
    kind = type(trainer)
    trainer.__class__ = type(f"Checkpointed{kind.__name__}", (_Checkpointed, kind), {})
    cast(_Checkpointed, trainer)._run = Run(trainer, ckpt)
    return trainer


class _Checkpointed(Trainer):  # type: ignore[misc]
    """Comes before the class that a trainer was made of."""

    _run: Run

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> TrainOutput:
        """Train to the end, from where the newest checkpoint is."""
        run = self._run
        if resume_from_checkpoint:
            raise ConfigurationError(
                "train(resume_from_checkpoint=...) has no meaning here",
                why="the run goes on from the newest checkpoint of its Checkpointer by itself",
                remedy="call train(); weights from elsewhere are loaded into the model before",
            )
        if run.batches is not None:
            raise ConfigurationError(
                "this trainer has been trained", remedy="make another one, with a Checkpointer"
            )
        output = super().train(**kwargs)
        run.ended = True
        run.ckpt.finish()
        return output

    # --- data --------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        run = self._run
        if not self.is_in_train or run.batches is not None:
            # For what a callback looks at: no part of the state, which a new life does not have.
            return cast(DataLoader[Any], super().get_train_dataloader())
        with _undealt(self.accelerator):
            loader = super().get_train_dataloader()
        refuse_loader(loader, self.args.world_size)
        run.batches = Batches(run.ckpt.prepare(loader))
        # A generator of its own: an iterator's base seed is not to be drawn from training's stream.
        return DataLoader(
            run.batches, batch_size=None, collate_fn=identity, generator=torch.Generator()
        )

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        batches = dataloader.dataset
        loader = batches.loader if isinstance(batches, Batches) else dataloader
        return int(super().num_examples(loader))

    # --- where to go on ----------------------------------------------------------------

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: None,
        trial: Any,
    ) -> tuple[int, int]:
        """Trainer asks where to go on before it makes what has to be loaded for it."""
        run = self._run
        super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, None, trial
        )
        # Trainer makes them later, and to load a state, the one that there is may be looked at.
        self._tr_loss, self._total_loss_scalar = torch.tensor(0.0, device="cpu"), 0.0
        self._globalstep_last_logged = 0
        self._prepared = super()._prepare_for_training(max_steps, None, None)
        self._register(self._prepared[0])
        sized = run.batches is not None and run.batches.sized
        run.updates_per_epoch = num_update_steps_per_epoch if sized else None
        saved = run.resume()
        if saved is None:
            return 0, 0
        if saved["ended"]:
            return (num_train_epochs if run.stopped() else run.epochs), 0
        updates = self.state.global_step - saved["epoch_began"]
        return run.epochs - 1, updates * self.args.gradient_accumulation_steps

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader[Any], resume_from_checkpoint: None
    ) -> tuple[Any, DataLoader[Any]]:
        self.callback_handler.train_dataloader = train_dataloader
        return self._prepared[0], train_dataloader

    def _register(self, model: Any) -> None:
        ckpt = self._run.ckpt
        ckpt.prepare(model)
        ckpt.prepare(self.optimizer.optimizer)
        ckpt.register_for_checkpointing(scheduler=self.lr_scheduler, trainer=self._run)
        ckpt.register_for_checkpointing(per_rank=True, trainer_share=self._run.share)
        if self.accelerator.scaler is not None:
            ckpt.register_for_checkpointing(scaler=self.accelerator.scaler)

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        """For several workers as `Checkpointer.prepare` wraps: the same buckets in each life."""
        wrapped = super()._wrap_model(model, training, dataloader)
        if not training or wrapped is not self.model or self.args.world_size == 1:
            return wrapped
        module = self.accelerator.prepare_model(model, evaluation_mode=True)
        handler = self.accelerator.ddp_handler
        parallel = prepare_model(
            module,
            self.args.device,
            world_size=self.args.world_size,
            ddp_kwargs=handler.to_kwargs() if handler is not None else {},
        )
        if handler is not None:
            handler.register_comm_hook(parallel)
        return parallel

    def _run_epoch(self, **kwargs: Any) -> None:
        run, steps = self._run, kwargs["steps_trained_in_current_epoch"]
        streams, run.streams = run.streams, None
        run.epochs = kwargs["epoch"] + 1
        if streams is None or run.batches is None:
            run.epoch_began = self.state.global_step
            super()._run_epoch(**kwargs)
            return
        updates = steps // self.args.gradient_accumulation_steps
        run.epoch_began = self.state.global_step - updates
        run.set_losses()
        if run.set_stops():
            kwargs["num_update_steps_per_epoch"] = updates
        with run.batches.resumed(steps):
            rng.restore(streams)
            # Trainer asks it only whether it is None.
            super()._run_epoch(**{**kwargs, "resume_from_checkpoint": run.ckpt.resumed_from})

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False
    ) -> dict[str, float]:
        if skip_scheduler and self._run.loaded is not None:
            # eval_on_start: that was the run's start, and not this life's.
            return {}
        return dict(super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """They are restored before the epoch goes on."""

    # --- saving ------------------------------------------------------------------------

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, *args: Any, learning_rate: Any = None, **kwargs: Any
    ) -> None:
        run = self._run
        if learning_rate is None and run.loaded is not None:
            # The end of an epoch of which nothing was left, where the last step's are logged.
            grad_norm, learning_rate = run.loaded["grad_norm"], run.loaded["learning_rate"]
        run.grad_norm, run.learning_rate = grad_norm, learning_rate
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, *args, learning_rate=learning_rate, **kwargs
        )
        # It is called at the end of epochs too, when no step was made.
        if self.state.global_step > run.ckpt.global_step:
            run.ckpt.step(run.metrics)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        if self._run.streams is None:
            return super()._finalize_training(*args, **kwargs)
        # A finished run that was started again: no epoch has set them, and its end is in the log.
        self._run.set_losses()
        log = list(self.state.log_history)
        output = super()._finalize_training(*args, **kwargs)
        self.state.log_history = log
        return output


@contextlib.contextmanager
def _undealt(accelerator: Any) -> Iterator[None]:
    """Inside, Accelerate leaves loaders as they are: not dealt out to ranks, not read ahead."""
    accelerator.prepare_data_loader = lambda loader, **_: loader
    try:
        yield
    finally:
        del accelerator.prepare_data_loader
