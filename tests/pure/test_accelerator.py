"""Adopting what a 🤗 Accelerator holds: its loops resume anywhere, with the same bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from accelerate.utils import DataLoaderConfiguration, DistributedType
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, WeightedRandomSampler

from ray_accel_ckpt import Checkpointer, errors, open_checkpoint
from ray_accel_ckpt.runtime.adopt import AcceleratorPart
from ray_accel_ckpt.state.shards import ShardDealer, SplitDealer
from tests.accelerated import (
    BATCH,
    SAMPLES,
    Augmented,
    Backwards,
    Meter,
    Scheduled,
    StatefulStream,
    Stream,
    by_index,
    differing,
    own_batches,
    reset,
    resumed_from_each_step,
    train,
)
from tests.pure.helpers import KilledError, seed_everything, streams

Make = Callable[[], DataLoader[Any]]


def _generator() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    return DataLoader(Augmented(), batch_size=BATCH, shuffle=True, generator=generator)


def _weighted() -> DataLoader[Any]:
    sampler = WeightedRandomSampler([1.0] * SAMPLES, SAMPLES)
    return DataLoader(Augmented(), batch_size=BATCH, sampler=sampler)


LOADERS: dict[str, tuple[Make | None, DataLoaderConfiguration | None]] = {
    "shuffled": (None, None),
    "seedable": (None, DataLoaderConfiguration(use_seedable_sampler=True, data_seed=5)),
    "stateful": (None, DataLoaderConfiguration(use_stateful_dataloader=True)),
    "split": (None, DataLoaderConfiguration(split_batches=True)),
    "dispatched": (None, DataLoaderConfiguration(dispatch_batches=True)),
    "dispatched, stateful": (
        None,
        DataLoaderConfiguration(dispatch_batches=True, use_stateful_dataloader=True),
    ),
    "told its epoch": (lambda: DataLoader(Scheduled(), batch_size=BATCH), None),
    "a generator": (_generator, None),
    "weighted": (_weighted, None),
    "own batches": (own_batches, None),
    "workers": (
        lambda: DataLoader(Augmented(), batch_size=BATCH, shuffle=True, num_workers=1),
        None,
    ),
    "stream": (lambda: DataLoader(Stream(), batch_size=BATCH), None),
    "stream, not dispatched": (
        lambda: DataLoader(Stream(), batch_size=BATCH),
        DataLoaderConfiguration(dispatch_batches=False),
    ),
    "stream with state": (lambda: DataLoader(StatefulStream(), batch_size=BATCH), None),
    "stream with state, stateful": (
        lambda: DataLoader(StatefulStream(), batch_size=BATCH),
        DataLoaderConfiguration(use_stateful_dataloader=True, dispatch_batches=False),
    ),
}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
def test_a_run_resumed_at_any_step_ends_with_the_same_bits(tmp_path: Path, name: str) -> None:
    make, data = LOADERS[name]
    options = {} if make is None else {"loader": make}
    resumed_from_each_step(tmp_path, data=data, **options)


def test_a_gradient_scaler_is_gone_on_with(tmp_path: Path) -> None:
    """Its first scale makes fp16 gradients infinite: steps are skipped, and the schedule waits."""
    resumed_from_each_step(tmp_path, scaled=True)


def test_dealing_is_accelerates_own() -> None:
    """As `BatchSamplerShard` deals, for sizes around every border."""
    for units, batch, world_size in itertools.product(range(1, 26), (1, 2, 3, 4), (1, 2, 3)):
        for split, drop_last, even in itertools.product((False, True), repeat=3):
            size = batch * world_size if split else batch
            batches = BatchSampler(SequentialSampler(range(units)), size, drop_last)
            for rank in range(world_size):
                shard = BatchSamplerShard(batches, world_size, rank, split, even)
                dealer = (SplitDealer if split else ShardDealer)(
                    rank=rank,
                    world_size=world_size,
                    whole=batch * world_size,
                    drop_last=drop_last,
                    shard=shard,
                )
                dealt = [dealer.deal(range(units), *cut) for cut in dealer.cuts(units)]
                assert dealt == list(shard), (units, batch, world_size, split, drop_last, even)


def _held(**options: Any) -> tuple[Accelerator, nn.Module, torch.optim.Optimizer, Any]:
    reset()
    accelerator = Accelerator(cpu=True, **options)
    model = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return accelerator, *accelerator.prepare(model, optimizer, by_index())


def test_loaders_stay_what_they_are() -> None:
    accelerator, _, _, loader = _held()
    kind, length = type(loader).__name__, len(loader)
    Checkpointer.from_accelerator(accelerator)
    assert loader is accelerator._dataloaders[0]
    assert (type(loader).__name__, len(loader)) == (kind, length)
    assert isinstance(loader, DataLoaderShard)
    assert isinstance(loader, DataLoader)
    ends = []
    for _ in loader:
        assert accelerator.gradient_state.active_dataloader is loader
        ends.append(accelerator.gradient_state.end_of_dataloader)
    assert ends == [False] * (length - 1) + [True]
    assert accelerator.gradient_state.remainder == -1
    assert loader.iteration == 1


def test_iterating_draws_nothing_from_the_streams_of_the_loop() -> None:
    accelerator, _, _, loader = _held()
    Checkpointer.from_accelerator(accelerator)
    before = streams()
    list(loader)
    assert streams() == before


def test_a_pass_that_is_left_is_over(tmp_path: Path) -> None:
    """A loop that breaks out of its loader gets another order in the next epoch, resumed or not."""

    def life(save_at: int, load: bool) -> list[list[int]]:
        seed_everything(3)
        accelerator, _, _, loader = _held()
        ckpt = Checkpointer.from_accelerator(accelerator)
        if load:
            ckpt.load_state(tmp_path / "at")
        seen = []
        for _ in range(ckpt.epoch, 3):
            seen.append([])
            for n, (_, index) in enumerate(loader):
                seen[-1] += index.tolist()
                ckpt.step()
                if ckpt.global_step == save_at:
                    ckpt.save_state(tmp_path / "at")
                if n == 2 or ckpt.global_step in (3, 6):
                    break
        return seen

    whole = life(save_at=4, load=False)
    assert len({tuple(epoch) for epoch in whole}) == 3
    assert life(save_at=0, load=True) == [whole[1][BATCH:], whole[2]]


@pytest.mark.parametrize(
    "name", ["shuffled", "dispatched", "workers", "stream with state", "stream, not dispatched"]
)
def test_a_pass_that_an_error_left_is_gone_on_with_if_it_is_saved_in_its_handler(
    tmp_path: Path, name: str
) -> None:
    make, data = LOADERS[name]
    options: dict[str, Any] = {"data": data, **({} if make is None else {"loader": make})}
    held = []

    def fail(ckpt: Checkpointer) -> None:
        ckpt.step()
        if ckpt.global_step == 3:
            held.append(ckpt)
            raise KilledError

    untouched = train(Checkpointer.from_accelerator, load=lambda ckpt: None, **options)
    try:
        train(Checkpointer.from_accelerator, load=lambda ckpt: None, on_step=fail, **options)
    except KilledError:
        held[0].save_state(tmp_path / "left")
    resumed = train(
        Checkpointer.from_accelerator,
        load=lambda ckpt: ckpt.load_state(tmp_path / "left"),
        seed=11,
        **options,
    )
    assert differing(resumed, untouched) == []


def test_an_evaluation_inside_an_epoch_is_resumed_too(tmp_path: Path) -> None:
    def life(load: bool) -> list[Any]:
        reset()
        seed_everything(3)
        accelerator = Accelerator(cpu=True)
        loader, held_out = accelerator.prepare(
            by_index(), DataLoader(range(SAMPLES), batch_size=5, shuffle=True)
        )
        ckpt = Checkpointer.from_accelerator(accelerator)
        if load:
            ckpt.load_state(tmp_path / "at")
        seen = []
        for epoch in ckpt.epochs(2):
            for _, index in loader:
                seen.append(index.tolist())
                ckpt.step()
                if (epoch, ckpt.global_step) == (1, 11) and not load:
                    ckpt.save_state(tmp_path / "at")
                    seen.clear()
                if ckpt.global_step % 3 == 0:
                    seen += [accelerator.gather_for_metrics(batch).tolist() for batch in held_out]
        return seen

    assert life(load=False) == life(load=True)


def test_an_evaluation_that_was_left_does_not_decide_when_training_steps(tmp_path: Path) -> None:
    """A window ends with the epoch, also in a process that once broke out of another loader."""

    def life(resumed_at: int) -> list[bool]:
        reset()
        seed_everything(3)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
        loader, held_out = accelerator.prepare(
            by_index(), DataLoader(range(SAMPLES), batch_size=5, shuffle=True)
        )
        ckpt = Checkpointer.from_accelerator(accelerator)
        if resumed_at:
            ckpt.load_state(tmp_path / str(resumed_at))
        stepped = []
        for _ in ckpt.epochs(2):
            for _ in loader:
                with accelerator.accumulate():
                    stepped.append(accelerator.sync_gradients)
                if ckpt.global_step % 3 == 0:
                    left = iter(held_out)
                    next(left)
                    del left
                ckpt.step()
                if not resumed_at:
                    ckpt.save_state(tmp_path / str(ckpt.global_step))
        return stepped

    whole = life(0)
    assert whole == [False, False, True, False, False, True, False, True] * 2
    for step in (3, 5, 8, 12):
        assert life(step) == whole[step:]


def test_a_pass_that_is_dropped_in_the_next_one_leaves_that_active() -> None:
    accelerator, _, _, loader = _held()
    Checkpointer.from_accelerator(accelerator)
    dropped = iter(loader)
    next(dropped)
    batches = iter(loader)
    next(batches)
    del dropped
    assert accelerator.gradient_state.active_dataloader is loader
    list(batches)
    assert accelerator.gradient_state.active_dataloader is None


def test_hooks_and_objects_of_one_class_are_adopted(tmp_path: Path) -> None:
    accelerator, model, *_ = _held()
    one, other = Meter(), Meter()
    one.seen, other.seen = [1], [2]
    accelerator.register_for_checkpointing(one, other)
    called = []
    accelerator.register_save_state_pre_hook(lambda models, weights, _: called.append(models))
    accelerator.register_load_state_pre_hook(lambda models, _: called.append(models))
    ckpt = Checkpointer.from_accelerator(accelerator)
    ckpt.save_state(tmp_path / "at")
    one.seen, other.seen = [3], [4]
    assert ckpt.load_state(tmp_path / "at")
    assert (one.seen, other.seen) == ([1], [2])
    assert called == [[model], [model]]
    assert {"Meter", "Meter_1"} <= set(open_checkpoint(tmp_path / "at").parts)


@pytest.mark.parametrize("call", ["save_state", "load_state", "skip_first_batches"])
def test_accelerates_own_ways_say_what_to_use(tmp_path: Path, call: str) -> None:
    accelerator, *_, loader = _held(project_dir=str(tmp_path))
    Checkpointer.from_accelerator(accelerator)
    argument = loader if call == "skip_first_batches" else str(tmp_path / "folder")
    with pytest.raises(errors.ConfigurationError, match=r"what to do: use (ckpt|the loader)"):
        getattr(accelerator, call)(argument)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("late", ["a model", "a loader", "an object", "a hook"])
def test_what_comes_later_is_found_before_it_is_left_out(tmp_path: Path, late: str) -> None:
    accelerator, *_ = _held()
    ckpt = Checkpointer.from_accelerator(accelerator)
    ckpt.save_state(tmp_path / "whole")
    if late == "a model":
        accelerator.prepare(nn.Linear(2, 2))
    elif late == "a loader":
        accelerator.prepare(by_index())
    elif late == "an object":
        accelerator.register_for_checkpointing(Meter())
    else:
        accelerator.register_save_state_pre_hook(lambda *_: None)
    with pytest.raises(errors.ConfigurationError, match="after the last"):
        ckpt.save_state(tmp_path / "late")
    with pytest.raises(errors.ConfigurationError, match="after the last"):
        ckpt.load_state(tmp_path / "whole")


def test_what_cannot_be_adopted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(accelerator: Any, match: str, **options: Any) -> None:
        with pytest.raises(errors.ConfigurationError, match=match):
            Checkpointer.from_accelerator(accelerator, **options)

    refused(object(), "takes an accelerate.Accelerator")
    reset()
    refused(Accelerator(cpu=True), "after accelerator.prepare")
    sampler = Backwards(SequentialSampler(range(SAMPLES)), BATCH, drop_last=False)
    accelerator, *_, loader = _held()
    # As another process would have it, of several.
    loader.base_dataloader = DataLoader(
        Augmented(), batch_sampler=BatchSamplerShard(sampler, 1, 0, split_batches=True)
    )
    refused(accelerator, "split_batches cannot be kept for the batches of a Backwards")
    assert type(loader) is DataLoaderShard
    accelerator._dataloaders[0] = DataLoader(Augmented())
    refused(accelerator, "a DataLoader, whose position cannot be read")
    accelerator, *_ = _held()
    refused(accelerator, "no scaler and no ddp_kwargs", scaler=None, ddp_kwargs={})
    refused(accelerator, "seconds", storage_timeout=0)
    Checkpointer.from_accelerator(accelerator)
    refused(accelerator, "has a Checkpointer already")
    accelerator, *_ = _held()
    monkeypatch.setattr(
        type(accelerator), "distributed_type", property(lambda _: DistributedType.DEEPSPEED)
    )
    refused(accelerator, "an accelerator of DEEPSPEED")


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        {"step": -1, "sync_gradients": True, "iterations": [0], "buffer_syncs": [True]},
        {"step": 1, "sync_gradients": 1, "iterations": [0], "buffer_syncs": [True]},
        {"step": 1, "sync_gradients": True, "iterations": [], "buffer_syncs": [True]},
        {"step": 1, "sync_gradients": True, "iterations": [True], "buffer_syncs": [True]},
        {"step": 1, "sync_gradients": True, "iterations": [0], "buffer_syncs": [0]},
        {"step": 1, "sync_gradients": True, "iterations": 0, "buffer_syncs": [True]},
    ],
)
def test_counters_that_are_none_are_found_before_anything_changes(state: Any) -> None:
    accelerator, model, *_ = _held()
    part = AcceleratorPart(accelerator, [model])
    with pytest.raises(errors.CorruptCheckpointError):
        part.check(state)
