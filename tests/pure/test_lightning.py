"""A Lightning fit, killed anywhere, ends with the bits of one that never was."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from torch.utils.data import DataLoader, IterableDataset

from ray_accel_ckpt import Checkpointer, errors, open_checkpoint
from ray_accel_ckpt.image import copies
from ray_accel_ckpt.integrations.lightning import CheckpointerCallback
from ray_accel_ckpt.storage.filesystem import resolve
from ray_accel_ckpt.storage.journal import read_events
from tests.pure.helpers import (
    OPTIONS,
    KilledError,
    Noisy,
    checkpointer,
    checkpoints,
    digest,
    network,
    seed_everything,
    streams,
)

pytestmark = [
    # Lightning's own, about how it is used here.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]

BATCHES, EPOCHS = 6, 3


class Net(pl.LightningModule):
    """Shuffled and augmented data, dropout, batch norm, sums over an epoch of two kinds."""

    def __init__(self, schedule: str = "step", size: int = 22, workers: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = network()
        self.mean = torchmetrics.MeanMetric()
        self.data = Noisy(size)
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, _ = batch
        loss = self.net(x).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("largest", x.max(), on_step=False, on_epoch=True, reduce_fx="max")
        self.mean(x)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        if batch_idx == 0:
            self.log("first", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        # It draws: a validation that is left out or done twice is found out.
        self.log("val", self.net(batch[0]).square().mean() + torch.rand(()))

    def on_train_epoch_end(self) -> None:
        self.seen.append(float(torch.rand(())))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seen"] = list(self.seen)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen = checkpoint["seen"]

    def train_dataloader(self) -> Any:
        return DataLoader(
            self.data, batch_size=4, shuffle=True, num_workers=self.hparams["workers"]
        )

    def val_dataloader(self) -> Any:
        return DataLoader(Noisy(6), batch_size=3)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2)
        kind = self.hparams["schedule"]
        if kind == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": plateau, "monitor": "loss_epoch"},
            }
        steps = self.trainer.estimated_stepping_batches
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": kind}}


class Remember(Callback):
    """What the loggers and other callbacks get to see."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        now = {k: v.item() for k, v in trainer.callback_metrics.items()}
        steps = trainer.fit_loop.epoch_loop._batches_that_stepped
        self.values[str(trainer.current_epoch)] = {**now, "logged_at": steps}

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state["values"]


class Die(Callback):
    """Ends the process, in all but name, when `at` steps are done and `on` is called."""

    def __init__(self, at: int, on: str) -> None:
        self._at = at
        setattr(self, on, self._die)

    def _die(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self._at and not trainer.sanity_checking:
            raise KilledError


def trainer_of(directory: Path, ckpt: Checkpointer, *callbacks: Callback, **options: Any) -> Any:
    return pl.Trainer(
        **{
            "max_epochs": EPOCHS,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(directory / "lightning"),
            "callbacks": [*callbacks, CheckpointerCallback(ckpt)],
            **options,
        }
    )


def life(
    directory: Path,
    *callbacks: Callback,
    die_at: int = 0,
    on: str = "on_train_batch_start",
    every: int = 4,
    seed: int = 7,
    model: dict[str, Any] | None = None,
    **options: Any,
) -> str | None:
    seed_everything(seed)
    ckpt, remember = checkpointer(directory, every), Remember()
    trainer = trainer_of(directory, ckpt, remember, *callbacks, Die(die_at or -1, on), **options)
    module = Net(**(model or {}))
    try:
        trainer.fit(module)
    except KilledError:
        ckpt.flush()
        return None
    return digest(
        module,
        *trainer.optimizers,
        *(config.scheduler for config in trainer.lr_scheduler_configs),
        streams(),
        remember.values,
        module.seen,
        [trainer.global_step, trainer.current_epoch],
    )


def assert_survives(directory: Path, *kills: dict[str, Any], **options: Any) -> None:
    def started(where: str, **more: Any) -> str | None:
        made = dict(options)
        callbacks = [each() for each in made.pop("callbacks", ())]
        return life(directory / where, *callbacks, **made, **more)

    whole = started("whole")
    for kill in kills:
        assert started("killed", **kill) is None
    assert started("killed", seed=99) == whole


class Draws(Callback):
    """Draws from the streams of training where only some lives come by."""

    def on_train_start(self, *_: Any) -> None:
        torch.rand(3)
        random.random()


SETUPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a callback that draws": {"callbacks": [Draws]},
    "a schedule by epochs": {"model": {"schedule": "epoch"}},
    "a schedule by a metric": {"model": {"schedule": "plateau"}},
    "accumulated": {"accumulate_grad_batches": 4, "every": 1},
    "validated between steps": {"val_check_interval": 2, "every": 1},
    "by loader workers": {"model": {"workers": 2}},
    "as many steps as asked for": {"max_epochs": -1, "max_steps": 16, "val_check_interval": 2},
    "in bfloat16": {"precision": "bf16-mixed"},
    "part of the data": {"limit_train_batches": 5, "every": 1},
}


@pytest.mark.parametrize("setup", SETUPS)
def test_killed_in_the_middle_of_an_epoch(tmp_path: Path, setup: str) -> None:
    # Of six batches accumulated by four, two make an epoch.
    steps = (3, 5) if setup == "accumulated" else (5, 10)
    assert_survives(tmp_path, *({"die_at": step} for step in steps), **SETUPS[setup])


class Looks(Callback):
    """At a batch of the train loader."""

    def __init__(self, on: str) -> None:
        setattr(self, on, self._look)

    def _look(self, trainer: Any, *_: Any) -> None:
        next(iter(trainer.train_dataloader))


@pytest.mark.parametrize("on", ["on_train_start", "on_train_epoch_end"])
def test_what_callbacks_look_at_is_no_part_of_training(tmp_path: Path, on: str) -> None:
    looks = [lambda: Looks(on)]
    assert_survives(tmp_path, {"die_at": 4}, {"die_at": 10}, callbacks=looks, every=1)


def test_a_look_inside_an_epoch_does_not_end_it(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigurationError, match="after another has begun"):
        fit(tmp_path, Looks("on_train_batch_end"))


def test_saving_changes_nothing(tmp_path: Path) -> None:
    often = life(tmp_path / "often", every=1)
    assert often == life(tmp_path / "never", every=1000)


def test_killed_while_copies_go_on_beside_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIONS, "overlap", True)
    monkeypatch.setattr(copies, "_SMALL", 0)
    assert_survives(tmp_path, {"die_at": 5}, {"die_at": 10}, every=1)


@pytest.mark.parametrize(
    "on",
    ["on_train_batch_end", "on_validation_end", "on_train_epoch_end", "on_train_epoch_start"],
)
def test_killed_around_the_end_of_an_epoch(tmp_path: Path, on: str) -> None:
    """What follows the last batch of an epoch is done, once, whatever was saved last."""
    assert_survives(tmp_path, {"die_at": BATCHES, "on": on}, every=1)


def test_killed_between_an_epochs_end_and_the_next_ones_first_batch(tmp_path: Path) -> None:
    kill = {"die_at": BATCHES, "on": "on_train_batch_start"}
    assert_survives(tmp_path, kill, every=BATCHES)


def averages() -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=0.9)


def test_averaged_weights_come_back(tmp_path: Path) -> None:
    """At the end they are the module's."""
    assert_survives(tmp_path, {"die_at": 5}, {"die_at": 10}, callbacks=[averages])


@pytest.mark.parametrize("schedule", ["epoch", "plateau"])
def test_schedules_go_on_in_the_epoch_that_was_resumed_into(tmp_path: Path, schedule: str) -> None:
    kills = [{"die_at": 4}, {"die_at": 11, "on": "on_train_epoch_end"}]
    assert_survives(tmp_path, *kills[:1], model={"schedule": schedule}, every=2)


def test_killed_in_a_validation_between_steps(tmp_path: Path) -> None:
    kill = {"die_at": 4, "on": "on_validation_start"}
    assert_survives(tmp_path, kill, val_check_interval=2, every=1)


def stops_early() -> EarlyStopping:
    return EarlyStopping("val", patience=1, mode="max", min_delta=100.0)


def test_callbacks_go_on_counting(tmp_path: Path) -> None:
    """Nothing is 100 better: patience ends after the second epoch."""
    kill = {"die_at": BATCHES, "on": "on_train_epoch_start"}
    assert_survives(tmp_path, kill, {"die_at": 9}, callbacks=[stops_early], every=1)
    for each in ("whole", "killed"):
        assert newest(tmp_path / each).step == 2 * BATCHES


def newest(directory: Path) -> Any:
    return open_checkpoint(directory / "checkpoints" / checkpoints(directory)[-1])


def fit(directory: Path, *callbacks: Callback, schedule: str = "step", **options: Any) -> Any:
    seed_everything(1)
    trainer = trainer_of(directory, checkpointer(directory, 4), *callbacks, **options)
    trainer.fit(Net(schedule))
    return trainer


@pytest.mark.parametrize("callbacks", [[], [stops_early]])
def test_a_fit_that_has_ended_does_nothing_more(tmp_path: Path, callbacks: list[Any]) -> None:
    first = fit(tmp_path, *(each() for each in callbacks))
    saved = checkpoints(tmp_path)
    again = fit(tmp_path, *(each() for each in callbacks))
    assert again.global_step == first.global_step
    assert checkpoints(tmp_path) == saved
    assert digest(again.lightning_module) == digest(first.lightning_module)
    assert "val" in again.callback_metrics
    assert digest(again.callback_metrics) == digest(first.callback_metrics)
    # For the report: an attempt that has ended is not lost.
    events = read_events(*resolve(tmp_path / "checkpoints"))
    assert [event.kind for event in events].count("end") == 2
    assert not list((tmp_path / "lightning").rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("one", "all_"),
    [
        ({"max_epochs": 1}, {}),
        ({"max_epochs": -1, "max_steps": BATCHES}, {"max_epochs": -1, "max_steps": 3 * BATCHES}),
    ],
    ids=["epochs", "steps"],
)
def test_a_fit_that_has_ended_goes_on(tmp_path: Path, one: Any, all_: Any) -> None:
    fit(tmp_path / "longer", schedule="plateau", **one)
    longer, whole = (
        fit(tmp_path / each, schedule="plateau", **all_) for each in ("longer", "whole")
    )
    assert longer.global_step == whole.global_step == EPOCHS * BATCHES
    assert longer.lightning_module.seen == whole.lightning_module.seen
    assert digest(longer.lightning_module) == digest(whole.lightning_module)


def test_what_was_trained_on_is_not_read(tmp_path: Path) -> None:
    assert life(tmp_path, die_at=5) is None
    trainer = fit(tmp_path, Remember(), max_epochs=1)
    # Four batches of four were trained on.
    assert len(trainer.lightning_module.data.asked) == 22 - 16


def test_parts_are_named_as_everywhere(tmp_path: Path) -> None:
    fit(tmp_path, max_epochs=1)
    assert set(newest(tmp_path).parts) == {
        *("progress", "loader", "model", "optimizer", "scheduler", "trainer", "logged", "rng")
    }


def test_another_shape_is_refused(tmp_path: Path) -> None:
    assert life(tmp_path, die_at=5) is None
    with pytest.raises(errors.ElasticDataError, match="2 batches a step"):
        fit(tmp_path, accumulate_grad_batches=2)


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Unfreezes(BaseFinetuning):
    def freeze_before_training(self, pl_module: Net) -> None:
        self.freeze(pl_module.net[0])


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return itertools.count()


@pytest.mark.parametrize(
    ("module", "options", "remedy"),
    [
        (Manual, {}, "Checkpointer.prepare"),
        (Net, {"reload_dataloaders_every_n_epochs": 1}, "leave it out"),
        (Net, {"overfit_batches": 1}, "leave it out"),
        (Net, {"callbacks": [LearningRateFinder()]}, "in a fit of its own"),
        (Net, {"callbacks": [StochasticWeightAveraging(0.1)]}, "use WeightAveraging"),
        (Net, {"callbacks": [Unfreezes()]}, "all parameters from the beginning"),
    ],
)
def test_what_cannot_be_exact_is_refused(
    tmp_path: Path, module: Any, options: dict[str, Any], remedy: str
) -> None:
    trainer = trainer_of(tmp_path, checkpointer(tmp_path), *options.pop("callbacks", ()), **options)
    with pytest.raises(errors.ConfigurationError, match=remedy):
        trainer.fit(module())


@pytest.mark.parametrize("data", [[1, 2], {"a": DataLoader([1.0])}, DataLoader(Endless())])
def test_loaders_that_cannot_be_gone_on_with_are_refused(tmp_path: Path, data: Any) -> None:
    trainer = trainer_of(tmp_path, checkpointer(tmp_path))
    with pytest.raises(errors.ConfigurationError, match="return one DataLoader"):
        trainer.fit(Net(), data)


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"limit_train_batches": 0}])
def test_a_fit_that_is_none_saves_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    fit(tmp_path, **options)
    assert checkpoints(tmp_path) == []


def test_a_version_that_this_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tmp_path, checkpointer(tmp_path))
    monkeypatch.delattr(type(trainer.fit_loop), "restarted_mid_epoch")
    with pytest.raises(errors.ConfigurationError, match="this version of Lightning"):
        trainer.fit(Net())


def test_lightnings_own_resuming_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, checkpointer(tmp_path))
    trainer.ckpt_path = "somewhere"
    with pytest.raises(errors.ConfigurationError, match="ckpt_path"):
        trainer.fit(Net())
