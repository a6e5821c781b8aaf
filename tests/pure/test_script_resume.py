"""A plain script, killed anywhere, ends with the bits of one that never was."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from ray_accel_ckpt import (
    Checkpointer,
    EverySteps,
    MemoryTier,
    ProjectConfiguration,
    errors,
    open_checkpoint,
)
from ray_accel_ckpt.image import copies
from ray_accel_ckpt.runtime.report import plain_metrics
from ray_accel_ckpt.storage import background
from tests.pure.helpers import (
    OPTIONS,
    Noisy,
    OnStep,
    Plain,
    assert_survives,
    checkpointer,
    checkpoints,
    digest,
    live,
    loss_of,
    network,
    project,
    streams,
)

EPOCHS = 3
# 22 samples in batches of 4: six steps an epoch, eighteen in all.
BATCHES = 6


@pytest.fixture(autouse=True, params=[False, True], ids=["at once", "overlap"])
def overlap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the copies of a save go on beside training."""
    monkeypatch.setitem(OPTIONS, "overlap", request.param)
    monkeypatch.setattr(copies, "_SMALL", 0)
    return bool(request.param)


# --- the whole of a loop ---------------------------------------------------------------


def shuffled(ckpt: Checkpointer, on_step: OnStep, workers: int = 0) -> Any:
    """Shuffle, dropout, batch norm and augmentation from three sources of randomness."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=workers)
    model, optimizer, loader = ckpt.prepare(model, optimizer, loader)
    ckpt.load_state()
    for _ in ckpt.epochs(EPOCHS):
        for x, _ in loader:
            ckpt.backward(loss_of(model, x))
            optimizer.step()
            optimizer.zero_grad()
            ckpt.step()
            on_step()
    return model, optimizer, ckpt.global_step


def shuffled_by_workers(ckpt: Checkpointer, on_step: OnStep) -> Any:
    return shuffled(ckpt, on_step, workers=2)


@pytest.mark.parametrize("step", [3, 4, 6, 7, 17, 18])
def test_killed_at_any_step(tmp_path: Path, step: int) -> None:
    assert_survives(shuffled, tmp_path, kills=(step,))


def test_killed_before_the_first_save(tmp_path: Path) -> None:
    """Nothing to resume from: the seed of the life that counts decides."""
    assert live(shuffled, tmp_path, die_at=2) is None
    assert live(shuffled, tmp_path) == live(shuffled, tmp_path / "whole")


def test_killed_twice_in_the_same_epoch(tmp_path: Path) -> None:
    assert_survives(shuffled, tmp_path, kills=(8, 10), every=2)


def test_killed_in_every_epoch(tmp_path: Path) -> None:
    assert_survives(shuffled, tmp_path, kills=(5, 6, 11, 12, 13, 18))


def test_killed_with_loader_workers(tmp_path: Path) -> None:
    assert_survives(shuffled_by_workers, tmp_path, kills=(8, 10), every=2)


def test_loader_workers_do_not_matter(tmp_path: Path) -> None:
    """Augmentation depends on the sample, so a resume may change their number."""
    assert live(shuffled, tmp_path, die_at=8) is None
    assert live(shuffled_by_workers, tmp_path) == live(shuffled, tmp_path / "whole")


def test_saving_changes_nothing(tmp_path: Path) -> None:
    often = live(shuffled, tmp_path / "often", every=1)
    assert often == live(shuffled, tmp_path / "never", every=1000)


@pytest.fixture
def own_bit_generator() -> Iterator[None]:
    """For a test that gives numpy another one: afterwards it is the one of before."""
    before = np.random.get_bit_generator()
    yield
    np.random.set_bit_generator(before)


@pytest.mark.usefixtures("own_bit_generator")
def test_killed_with_another_bit_generator_of_numpy(tmp_path: Path) -> None:
    def script(ckpt: Checkpointer, on_step: OnStep) -> Any:
        np.random.set_bit_generator(np.random.PCG64(ckpt.global_step))
        np.random.randn()
        return shuffled(ckpt, on_step), np.random.randn()

    assert_survives(script, tmp_path, kills=(8, 10), every=2)


# --- around the end of an epoch --------------------------------------------------------


@pytest.mark.parametrize("save_at", [BATCHES, 2 * BATCHES])
def test_the_end_of_an_epoch_is_done_once_after_its_last_batch_was_saved(
    tmp_path: Path, save_at: int
) -> None:
    """The step of the last batch is inside its epoch: what follows in the epoch is still to do."""

    def script(ckpt: Checkpointer, on_step: OnStep) -> Any:
        loader = ckpt.prepare(DataLoader(Plain(), batch_size=4, shuffle=True))
        ended = Log()
        ckpt.register_for_checkpointing(ended)
        ckpt.load_state()
        for epoch in ckpt.epochs(EPOCHS):
            for _ in loader:
                ckpt.step()
                on_step()
            ended.values.append(epoch)
        return ended.values

    assert_survives(script, tmp_path, kills=(save_at,), every=save_at)


def test_saved_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    """After the data is gone through, a save belongs to the next epoch."""

    def script(ckpt: Checkpointer, on_step: OnStep) -> Any:
        model, loader = ckpt.prepare(network(), DataLoader(Noisy(), batch_size=4, shuffle=True))
        ended = Log()
        ckpt.register_for_checkpointing(ended)
        ckpt.load_state()
        for epoch in ckpt.epochs(EPOCHS):
            for x, _ in loader:
                model(x)
                ckpt.step()
                on_step()
            ended.values.append(epoch)
            ckpt.save_state()
        return model, ended.values, ckpt.global_step

    assert_survives(script, tmp_path, kills=(BATCHES + 1, 2 * BATCHES + 2), every=1000)


def test_a_finished_run_started_again_does_nothing(tmp_path: Path) -> None:
    ended = live(shuffled, tmp_path)
    before = checkpoints(tmp_path)
    assert live(shuffled, tmp_path) == ended
    assert checkpoints(tmp_path) == before


def test_a_finished_run_yields_no_epoch_and_knows_where_it_stands(tmp_path: Path) -> None:
    live(shuffled, tmp_path)
    ckpt = checkpointer(tmp_path)
    prepared(ckpt)
    assert ckpt.load_state()
    assert (ckpt.epoch, ckpt.global_step) == (EPOCHS, EPOCHS * BATCHES)
    assert list(ckpt.epochs(EPOCHS)) == []


def test_a_finished_run_with_two_passes_an_epoch_saves_its_end_once(tmp_path: Path) -> None:
    def script(ckpt: Checkpointer, on_step: OnStep) -> Any:
        loader = ckpt.prepare(DataLoader(Plain(), batch_size=4))
        ckpt.load_state()
        for _ in ckpt.epochs(2):
            for _ in loader:
                ckpt.step()
            for _ in loader:
                ckpt.step()

    live(script, tmp_path, every=1000)
    live(script, tmp_path, every=1000)
    assert checkpoints(tmp_path) == ["checkpoint_0"]


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    def script(epochs: int) -> Any:
        def inner(ckpt: Checkpointer, on_step: OnStep) -> Any:
            model, optimizer, loader = prepared(ckpt)
            ckpt.load_state()
            for _ in ckpt.epochs(epochs):
                train_epoch(ckpt, model, optimizer, loader, on_step)
            return model, optimizer

        return inner

    live(script(2), tmp_path / "longer")
    assert live(script(4), tmp_path / "longer") == live(script(4), tmp_path / "whole")


def test_the_end_is_saved(tmp_path: Path) -> None:
    live(shuffled, tmp_path, every=1000)
    saved = open_checkpoint(tmp_path / "checkpoints" / "checkpoint_0")
    assert (saved.step, saved.epoch) == (EPOCHS * BATCHES, EPOCHS)


# --- accumulation and scaling ----------------------------------------------------------


def accumulating(ckpt: Checkpointer, on_step: OnStep) -> Any:
    """Two micro-batches an optimizer step, each counted, so that saves fall between them."""
    model, optimizer, loader = prepared(ckpt)
    ckpt.load_state()
    for _ in ckpt.epochs(EPOCHS):
        for n, (x, _) in enumerate(loader, start=ckpt.global_step + 1):
            ckpt.backward(loss_of(model, x))
            if n % 2 == 0:
                optimizer.step()
                optimizer.zero_grad()
            ckpt.step()
            on_step()
    return model, optimizer


@pytest.mark.parametrize("step", [4, 10, 13])
def test_killed_inside_an_accumulation_window(tmp_path: Path, step: int) -> None:
    assert_survives(accumulating, tmp_path, kills=(step,), every=3)


def test_gradients_are_saved_inside_a_window_only(tmp_path: Path) -> None:
    live(accumulating, tmp_path, every=1)
    parts = [set(open_checkpoint(p).parts) for p in saved_paths(tmp_path)]
    assert ["gradients" in p for p in parts[:4]] == [True, False, True, False]


def test_gradients_wait_for_the_optimizer_that_has_not_stepped(tmp_path: Path) -> None:
    def make() -> tuple[Checkpointer, list[nn.Module], list[torch.optim.Optimizer]]:
        ckpt = Checkpointer()
        models = [ckpt.prepare(nn.Linear(2, 1)) for _ in range(2)]
        optimizers = [ckpt.prepare(torch.optim.SGD(m.parameters(), lr=0.1)) for m in models]
        return ckpt, models, optimizers

    ckpt, models, optimizers = make()
    for model in reversed(models):
        model(torch.ones(1, 2)).sum().backward()
    optimizers[0].step()
    path = ckpt.save_state(tmp_path / "one waits")
    optimizers[1].step()
    assert "gradients" not in open_checkpoint(ckpt.save_state(tmp_path / "none waits")).parts

    ckpt, resumed, _ = make()
    assert ckpt.load_state(path)
    assert torch.equal(resumed[1].weight.grad, models[1].weight.grad)


def test_loading_a_state_outside_any_window_clears_gradients(tmp_path: Path) -> None:
    ckpt = checkpointer(tmp_path)
    model, _, _ = prepared(ckpt)
    ckpt.save_state()
    ckpt.backward(loss_of(model, torch.ones(4, 4)))
    ckpt.load_state()
    assert all(p.grad is None for p in model.parameters())


def scaled(ckpt: Checkpointer, on_step: OnStep) -> Any:
    """Step 5 and 11 overflow: the scaler skips them and halves its scale."""
    model, optimizer, loader = prepared(ckpt)
    ckpt.load_state()
    for _ in ckpt.epochs(EPOCHS):
        for x, _ in loader:
            loss = loss_of(model, x) * (torch.inf if ckpt.global_step in (4, 10) else 1)
            ckpt.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            ckpt.step()
            on_step()
    return model, optimizer, ckpt.scaler


def grad_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)


@pytest.mark.parametrize("step", [4, 5, 6, 12])
def test_killed_around_a_step_that_the_scaler_skips(tmp_path: Path, step: int) -> None:
    def with_scaler(directory: Path, **options: Any) -> str | None:
        return live(scaled, directory, every=1, scaler=grad_scaler(), **options)

    assert with_scaler(tmp_path / "killed", die_at=step) is None
    assert with_scaler(tmp_path / "killed", seed=9) == with_scaler(tmp_path / "whole")


def test_a_skipped_step_changes_no_parameter_and_lowers_the_scale(tmp_path: Path) -> None:
    ckpt = checkpointer(tmp_path, scaler=grad_scaler())
    model, optimizer, _ = prepared(ckpt)
    before = digest(model.state_dict())
    ckpt.backward(sum(p.sum() for p in model.parameters()) * torch.inf)
    optimizer.step()
    assert digest(model.state_dict()) == before
    assert ckpt.scaler is not None
    assert ckpt.scaler.get_scale() == 512.0


def test_a_scaler_the_user_drives_alone(tmp_path: Path) -> None:
    def script(ckpt: Checkpointer, on_step: OnStep) -> Any:
        model, optimizer, loader = prepared(ckpt)
        scaler = grad_scaler()
        ckpt.register_for_checkpointing(scaler)
        ckpt.load_state()
        for _ in ckpt.epochs(EPOCHS):
            for x, _ in loader:
                loss = loss_of(model, x) * (torch.inf if ckpt.global_step == 4 else 1)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                ckpt.step()
                on_step()
        return model, optimizer, scaler

    assert_survives(script, tmp_path, kills=(5, 7), every=1)


# --- schedules and averages ------------------------------------------------------------


def cosine(optimizer: Any) -> Any:
    return lr_scheduler.LambdaLR(optimizer, lambda n: 0.5 * (1 + np.cos(n / 18 * np.pi)))


def one_cycle(optimizer: Any) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=EPOCHS * BATCHES + 1)


def sequential(optimizer: Any) -> Any:
    warmup = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
    decay = lr_scheduler.ExponentialLR(optimizer, 0.9)
    return lr_scheduler.SequentialLR(optimizer, [warmup, decay], milestones=[5])


def multi_step(optimizer: Any) -> Any:
    return lr_scheduler.MultiStepLR(optimizer, milestones=[4, 4, 9])


@pytest.mark.parametrize("make", [cosine, one_cycle, sequential, multi_step])
@pytest.mark.parametrize("way", ["prepare", "register_for_checkpointing"])
def test_schedulers(tmp_path: Path, make: Any, way: str) -> None:
    def script(ckpt: Checkpointer, on_step: OnStep) -> Any:
        model, optimizer, loader = prepared(ckpt)
        scheduler = make(optimizer)
        getattr(ckpt, way)(scheduler)
        ckpt.load_state()
        for _ in ckpt.epochs(EPOCHS):
            for x, _ in loader:
                ckpt.backward(loss_of(model, x))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                ckpt.step()
                on_step()
        return model, optimizer, scheduler.get_last_lr()

    assert_survives(script, tmp_path, kills=(5, 7), every=2)


def test_a_scheduler_that_watches_the_loss(tmp_path: Path) -> None:
    def script(ckpt: Checkpointer, on_step: OnStep) -> Any:
        model, optimizer, loader = prepared(ckpt)
        plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.5)
        ckpt.register_for_checkpointing(plateau)
        ckpt.load_state()
        for _ in ckpt.epochs(EPOCHS):
            for x, _ in loader:
                loss = loss_of(model, x)
                ckpt.backward(loss)
                optimizer.step()
                plateau.step(loss.item())
                optimizer.zero_grad()
                ckpt.step()
                on_step()
        return model, optimizer, plateau

    assert_survives(script, tmp_path, kills=(5, 9), every=2)


@pytest.mark.parametrize("averaged_first", [True, False])
def test_an_average_of_the_weights(tmp_path: Path, averaged_first: bool) -> None:
    """`AveragedModel` copies the model, which may be prepared already."""

    def script(ckpt: Checkpointer, on_step: OnStep) -> Any:
        model = network()
        ema_fn = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        if averaged_first:
            average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=ema_fn)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        loader = DataLoader(Noisy(), batch_size=4, shuffle=True)
        model, optimizer, loader = ckpt.prepare(model, optimizer, loader)
        if not averaged_first:
            average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=ema_fn)
        ckpt.register_for_checkpointing(average=average)
        ckpt.load_state()
        for _ in ckpt.epochs(EPOCHS):
            for x, _ in loader:
                ckpt.backward(loss_of(model, x))
                optimizer.step()
                optimizer.zero_grad()
                average.update_parameters(model)
                ckpt.step()
                on_step()
        return model, average

    assert_survives(script, tmp_path, kills=(5, 7), every=2)


def test_two_models_and_two_optimizers(tmp_path: Path) -> None:
    """As a GAN has: each keeps its own state, and one network's loss runs through the other."""

    def script(ckpt: Checkpointer, on_step: OnStep) -> Any:
        first, second = nn.Linear(4, 4), nn.Linear(4, 1)
        one = torch.optim.Adam(first.parameters(), lr=0.01)
        two = torch.optim.RMSprop(second.parameters(), lr=0.02)
        loader = DataLoader(Noisy(), batch_size=4, shuffle=True)
        first, second, one, two, loader = ckpt.prepare(first, second, one, two, loader)
        ckpt.load_state()
        for _ in ckpt.epochs(EPOCHS):
            for x, _ in loader:
                ckpt.backward(loss_of(second, first(x)))
                one.step()
                two.step()
                one.zero_grad()
                two.zero_grad()
                ckpt.step()
                on_step()
        return first, second, one, two

    assert_survives(script, tmp_path, kills=(5, 7), every=2)


def test_a_loop_that_counts_its_own_epochs(tmp_path: Path) -> None:
    """Without `ckpt.epochs`, the first loader tells the epoch; evaluation runs in each of them."""

    def script(ckpt: Checkpointer, on_step: OnStep) -> Any:
        model, optimizer, loader = prepared(ckpt)
        evaluation = ckpt.prepare(DataLoader(Plain(6), batch_size=3))
        seen = Log()
        ckpt.register_for_checkpointing(seen)
        ckpt.load_state()
        for _ in range(ckpt.epoch, EPOCHS):
            train_epoch(ckpt, model, optimizer, loader, on_step)
            seen.values.append(sum(len(batch) for batch in evaluation))
        return model, optimizer, seen.values

    assert_survives(script, tmp_path, kills=(4, 8, 9), every=2)


# --- registering -----------------------------------------------------------------------


class Log:
    """Something of the user's that has a state."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def state_dict(self) -> dict[str, Any]:
        return {"values": list(self.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state["values"]


def test_two_objects_of_one_class_must_be_named(tmp_path: Path) -> None:
    ckpt = checkpointer(tmp_path)
    ckpt.register_for_checkpointing(Log())
    with pytest.raises(errors.ConfigurationError, match="'Log'"):
        ckpt.register_for_checkpointing(Log())
    ckpt.register_for_checkpointing(left=Log(), right=Log())


@pytest.mark.parametrize("name", ["model", "optimizer", "loader", "scaler", "rng", "progress"])
def test_a_name_that_is_taken_is_refused(tmp_path: Path, name: str) -> None:
    ckpt = checkpointer(tmp_path, scaler=grad_scaler())
    prepared(ckpt)
    with pytest.raises(errors.ConfigurationError, match=name):
        ckpt.register_for_checkpointing(**{name: Log()})


def test_what_is_prepared_twice_is_one_part(tmp_path: Path) -> None:
    ckpt = checkpointer(tmp_path)
    objects = prepared(ckpt)
    schedule = ckpt.prepare(cosine(objects[1]))
    assert ckpt.prepare(*objects, schedule) == (*objects, schedule)
    parts = {"progress", "model", "optimizer", "loader", "scheduler", "rng"}
    assert set(open_checkpoint(ckpt.save_state()).parts) == parts


def test_a_loader_of_another_checkpointer_is_refused(tmp_path: Path) -> None:
    """A notebook cell run twice: the second one's checkpoints would not hold the position."""
    loader = checkpointer(tmp_path).prepare(DataLoader(Noisy(), batch_size=4))
    with pytest.raises(errors.ConfigurationError, match="another Checkpointer"):
        checkpointer(tmp_path).prepare(loader)


def test_objects_without_a_state_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"builtins\.int, builtins\.list"):
        checkpointer(tmp_path).register_for_checkpointing(Log(), 3, [])


@pytest.mark.parametrize("per_rank", [True, False])
def test_a_registered_object_comes_back(tmp_path: Path, per_rank: bool) -> None:
    ckpt, log = checkpointer(tmp_path), Log()
    ckpt.register_for_checkpointing(log, per_rank=per_rank)
    log.values = [1, (2, "b"), torch.arange(3)]
    ckpt.save_state()

    again, found = checkpointer(tmp_path), Log()
    again.register_for_checkpointing(found, per_rank=per_rank)
    assert again.load_state()
    assert digest(found.values) == digest(log.values)


def test_what_an_object_raises_when_it_is_loaded_says_which_it_was(tmp_path: Path) -> None:
    class Picky(Log):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.values = state["other"]

    ckpt = checkpointer(tmp_path)
    ckpt.register_for_checkpointing(picky=Picky())
    path = ckpt.save_state()
    with pytest.raises(KeyError) as caught:
        ckpt.load_state()
    assert f"part 'picky' of {path}" in caught.value.__notes__[0]


def test_a_state_that_cannot_be_saved_is_refused_when_saving(tmp_path: Path) -> None:
    ckpt, log = checkpointer(tmp_path), Log()
    ckpt.register_for_checkpointing(log)
    log.values = [lambda: None]
    with pytest.raises(errors.UnsupportedStateError, match="Log/values/0"):
        ckpt.save_state()
    log.values = []
    ckpt.save_state()


@pytest.mark.usefixtures("own_bit_generator")
def test_what_no_load_would_take_is_refused_by_the_first_save(tmp_path: Path) -> None:
    class Mine(np.random.PCG64):
        """Which a life that resumes cannot make anew."""

    ckpt = checkpointer(tmp_path)
    np.random.set_bit_generator(Mine(1))
    with pytest.raises(errors.UnsupportedStateError, match=r"part 'rng'.*\n.*\n.*'Mine'"):
        ckpt.save_state()
    assert contents(tmp_path / "checkpoints") == {}
    np.random.set_bit_generator(np.random.PCG64(1))
    ckpt.save_state()
    assert ckpt.load_state()


def test_what_no_load_would_take_is_refused_when_it_first_comes_to_be(tmp_path: Path) -> None:
    class Odd(torch.optim.SGD):
        """Keeps its state as no optimizer does."""

        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            self.state.update({p: [torch.ones(1)] for p in self.param_groups[0]["params"]})

    ckpt = Checkpointer(project_config=project(tmp_path))
    model = ckpt.prepare(nn.Linear(2, 1))
    optimizer = ckpt.prepare(Odd(model.parameters()))
    ckpt.save_state()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with pytest.raises(errors.UnsupportedStateError, match="part 'optimizer'"):
        ckpt.save_state()
    assert {Path(path).parent.name for path in contents(tmp_path)} == {"checkpoint_0", "events"}


def test_a_single_object_is_returned_as_it_is(tmp_path: Path) -> None:
    ckpt = checkpointer(tmp_path)
    assert ckpt.prepare("anything") == "anything"
    assert ckpt.prepare(1, None) == (1, None)


def test_a_prepared_model_can_be_copied(tmp_path: Path) -> None:
    model = checkpointer(tmp_path).prepare(network())
    assert digest(copy.deepcopy(model).state_dict()) == digest(model.state_dict())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_scripted_module_is_prepared_inside_another(tmp_path: Path) -> None:
    ckpt = checkpointer(tmp_path)
    with pytest.raises(errors.ConfigurationError, match="ScriptModule"):
        ckpt.prepare(torch.jit.script(nn.Linear(2, 2)))
    model = ckpt.prepare(nn.Sequential(torch.jit.script(nn.Linear(2, 2))))
    before = digest(model)
    model(torch.ones(1, 2)).sum().backward()
    assert "gradients" in open_checkpoint(ckpt.save_state()).parts
    with torch.no_grad():
        model[0].weight.zero_()
    assert ckpt.load_state()
    assert digest(model) == before


# --- hooks -----------------------------------------------------------------------------


def test_what_a_save_hook_takes_out_of_the_weights_is_not_saved(tmp_path: Path) -> None:
    ckpt = checkpointer(tmp_path)
    model = ckpt.prepare(nn.Linear(3, 3))
    ckpt.register_save_state_pre_hook(lambda models, weights, path: weights[0].pop("bias"))
    ckpt.save_state()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.fill_(5.0)
    assert ckpt.load_state()
    assert model.weight.count_nonzero() == 9
    assert torch.equal(model.bias, torch.full((3,), 5.0))


def test_a_model_that_hooks_take_out_is_left_to_them(tmp_path: Path) -> None:
    ckpt = checkpointer(tmp_path)
    model = ckpt.prepare(nn.Linear(3, 3))
    ckpt.register_save_state_pre_hook(lambda models, weights, path: weights.clear())
    ckpt.register_load_state_pre_hook(lambda models, path: models.clear())
    path = ckpt.save_state()
    assert "model" not in open_checkpoint(path).parts
    before = digest(model.state_dict())
    assert ckpt.load_state()
    assert digest(model.state_dict()) == before


@pytest.mark.parametrize(
    ("put_in", "where"),
    [
        (lambda weights: weights.__setitem__(0, dict(weights[0])), "a state dict in the place"),
        (lambda weights: weights.append({}), "a state dict in the place"),
        (lambda weights: weights[0].update(more=torch.ones(1)), "model/more"),
        (lambda weights: weights[0].update(bias=torch.ones(3).half()), "model/bias, in another"),
        (lambda weights: weights[0].update(bias=torch.ones(4)), "model/bias, in another"),
    ],
)
def test_what_a_save_hook_puts_in_is_refused(tmp_path: Path, put_in: Any, where: str) -> None:
    """It would make a checkpoint that the model cannot load, or that the model is not in."""
    ckpt = checkpointer(tmp_path)
    ckpt.prepare(nn.Linear(3, 3))
    handle = ckpt.register_save_state_pre_hook(lambda models, weights, path: put_in(weights))
    with pytest.raises(errors.ConfigurationError, match=where):
        ckpt.save_state()
    handle.remove()
    ckpt.save_state()
    assert ckpt.load_state()


def test_hooks_see_the_models_their_weights_and_the_place(tmp_path: Path) -> None:
    ckpt = checkpointer(tmp_path)
    model = ckpt.prepare(nn.Linear(3, 3))
    saw: list[Any] = []
    ckpt.register_save_state_pre_hook(lambda *given: saw.append(given))
    ckpt.register_load_state_pre_hook(lambda *given: saw.append(given))
    path = ckpt.save_state()
    ckpt.load_state()
    (models, weights, saved_to), (loaded, loaded_from) = saw
    assert models[0] is loaded[0] is model
    assert list(weights[0]) == ["weight", "bias"]
    assert saved_to == loaded_from == path


def test_a_removed_hook_is_not_called(tmp_path: Path) -> None:
    ckpt = checkpointer(tmp_path)
    ckpt.prepare(nn.Linear(3, 3))
    ckpt.register_save_state_pre_hook(lambda *given: pytest.fail("called")).remove()
    ckpt.register_load_state_pre_hook(lambda *given: pytest.fail("called")).remove()
    ckpt.save_state()
    assert ckpt.load_state()


# --- names and places ------------------------------------------------------------------


def test_only_the_newest_stay(tmp_path: Path) -> None:
    ckpt = Checkpointer(project_config=project(tmp_path, total_limit=2))
    for _ in range(5):
        ckpt.save_state()
    assert checkpoints(tmp_path) == ["checkpoint_3", "checkpoint_4"]


def test_the_newest_that_stay_can_be_loaded(tmp_path: Path) -> None:
    live(shuffled, tmp_path, every=2)
    ckpt = Checkpointer(project_config=project(tmp_path, total_limit=1))
    prepared(ckpt)
    assert ckpt.load_state()
    path = ckpt.save_state()
    assert [p.name for p in saved_paths(tmp_path)] == [Path(path).name]
    assert ckpt.load_state()


def test_numbers_go_on_from_what_exists(tmp_path: Path) -> None:
    first = Checkpointer(project_config=project(tmp_path))
    first.save_state()
    first.save_state()
    second = Checkpointer(project_config=project(tmp_path))
    assert Path(second.save_state()).name == "checkpoint_2"
    (tmp_path / "checkpoints" / "checkpoint_7").mkdir()
    assert Path(first.save_state()).name == "checkpoint_8"
    third = Checkpointer(project_config=project(tmp_path))
    assert Path(third.save_state()).name == "checkpoint_9"


def test_two_that_save_at_once_get_a_name_each(tmp_path: Path) -> None:
    """One begins a save when the other has its name, and has not written anything yet."""
    one, two = (Checkpointer(project_config=project(tmp_path)) for _ in range(2))
    model, other = one.prepare(network()), two.prepare(network())
    one.save_state()
    two.save_state()
    scramble(other)
    others = []
    hook = one.register_save_state_pre_hook(lambda *_: others.append(two.save_state()))
    path = one.save_state()
    hook.remove()
    assert [Path(path).name, Path(others[0]).name] == ["checkpoint_2", "checkpoint_3"]
    for saved, live_one in ((path, model), (others[0], other)):
        found = open_checkpoint(saved).state_dict("model")
        assert all(torch.equal(found[name], t) for name, t in live_one.state_dict().items())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    live(shuffled, tmp_path, die_at=7)
    # The journal beside it is no checkpoint: its thread may still be writing what came last.
    home = tmp_path / "checkpoints"
    before = contents(home)
    live(shuffled, tmp_path)
    assert before.items() <= contents(home).items()


def test_a_load_that_was_forgotten_is_told_at_the_first_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def saves(*, load: bool) -> str:
        caplog.clear()
        ckpt = Checkpointer(project_config=project(tmp_path, total_limit=2))
        prepared(ckpt)
        if load:
            ckpt.load_state()
        for _ in range(2):
            ckpt.step()
            ckpt.save_state()
        return caplog.text

    with caplog.at_level("WARNING"):
        (tmp_path / "checkpoints" / "checkpoint_0").mkdir(parents=True)
        assert "nothing was loaded" not in saves(load=False)
        assert "nothing was loaded" not in saves(load=True)
        told = saves(load=False)
    assert told.count("nothing was loaded") == 1
    assert "the newest checkpoint_4 of step 4" in told
    assert "total_limit=2 removes" in told


def test_numbers_begin_at_iteration(tmp_path: Path) -> None:
    ckpt = Checkpointer(project_config=project(tmp_path, iteration=5))
    assert Path(ckpt.save_state()).name == "checkpoint_5"


def test_what_is_not_ours_is_ignored_and_kept(tmp_path: Path) -> None:
    home = tmp_path / "checkpoints"
    (home / "best_1").mkdir(parents=True)
    (home / "checkpoint_notes").mkdir()
    (home / "checkpoint_notes" / "why.txt").write_text("mine")
    (home / "checkpoint_3").write_text("a file, not a directory")
    (home / ".DS_Store").write_text("x")
    before = contents(tmp_path)
    ckpt = Checkpointer(project_config=project(tmp_path, total_limit=1))
    assert not ckpt.load_state()
    ckpt.save_state()
    ckpt.save_state()
    assert ckpt.load_state()
    assert before.items() <= contents(tmp_path).items()
    assert (home / "best_1").is_dir()


def test_a_directory_of_ones_own(tmp_path: Path) -> None:
    ckpt = Checkpointer()
    model = ckpt.prepare(network())
    before = digest(model.state_dict())
    assert ckpt.save_state(tmp_path / "mine") == str(tmp_path / "mine")
    scramble(model)
    assert ckpt.load_state(tmp_path / "mine")
    assert digest(model.state_dict()) == before


def test_a_directory_is_saved_to_once(tmp_path: Path) -> None:
    ckpt = Checkpointer()
    model = ckpt.prepare(network())
    ckpt.save_state(tmp_path / "mine")
    before = digest(model.state_dict())
    scramble(model)
    with pytest.raises(errors.CheckpointExistsError, match="mine"):
        ckpt.save_state(tmp_path / "mine")
    assert ckpt.load_state(str(tmp_path / "mine"))
    assert digest(model.state_dict()) == before


def test_another_process_does_not_overwrite_either(tmp_path: Path) -> None:
    Checkpointer().save_state(tmp_path / "mine")
    with pytest.raises(errors.CheckpointExistsError):
        Checkpointer().save_state(tmp_path / "mine")


def test_the_first_start_finds_nothing_and_changes_nothing(tmp_path: Path) -> None:
    ckpt = checkpointer(tmp_path)
    model, optimizer, _ = prepared(ckpt)
    before = digest(model, optimizer, streams())
    assert not ckpt.load_state()
    assert digest(model, optimizer, streams()) == before
    assert ckpt.resumed_from is None


def test_a_named_checkpoint_that_is_absent_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(errors.NotACheckpointError, match="nowhere"):
        Checkpointer().load_state(tmp_path / "nowhere")


def test_loading_says_from_where(tmp_path: Path) -> None:
    ckpt = checkpointer(tmp_path)
    path = ckpt.save_state()
    again = checkpointer(tmp_path)
    again.load_state()
    assert again.resumed_from == path


# --- a part of it ----------------------------------------------------------------------


def test_loading_waits_for_what_the_process_itself_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = checkpointer(tmp_path, every=1)
    ckpt.prepare(nn.Linear(1, 1))
    ckpt.step()
    ckpt.flush()
    waited_for = threading.Event()
    write_image, flush = background.write_image, background.BackgroundWriter.flush

    def held_back(*args: Any, **options: Any) -> None:
        assert waited_for.wait(60)
        write_image(*args, **options)

    def flushed(self: background.BackgroundWriter) -> None:
        waited_for.set()
        flush(self)

    monkeypatch.setattr(background, "write_image", held_back)
    monkeypatch.setattr(background.BackgroundWriter, "flush", flushed)
    ckpt.step()
    try:
        assert ckpt.load_state()
        assert ckpt.global_step == 2
    finally:
        waited_for.set()


def test_a_save_that_failed_is_told_before_an_older_one_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = checkpointer(tmp_path, every=1)
    ckpt.prepare(nn.Linear(1, 1))
    ckpt.step()
    ckpt.flush()

    def full(*args: Any, **options: Any) -> None:
        raise errors.StorageError("no space")

    with monkeypatch.context() as patched:
        patched.setattr(background, "write_image", full)
        ckpt.step()
        with pytest.raises(errors.StorageError, match="no space"):
            ckpt.load_state()
    assert ckpt.global_step == 2
    assert ckpt.load_state()
    assert ckpt.global_step == 1


def test_the_model_alone(tmp_path: Path) -> None:
    """A fine-tuning start: weights come, everything else begins anew."""
    live(shuffled, tmp_path, die_at=7)
    ckpt = checkpointer(tmp_path)
    model, optimizer, loader = prepared(ckpt)
    before = streams()
    assert ckpt.load_state(parts=("model",))
    saved = open_checkpoint(saved_paths(tmp_path)[-1]).state_dict("model")
    assert digest(model.state_dict()) == digest(saved)
    assert optimizer.state_dict()["state"] == {}
    assert (ckpt.global_step, ckpt.epoch) == (0, 0)
    assert len(list(loader)) == BATCHES
    assert streams() == before


def test_a_part_that_is_not_registered(tmp_path: Path) -> None:
    ckpt = checkpointer(tmp_path)
    ckpt.save_state()
    with pytest.raises(errors.ConfigurationError, match="model"):
        ckpt.load_state(parts=("model",))


def test_a_mismatch_changes_nothing(tmp_path: Path) -> None:
    ckpt = checkpointer(tmp_path)
    prepared(ckpt)
    ckpt.save_state()
    other = checkpointer(tmp_path)
    model, optimizer, _ = prepared(other, nn.Linear(4, 9))
    before = digest(model, optimizer, streams())
    with pytest.raises(errors.StateMismatchError) as caught:
        other.load_state()
    assert digest(model, optimizer, streams()) == before
    assert "model/weight" in caught.value.missing
    assert "model/0.weight" in caught.value.unexpected


def test_strict_false_takes_what_fits(tmp_path: Path) -> None:
    ckpt = checkpointer(tmp_path)
    model = ckpt.prepare(nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 2)}))
    ckpt.save_state()
    other = checkpointer(tmp_path)
    larger = other.prepare(nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 5)}))
    before = digest(larger["b"].state_dict()["weight"])
    assert other.load_state(strict=False)
    assert torch.equal(larger["a"].weight, model["a"].weight)
    assert digest(larger["b"].state_dict()["weight"]) == before


# --- metrics ---------------------------------------------------------------------------


def test_a_metrics_function_is_called_only_when_a_save_happens(tmp_path: Path) -> None:
    ckpt = checkpointer(tmp_path, every=3)
    called: list[int] = []

    def metrics() -> dict[str, float]:
        called.append(ckpt.global_step)
        return {"loss": 0.5}

    for _ in range(7):
        ckpt.step(metrics)
    assert set(called) <= {3, 6}


def test_a_metrics_function_that_returns_no_dict_is_refused() -> None:
    with pytest.raises(errors.ConfigurationError, match="what metrics"):
        plain_metrics(lambda: [1])  # type: ignore[arg-type, return-value]


# --- arguments -------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, -1, 1.5, "3", True])
def test_every_steps_takes_a_positive_integer(steps: Any) -> None:
    with pytest.raises(errors.ConfigurationError):
        EverySteps(steps)


@pytest.mark.parametrize(
    "options",
    [
        {"save": 5},
        {"slots": 0},
        {"slots": 1.5},
        {"storage_timeout": 0},
        {"storage_timeout": -1},
        {"storage_timeout": float("nan")},
        {"storage_timeout": "5"},
        {"storage_timeout": True},
        {"project_config": "runs/a"},
        {"scaler": True},
        {"scaler": torch.amp.GradScaler},
        {"ddp_kwargs": 3},
        {"memory": True},
        {"memory": MemoryTier()},
    ],
)
def test_a_wrong_argument_is_found_at_once(tmp_path: Path, options: Any) -> None:
    with pytest.raises(errors.ConfigurationError):
        Checkpointer(**{"save": EverySteps(1), "project_config": project(tmp_path), **options})


@pytest.mark.parametrize(
    "options",
    [
        {"automatic_checkpoint_naming": True},
        {"total_limit": 0},
        {"total_limit": "3"},
        {"total_limit": 2.5},
        {"iteration": -1},
        {"iteration": "3"},
        {"project_dir": 3},
        {"project_dir": b"runs"},
        # Where Accelerate has its logging_dir.
        {"project_dir": "runs", "automatic_checkpoint_naming": "logs"},
        {"project_dir": ""},
        {"project_dir": Path("s3://bucket/run")},
    ],
)
def test_a_wrong_project_is_found_at_once(options: Any) -> None:
    with pytest.raises(errors.ConfigurationError, match="what to do"):
        ProjectConfiguration(**options)


@pytest.mark.parametrize("seed", ["42", 1.5, True, 2**64, -(2**63) - 1, torch.tensor(3)], ids=repr)
def test_a_seed_that_no_checkpoint_can_hold_is_found_at_once(seed: Any) -> None:
    with pytest.raises(errors.ConfigurationError, match="seed must be a whole number"):
        Checkpointer(seed=seed)


@pytest.mark.parametrize(
    "seed", [np.int64(42), np.uint64(2**64 - 1), 2**64 - 1, -(2**63)], ids=repr
)
def test_a_seed_comes_back(tmp_path: Path, seed: Any) -> None:
    for life in range(2):
        ckpt = Checkpointer(project_config=project(tmp_path), seed=seed)
        ckpt.prepare(DataLoader(Noisy(), batch_size=4, shuffle=True))
        assert ckpt.load_state() == bool(life)
        path = ckpt.save_state()
    assert open_checkpoint(path).state_dict("progress")["seed"] == int(seed)


@pytest.mark.parametrize("naming", [{}, {"project_config": ProjectConfiguration("somewhere")}])
def test_saves_need_a_place(naming: Any) -> None:
    with pytest.raises(errors.ConfigurationError, match="nowhere to save to"):
        Checkpointer(save=EverySteps(1), **naming)


@pytest.mark.parametrize("call", ["prepare", "load_state", "save_state"])
def test_peers_that_were_not_joined_are_not_trained_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """`torchrun` starts processes, and no process group: that is the script's to do."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ckpt = checkpointer(tmp_path)
    with pytest.raises(errors.ConfigurationError, match="init_process_group"):
        getattr(ckpt, call)(*([network()] if call == "prepare" else []))
    monkeypatch.setenv("WORLD_SIZE", "1")
    ckpt.save_state()


def test_saving_and_loading_by_hand_need_a_place() -> None:
    with pytest.raises(errors.ConfigurationError, match="nowhere to save to"):
        Checkpointer().save_state()
    with pytest.raises(errors.ConfigurationError, match="no directory to look in"):
        Checkpointer().load_state()


@pytest.mark.parametrize("place", ["", Path("s3://bucket/run"), "gs:/bucket/run", 5, b"bytes"])
def test_what_is_no_place_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.ConfigurationError):
        Checkpointer().save_state(place)
    with pytest.raises(errors.ConfigurationError):
        Checkpointer().load_state(place)
    with pytest.raises(errors.ConfigurationError):
        open_checkpoint(place)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_checkpoints_are_in_is_no_checkpoint(tmp_path: Path) -> None:
    ckpt = Checkpointer(project_config=project(tmp_path))
    ckpt.save_state()
    home = tmp_path / "checkpoints"
    for given in (tmp_path, home):
        for opens in (ckpt.load_state, open_checkpoint):
            with pytest.raises(errors.NotACheckpointError, match=f"there are some in {home}:"):
                opens(given)


WRONG_CALLS: dict[str, Callable[[Any], Any]] = {
    "epochs of text": lambda ckpt: ckpt.epochs("3"),
    "epochs of a fraction": lambda ckpt: ckpt.epochs(2.5),
    "epochs below none": lambda ckpt: ckpt.epochs(-1),
    "skipping below none": lambda ckpt: ckpt.skip_first_batches([1, 2], -1),
    "skipping a fraction": lambda ckpt: ckpt.skip_first_batches([1, 2], 1.5),
    "saving to a number": lambda ckpt: ckpt.save_state(3),
    "loading from a number": lambda ckpt: ckpt.load_state(3),
    "opening a number": lambda ckpt: open_checkpoint(3),
    "one name as parts": lambda ckpt: ckpt.load_state(parts="model"),
    "numbers as parts": lambda ckpt: ckpt.load_state(parts=(3,)),
    "a number as parts": lambda ckpt: ckpt.load_state(parts=3),
    "metrics in a list": lambda ckpt: ckpt.step(metrics=[1]),
    "metrics of a save in a list": lambda ckpt: ckpt.save_state(metrics=[1]),
    "a list of models": lambda ckpt: ckpt.prepare([network()]),
    "a dict of loaders": lambda ckpt: ckpt.prepare({"train": DataLoader(Plain())}),
    "a tuple of an optimizer": lambda ckpt: ckpt.prepare(
        network(), (torch.optim.SGD(network().parameters()),)
    ),
}


@pytest.mark.parametrize("call", WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_a_wrong_call_says_what_to_do_and_does_nothing(
    tmp_path: Path, call: Callable[[Any], Any]
) -> None:
    ckpt = checkpointer(tmp_path)
    with pytest.raises(errors.ConfigurationError, match="what to do"):
        call(ckpt)
    assert (ckpt.global_step, checkpoints(tmp_path)) == (0, [])
    assert "model" not in open_checkpoint(ckpt.save_state()).parts


def test_a_list_of_nothing_to_prepare_comes_back_as_it_is(tmp_path: Path) -> None:
    assert checkpointer(tmp_path).prepare([1, "a"], {}) == ([1, "a"], {})


# --- what the scripts share ------------------------------------------------------------


def prepared(ckpt: Checkpointer, model: nn.Module | None = None) -> tuple[Any, Any, Any]:
    model = model or network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return ckpt.prepare(model, optimizer, DataLoader(Noisy(), batch_size=4, shuffle=True))


def train_epoch(
    ckpt: Checkpointer, model: nn.Module, optimizer: Any, loader: Iterable[Any], on_step: OnStep
) -> None:
    for x, _ in loader:
        ckpt.backward(loss_of(model, x))
        optimizer.step()
        optimizer.zero_grad()
        ckpt.step()
        on_step()


def scramble(model: nn.Module) -> None:
    with torch.no_grad(), contextlib.suppress(RuntimeError):
        for value in model.state_dict().values():
            value.fill_(3)


def saved_paths(directory: Path) -> list[Path]:
    return [directory / "checkpoints" / name for name in checkpoints(directory)]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
