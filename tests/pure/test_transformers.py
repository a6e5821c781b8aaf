"""A 🤗 Trainer, killed anywhere, ends with the bits of one that never was."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import (
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ray_accel_ckpt import Checkpointer, errors, open_checkpoint
from ray_accel_ckpt.image import copies
from ray_accel_ckpt.integrations.transformers import checkpointed
from tests.pure.helpers import (
    OPTIONS,
    KilledError,
    checkpointer,
    checkpoints,
    digest,
    project,
    seed_everything,
    streams,
)

pytestmark = [
    # torch's compiler looks at a gradient that transformers' loss has not.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

STEPS_AN_EPOCH, EPOCHS = 6, 3


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Tokens that come out differently each time, unless the streams are the same."""

    def __init__(self, size: int = 22) -> None:
        self.size = size
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= self.size:
            raise IndexError
        self.asked.append(index)
        own = torch.Generator().manual_seed(index)
        ids = torch.randint(0, 32, (6,), generator=own)
        ids[int(torch.randint(6, ()))] = 31
        return {"input_ids": ids, "labels": ids}


class Stream(IterableDataset[dict[str, torch.Tensor]]):
    """The tokens as a stream, which can be entered in the middle."""

    def __init__(self) -> None:
        self.tokens, self.at = Tokens(), 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while self.at < len(self.tokens):
            self.at += 1
            yield self.tokens[self.at - 1]
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Die(TrainerCallback):
    """Ends the process, in all but name, when `at` steps are done and `on` is called."""

    def __init__(self, at: int, on: str) -> None:
        self._at = at
        setattr(self, on, self._die)

    def _die(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._at:
            raise KilledError


def model() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1
    )
    return GPT2LMHeadModel(config)


def arguments(directory: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(directory / "trainer"),
            "save_strategy": "no",
            "per_device_train_batch_size": 4,
            "num_train_epochs": EPOCHS,
            "learning_rate": 1e-2,
            "logging_steps": 3,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **options,
        }
    )


def trainer_of(
    directory: Path,
    ckpt: Checkpointer,
    *callbacks: TrainerCallback,
    kind: type[Trainer] = Trainer,
    data: Any = None,
    **options: Any,
) -> Trainer:
    evaluated = Tokens(6) if "eval_strategy" in options else None
    trainer = kind(
        model=model(),
        args=arguments(directory, **options),
        train_dataset=Tokens() if data is None else data,
        eval_dataset=evaluated,
        callbacks=list(callbacks),
    )
    return checkpointed(trainer, ckpt)


def ended_with(trainer: Trainer) -> str:
    """What decides everything to come, and what was logged, but for the clock's part in it."""
    state = trainer.state
    logs = [
        {k: v for k, v in line.items() if "runtime" not in k and "_per_" not in k}
        for line in state.log_history
    ]
    return digest(
        trainer.model,
        trainer.optimizer.optimizer,
        trainer.lr_scheduler,
        streams(),
        logs,
        [state.global_step, state.epoch, state.total_flos, state.best_metric],
    )


def life(
    directory: Path,
    *callbacks: TrainerCallback,
    die_at: int = 0,
    on: str = "on_step_begin",
    every: int = 4,
    seed: int = 7,
    **options: Any,
) -> str | None:
    seed_everything(seed)
    ckpt = checkpointer(directory, every)
    trainer = trainer_of(directory, ckpt, *callbacks, Die(die_at or -1, on), **options)
    try:
        trainer.train()
    except KilledError:
        ckpt.flush()
        return None
    return ended_with(trainer)


def newest(directory: Path) -> Any:
    return open_checkpoint(directory / "checkpoints" / checkpoints(directory)[-1])


class Draws(TrainerCallback):
    """Draws from the streams of training where only some lives come by."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        torch.rand(3)
        random.random()

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        torch.rand(3)


SETUPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "callbacks that draw": {"callbacks": [Draws]},
    "evaluated at the start": {"eval_on_start": True, "eval_strategy": "no"},
    "a schedule and clipping": {"lr_scheduler_type": "cosine", "warmup_steps": 3},
    # 22 samples by 2: eleven batches, the last of an epoch is alone.
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "evaluated each epoch": {"eval_strategy": "epoch"},
    "by loader workers": {"dataloader_num_workers": 2},
    "a stream": {"data": Stream, "max_steps": 16},
    "in bfloat16": {"bf16": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "grouped by length": {"train_sampling_strategy": "group_by_length"},
}


def assert_survives(directory: Path, *kills: dict[str, Any], **options: Any) -> None:
    def started(where: str, **more: Any) -> str | None:
        # Data and callbacks are made anew in each life.
        made = {k: v() if k == "data" else v for k, v in options.items()}
        callbacks = [each() for each in made.pop("callbacks", ())]
        return life(directory / where, *callbacks, **made, **more)

    whole = started("whole")
    for kill in kills:
        assert started("killed", **kill) is None
    assert started("killed", seed=99) == whole
    one, two = (newest(directory / each) for each in ("whole", "killed"))
    assert set(one.parts) == set(two.parts)
    # Not "trainer": its log has how fast the last line's steps were.
    for part in set(one.parts) - {"trainer"}:
        assert digest(one.state_dict(part)) == digest(two.state_dict(part)), part


@pytest.mark.parametrize("setup", SETUPS)
def test_killed_in_the_middle_of_an_epoch(tmp_path: Path, setup: str) -> None:
    assert_survives(tmp_path, {"die_at": 5}, {"die_at": 9}, **SETUPS[setup])


class Looks(TrainerCallback):
    """At batches of the train loader, and of another one like it."""

    trainer: Trainer

    def on_train_begin(self, *_: Any, train_dataloader: Any, **__: Any) -> None:
        next(iter(train_dataloader))

    def on_epoch_end(self, *_: Any, train_dataloader: Any, **__: Any) -> None:
        next(iter(train_dataloader))
        next(iter(self.trainer.get_train_dataloader()))


def test_what_callbacks_look_at_is_no_part_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer_of

    def known(*args: Any, **options: Any) -> Trainer:
        trainer = made(*args, **options)
        monkeypatch.setattr(Looks, "trainer", trainer, raising=False)
        return trainer

    monkeypatch.setattr(sys.modules[__name__], "trainer_of", known)
    assert_survives(tmp_path, {"die_at": 5}, {"die_at": 9}, callbacks=[Looks], every=1)


def test_saving_changes_nothing(tmp_path: Path) -> None:
    often = life(tmp_path / "often", every=1)
    assert often == life(tmp_path / "never", every=1000)


def test_killed_while_copies_go_on_beside_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIONS, "overlap", True)
    monkeypatch.setattr(copies, "_SMALL", 0)
    assert_survives(tmp_path, {"die_at": 5}, {"die_at": 9}, every=1)


@pytest.mark.parametrize("on", ["on_step_end", "on_evaluate", "on_epoch_end", "on_epoch_begin"])
def test_killed_around_the_end_of_an_epoch(tmp_path: Path, on: str) -> None:
    """What follows the last step of an epoch is done, once, whatever was saved last."""
    options = {"eval_strategy": "epoch", "every": 1, "logging_strategy": "epoch"}
    assert_survives(tmp_path / "first", {"die_at": STEPS_AN_EPOCH, "on": on}, **options)
    if on != "on_epoch_begin":
        kill = {"die_at": STEPS_AN_EPOCH * EPOCHS, "on": on}
        assert_survives(tmp_path / "last", kill, **options)


def test_killed_in_an_evaluation_between_steps(tmp_path: Path) -> None:
    kill = {"die_at": 4, "on": "on_evaluate"}
    assert_survives(tmp_path, kill, eval_strategy="steps", eval_steps=2, every=1)


def test_killed_after_the_last_step(tmp_path: Path) -> None:
    """Of a run that ends in mid-epoch: no step too many is made."""
    kill = {"die_at": 8, "on": "on_epoch_end"}
    assert_survives(tmp_path, kill, max_steps=8, every=1)


def stops_early() -> EarlyStoppingCallback:
    return EarlyStoppingCallback(early_stopping_patience=2)


STOPPED = {
    "callbacks": [stops_early],
    "eval_strategy": "steps",
    "eval_steps": 2,
    "metric_for_best_model": "loss",
    "greater_is_better": True,
    "every": 1,
}


def test_callbacks_go_on_counting(tmp_path: Path) -> None:
    """The loss falls and greater is better: patience ends at the third evaluation."""
    assert_survives(tmp_path, {"die_at": 5, "on": "on_step_end"}, **STOPPED)
    assert len(checkpoints(tmp_path / "killed")) == len(checkpoints(tmp_path / "whole")) == 7


def test_a_run_that_has_ended_does_nothing_more(tmp_path: Path) -> None:
    for options in ({}, {**STOPPED, "callbacks": [stops_early()]}):
        callbacks = options.pop("callbacks", [])
        where = tmp_path / str(len(callbacks))
        ended = life(where, *callbacks, **options)
        saved = checkpoints(where)
        seed_everything(1)
        ckpt = checkpointer(where, 4)
        trainer = trainer_of(
            where,
            ckpt,
            *callbacks,
            Die(-1, "on_step_begin"),
            **{k: v for k, v in options.items() if k != "every"},
        )
        steps = ckpt.global_step
        output = trainer.train()
        assert ended is not None
        assert trainer.state.global_step == ckpt.global_step > steps
        assert checkpoints(where) == saved
        assert output.training_loss > 0
        before = open_checkpoint(where / "checkpoints" / saved[-1])
        log = json.loads(before.state_dict("trainer")["log_history"])
        assert trainer.state.log_history == log
        assert "train_runtime" in log[-1]
        assert digest(before.state_dict("model")) == digest(trainer.model)


def test_a_run_that_has_ended_goes_on_for_more_epochs(tmp_path: Path) -> None:
    options = {"lr_scheduler_type": "constant"}
    whole = life(tmp_path / "whole", **options)
    assert life(tmp_path / "longer", num_train_epochs=1, **options) is not None
    assert_longer = life(tmp_path / "longer", seed=5, **options)
    # Only the line about the end of the first run is more.
    one, two = (newest(tmp_path / each) for each in ("whole", "longer"))
    assert digest(one.state_dict("model"), one.state_dict("rng")) == digest(
        two.state_dict("model"), two.state_dict("rng")
    )
    assert whole is not None
    assert assert_longer is not None


def test_what_is_skipped_is_not_read(tmp_path: Path) -> None:
    life(tmp_path, die_at=5)
    seed_everything(3)
    ckpt, data = checkpointer(tmp_path, 100), Tokens()
    trainer_of(tmp_path, ckpt, data=data, num_train_epochs=1).train()
    # Four steps of four were made.
    assert len(data.asked) == 22 - 16


def test_trainer_itself_writes_nothing(tmp_path: Path) -> None:
    life(tmp_path, num_train_epochs=1)
    assert list((tmp_path / "trainer").rglob("*")) == []


def test_saves_are_of_the_state_after_logging(tmp_path: Path) -> None:
    life(tmp_path, num_train_epochs=1, logging_steps=4)
    first = open_checkpoint(tmp_path / "checkpoints" / checkpoints(tmp_path)[0])
    (line,) = json.loads(first.state_dict("trainer")["log_history"])
    assert (line["step"], first.step) == (4, 4)
    assert set(first.parts) == {
        *("progress", "loader", "model", "optimizer", "scheduler", "rng"),
        *("trainer", "trainer_share"),
    }


def test_another_batch_is_refused(tmp_path: Path) -> None:
    life(tmp_path, die_at=5)
    with pytest.raises(errors.ElasticDataError, match=r"4 samples a step.* would now take 8"):
        life(tmp_path, per_device_train_batch_size=8)


def test_the_same_batch_in_other_parts_goes_on(tmp_path: Path) -> None:
    """As another number of workers would take it: the same samples a step."""
    life(tmp_path, die_at=5)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    seed_everything(1)
    ckpt, data = checkpointer(tmp_path, 100), Tokens()
    trainer = trainer_of(tmp_path, ckpt, data=data, num_train_epochs=1, **parts)
    trainer.train()
    assert trainer.state.global_step == STEPS_AN_EPOCH
    whole = Tokens()
    trainer_of(tmp_path / "whole", checkpointer(tmp_path / "whole"), data=whole).train()
    assert data.asked == whole.asked[16:22]


REFUSED = {
    "save_strategy": ({"save_strategy": "steps"}, 'save_strategy="no"'),
    "ignore_data_skip": ({"ignore_data_skip": True}, "leave it out"),
    "auto_find_batch_size": ({"auto_find_batch_size": True}, "another size"),
    "data_seed": ({"data_seed": 5}, r"Checkpointer\(seed=5\)"),
    "split_batches": ({"accelerator_config": {"split_batches": True}}, "leave it out"),
    "batch_rebalance": ({"train_sampling_strategy": "batch_rebalance"}, "deals the data out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exact_is_refused(tmp_path: Path, name: str) -> None:
    options, remedy = REFUSED[name]
    with pytest.raises(errors.ConfigurationError, match=remedy):
        trainer_of(tmp_path, Checkpointer(project_config=project(tmp_path)), **options)


def test_a_version_that_this_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Trainer, "_run_epoch")
    with pytest.raises(errors.ConfigurationError, match="its Trainer has no _run_epoch"):
        trainer_of(tmp_path, checkpointer(tmp_path))


class Listed(Trainer):
    def get_train_dataloader(self) -> Any:
        return [{"input_ids": torch.ones(1, 2).long(), "labels": torch.ones(1, 2).long()}]


class Prepared(Trainer):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.made = super().get_train_dataloader()

    def get_train_dataloader(self) -> Any:
        return self.made


@pytest.mark.parametrize("kind", [Listed, Prepared])
def test_loaders_without_a_known_position_are_refused(tmp_path: Path, kind: type[Trainer]) -> None:
    trainer = trainer_of(tmp_path, checkpointer(tmp_path), kind=kind)
    with pytest.raises(errors.ConfigurationError, match=r"return a torch\.utils\.data"):
        trainer.train()


def test_a_loader_of_ones_own_goes_on(tmp_path: Path) -> None:
    class Own(Trainer):
        def get_train_dataloader(self) -> Any:
            data = DataLoader(self.train_dataset, batch_size=4, shuffle=True)
            return self.accelerator.prepare(data)

    assert_survives(tmp_path, {"die_at": 5}, kind=Own)


def test_trainers_own_resuming_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, checkpointer(tmp_path), num_train_epochs=1)
    with pytest.raises(errors.ConfigurationError, match="resume_from_checkpoint"):
        trainer.train(resume_from_checkpoint="somewhere")
    trainer.train()
    with pytest.raises(errors.ConfigurationError, match="has been trained"):
        trainer.train()


def test_classes_derived_from_trainer_keep_what_they_override(tmp_path: Path) -> None:
    class Own(Trainer):
        losses = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.losses += 1
            return super().compute_loss(*args, **kwargs)

    trainer = trainer_of(tmp_path, checkpointer(tmp_path), kind=Own, num_train_epochs=1)
    trainer.train()
    assert isinstance(trainer, Own)
    assert trainer.losses == STEPS_AN_EPOCH
