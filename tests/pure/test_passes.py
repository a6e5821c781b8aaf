"""What a resumed run does with each loader, by where in the epoch the save fell."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from ray_accel_ckpt import Checkpointer
from tests.pure.helpers import KilledError, Plain, checkpointer, live

EPOCHS = 3
Body = Callable[[Checkpointer, list[Any], Callable[[str], None]], None]


def loaders(ckpt: Checkpointer) -> list[Any]:
    """Four batches each; the last one, for evaluation, has two."""
    sizes = (8, 8, 4)
    return [ckpt.prepare(DataLoader(Plain(n), batch_size=2, shuffle=True)) for n in sizes]


def events(
    directory: Path,
    body: Body,
    *,
    die_after: int = 0,
    counted: bool = True,
    save_in_handler: bool = False,
) -> list[str]:
    """What happens in one life, up to the end or to event number `die_after`.

    A checkpoint is saved at each event whose name begins with "save"; and if
    `save_in_handler` where the error that ends the life is handled.
    """
    ckpt = checkpointer(directory, every=10**9)
    ready = loaders(ckpt)
    ckpt.load_state()
    happened: list[str] = []

    def note(event: str) -> None:
        happened.append(event)
        if event.startswith("save"):
            ckpt.save_state()
        if len(happened) == die_after:
            raise KilledError

    epochs = ckpt.epochs(EPOCHS) if counted else range(ckpt.epoch, EPOCHS)
    try:
        for epoch in epochs:
            note(f"epoch {epoch}")
            body(ckpt, ready, note)
    except KilledError:
        if save_in_handler:
            ckpt.save_state()
    return happened


def served(loader: Any, name: str) -> Iterator[str]:
    for batch in loader:
        yield f"{name} {batch.tolist()}"


def rest_after(directory: Path, body: Body, save: int, *, counted: bool = True) -> None:
    """Dying at save number `save`, the two lives together do what one would have done.

    The epoch that is entered again announces itself again; nothing else comes twice.
    """
    whole = events(directory / "whole", body, counted=counted)
    saves = [n for n, event in enumerate(whole, start=1) if event.startswith("save")]
    at = saves[save]
    before = events(directory / "killed", body, die_after=at, counted=counted)
    after = events(directory / "killed", body, counted=counted)
    if after and after[0] != whole[at]:
        current = [event for event in before if event.startswith("epoch")][-1]
        assert after[0] == current
        after = after[1:]
    assert before + after == whole


def train(ckpt: Checkpointer, ready: list[Any], note: Any) -> None:
    for event in served(ready[0], "train"):
        note(event)
        ckpt.step()
        note("save")
    note("after training")


def train_then_evaluate(ckpt: Checkpointer, ready: list[Any], note: Any) -> None:
    train(ckpt, ready, note)
    for event in served(ready[2], "eval"):
        note(event)
    note("evaluated")


def evaluate_while_training(ckpt: Checkpointer, ready: list[Any], note: Any) -> None:
    for event in served(ready[0], "train"):
        note(event)
        if ckpt.global_step % 2 == 1:
            for inner in served(ready[2], "eval"):
                note(inner)
        ckpt.step()
        note("save")


def two_trainings(ckpt: Checkpointer, ready: list[Any], note: Any) -> None:
    for loader, name in zip(ready[:2], ("first", "second"), strict=True):
        for event in served(loader, name):
            note(event)
            ckpt.step()
            note("save")
    note("both done")


def save_within_evaluation(ckpt: Checkpointer, ready: list[Any], note: Any) -> None:
    for event in served(ready[0], "train"):
        note(event)
    for event in served(ready[2], "eval"):
        note(event)
        note("save")
    note("evaluated")


def save_between_evaluation_and_training(ckpt: Checkpointer, ready: list[Any], note: Any) -> None:
    for event in served(ready[2], "eval"):
        note(event)
    note("save")
    for event in served(ready[0], "train"):
        note(event)
        ckpt.step()


def step_once_an_epoch(ckpt: Checkpointer, ready: list[Any], note: Any) -> None:
    for event in served(ready[0], "train"):
        note(event)
    ckpt.step()
    note("save")


def save_at_the_end(ckpt: Checkpointer, ready: list[Any], note: Any) -> None:
    for event in served(ready[0], "train"):
        note(event)
        ckpt.step()
    note("save")


def train_in_turns(ckpt: Checkpointer, ready: list[Any], note: Any) -> None:
    """Two loaders at once, as with labelled and unlabelled data."""
    for pair in zip(served(ready[0], "first"), served(ready[1], "second"), strict=True):
        note(" ".join(pair))
        ckpt.step()
        note("save")


BODIES = [
    train,
    train_then_evaluate,
    evaluate_while_training,
    two_trainings,
    train_in_turns,
]
SAVES = [(body, save) for body in BODIES for save in range(9)]
SAVES += [(save_within_evaluation, save) for save in range(6)]


@pytest.mark.parametrize(("body", "save"), SAVES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_a_resumed_run_does_the_rest(tmp_path: Path, body: Body, save: int) -> None:
    """With one save a batch of four, save 3 is at the last batch of the first epoch."""
    rest_after(tmp_path, body, save)


def test_an_evaluation_that_comes_first_is_not_the_data_of_the_epoch(tmp_path: Path) -> None:
    """Known from the first step on; and in a run that dies again before it has made one."""
    body = save_between_evaluation_and_training
    whole = events(tmp_path / "whole", body)
    saves = [n for n, event in enumerate(whole, start=1) if event == "save"]
    lives = [events(tmp_path / "killed", body, die_after=saves[1])]
    lives += [events(tmp_path / "killed", body, die_after=2) for _ in range(2)]
    assert [life[-1] for life in lives] == ["save"] * 3
    lives.append(events(tmp_path / "killed", body))
    happened = [event for life in lives for event in life]
    assert of(happened, "train", "eval") == of(whole, "train", "eval")


@pytest.mark.parametrize("body", [save_at_the_end, step_once_an_epoch])
@pytest.mark.parametrize("save", [0, 1, 2])
def test_a_save_after_all_data_belongs_to_the_next_epoch(
    tmp_path: Path, save: int, body: Body
) -> None:
    rest_after(tmp_path, body, save)


@pytest.mark.parametrize("body", [train, train_then_evaluate, evaluate_while_training])
@pytest.mark.parametrize("save", [0, 2, 5])
def test_a_loop_that_counts_its_own_epochs_does_the_rest_too(
    tmp_path: Path, body: Body, save: int
) -> None:
    rest_after(tmp_path, body, save, counted=False)


@pytest.mark.parametrize("save", [1, 5, 6])
def test_two_trainings_in_a_loop_that_counts_its_own_epochs(tmp_path: Path, save: int) -> None:
    rest_after(tmp_path, two_trainings, save, counted=False)


def test_an_abandoned_pass_within_the_epoch_is_not_gone_on_with(tmp_path: Path) -> None:
    """A look at one batch before training, as for drawing the network: once an epoch."""

    def body(ckpt: Checkpointer, ready: list[Any], note: Any) -> None:
        for event in served(ready[2], "look"):
            note(event)
            break
        train(ckpt, ready, note)

    rest_after(tmp_path, body, 5)


def test_dying_again_before_a_spent_pass_was_gone_through(tmp_path: Path) -> None:
    """Saved, loaded, saved at once, loaded: the first loader's pass is still over."""
    first = events(tmp_path, two_trainings, die_after=13)
    assert first[-1] == "save"
    for _ in range(2):
        ckpt = checkpointer(tmp_path)
        loaders(ckpt)
        ckpt.load_state()
        ckpt.save_state()
    whole = events(tmp_path / "whole", two_trainings)
    assert first + events(tmp_path, two_trainings)[1:] == whole


def test_the_epoch_of_a_checkpoint_is_the_one_a_resumed_run_begins_in(tmp_path: Path) -> None:
    def script(ckpt: Checkpointer, on_step: Any) -> list[int]:
        loader = loaders(ckpt)[0]
        ckpt.load_state()
        seen = []
        for epoch in ckpt.epochs(EPOCHS):
            seen.append(epoch)
            for _ in loader:
                ckpt.step()
                on_step()
        return seen

    live(script, tmp_path, die_at=4, every=4)
    ckpt = checkpointer(tmp_path)
    loaders(ckpt)
    ckpt.load_state()
    assert list(ckpt.epochs(EPOCHS)) == [0, 1, 2]


def test_an_iterator_held_over_epochs_keeps_no_epoch_open(tmp_path: Path) -> None:
    """Drawn from now and then it never ends; the data of an epoch is gone through all the same."""
    ckpt = checkpointer(tmp_path, every=10**9)
    first, _, last = loaders(ckpt)
    held = None
    for epoch in ckpt.epochs(EPOCHS):
        held = held or iter(last)
        for _ in first:
            ckpt.step()
        if epoch == 0:
            next(held)
        else:
            ckpt.save_state()
            break
    again = checkpointer(tmp_path, every=10**9)
    first, *_ = loaders(again)
    assert again.load_state()
    assert [(epoch, len(list(first))) for epoch in again.epochs(EPOCHS)] == [(2, 4)]


@pytest.mark.parametrize("batches", [0, 2, 4])
def test_a_loop_after_one_that_was_left_begins_where_a_resumed_one_does(
    tmp_path: Path, batches: int
) -> None:
    """With the next epoch, unless the one that was left had no data yet."""

    def rest(ckpt: Checkpointer, loader: Any) -> list[tuple[int, list[int]]]:
        return [(epoch, b.tolist()) for epoch in ckpt.epochs(EPOCHS) for b in loader]

    ckpt = checkpointer(tmp_path, every=10**9)
    loader = loaders(ckpt)[0]
    for epoch in ckpt.epochs(EPOCHS):
        if epoch == 0 or batches:
            list(itertools.islice(loader, batches if epoch else 4))
        if epoch == 1:
            break
    ckpt.save_state()
    again = checkpointer(tmp_path, every=10**9)
    resumed = loaders(again)[0]
    assert again.load_state()
    left = rest(again, resumed)
    assert [epoch for epoch, _ in left] == [*([] if batches else [1] * 4), *[2] * 4]
    assert rest(ckpt, loader) == left


# --- broken off by an error -----------------------------------------------------------


def pairs(ckpt: Checkpointer, ready: list[Any], note: Any) -> None:
    for first, second in zip(ready[0], ready[1], strict=True):
        note(f"both {first.tolist()} {second.tolist()}")
        ckpt.step()


def evaluate_a_little(ckpt: Checkpointer, ready: list[Any], note: Any) -> None:
    """After a look at one batch, training with evaluations of one batch."""
    for event in served(ready[1], "look"):
        note(event)
        break
    for event in served(ready[0], "train"):
        note(event)
        for inner in served(ready[2], "eval"):
            note(inner)
            break
        note("stepped")
        ckpt.step()


def of(happened: list[str], *names: str) -> list[str]:
    return [event for event in happened if event.startswith(names)]


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("body", [train_then_evaluate, two_trainings, pairs])
def test_a_save_in_the_handler_of_an_error_goes_on_after_the_batch_in_hand(
    tmp_path: Path, body: Body, counted: bool
) -> None:
    names = ("train", "eval [", "first", "second", "both [")
    whole = events(tmp_path / "whole", body, counted=counted)
    for at, event in enumerate(whole[: len(whole) // 2], start=1):
        if event.startswith(names):
            directory = tmp_path / str(at)
            before = events(directory, body, die_after=at, counted=counted, save_in_handler=True)
            after = events(directory, body, counted=counted)
            assert of(before + after, *names) == of(whole, *names), event


@pytest.mark.parametrize("at", ["train", "stepped"])
def test_what_was_left_by_break_before_the_error_is_over(tmp_path: Path, at: str) -> None:
    body = evaluate_a_little
    whole = events(tmp_path / "whole", body)
    for number, event in enumerate(whole, start=1):
        if event.startswith(at):
            directory = tmp_path / str(number)
            before = events(directory, body, die_after=number, save_in_handler=True)
            after = events(directory, body)
            assert of(before + after, "train") == of(whole, "train"), event
            evaluated = of(before + after, "eval")
            assert evaluated == of(whole, "eval")[: len(evaluated)], event


def test_an_evaluation_that_an_error_left_begins_anew_and_training_goes_on(tmp_path: Path) -> None:
    body = evaluate_while_training
    whole = events(tmp_path / "whole", body)
    at = 1 + whole.index(of(whole, "eval")[0])
    before = events(tmp_path / "left", body, die_after=at, save_in_handler=True)
    after = events(tmp_path / "left", body)
    assert of(before + after, "train") == of(whole, "train")
    assert of(after, "eval")[:2] == of(whole, "eval")[2:4]


def test_after_the_handler_and_in_that_of_an_error_before_it_a_left_pass_is_over(
    tmp_path: Path,
) -> None:
    """Whoever trains in an except clause, after running out of memory say, may break as ever."""

    def fail() -> None:
        raise KilledError

    def after(ckpt: Checkpointer, loader: Any) -> None:
        with contextlib.suppress(KilledError):
            for _ in loader:
                fail()
        ckpt.save_state()

    def within(ckpt: Checkpointer, loader: Any) -> None:
        try:
            fail()
        except KilledError:
            for _ in ckpt.epochs(1):
                for _ in loader:
                    break
                ckpt.save_state()

    for save in (after, within):
        ckpt = checkpointer(tmp_path / save.__name__, every=10**9)
        save(ckpt, loaders(ckpt)[0])
        again = checkpointer(tmp_path / save.__name__, every=10**9)
        loader = loaders(again)[0]
        assert again.load_state()
        assert (again.epoch, len(list(loader))) == (1, 4)


@pytest.mark.parametrize("where", ["in the pass", "after it"])
@pytest.mark.parametrize("saved", ["in the pass", "after it"])
def test_a_loop_that_goes_back_makes_all_that_came_after(
    tmp_path: Path, saved: str, where: str
) -> None:
    """As a run that is started again from there would: no epoch and no batch is left out."""
    ckpt = checkpointer(tmp_path, every=100)
    loader = ckpt.prepare(DataLoader(Plain(4), batch_size=1, shuffle=True))
    seen: dict[int, list[tuple[int, list[int]]]] = {0: [], 1: []}
    paths: list[str] = []
    lives = 0

    def go_back(now: str) -> None:
        nonlocal lives
        if now == where and ckpt.epoch >= 2 and not lives:
            lives = 1
            ckpt.load_state(paths[0])

    for epoch in ckpt.epochs(4):
        for number, batch in enumerate(loader):
            seen[lives].append((epoch, batch.tolist()))
            ckpt.step()
            if saved == "in the pass" and (epoch, number) == (1, 1) and not paths:
                paths.append(ckpt.save_state())
            if number == 2:
                go_back("in the pass")
        if saved == "after it" and epoch == 1 and not paths:
            paths.append(ckpt.save_state())
        go_back("after it")
    before = 6 if saved == "in the pass" else 8
    assert [epoch for epoch, _ in seen[1]] == [*[1] * (8 - before), *[2] * 4, *[3] * 4]
    again = seen[0][before:]
    assert seen[1][: len(again)] == again
    assert ckpt.global_step == 16


@pytest.mark.parametrize("left", [True, False])
def test_an_evaluation_after_going_back_leaves_out_no_epoch(tmp_path: Path, left: bool) -> None:
    """As where a loss is no number: go back, leave the pass, evaluate as after any other."""
    ckpt = checkpointer(tmp_path, every=10**9)
    first, _, last = loaders(ckpt)
    seen: list[tuple[int, list[int]]] = []
    paths: list[str] = []
    gone_back = False
    for epoch in ckpt.epochs(4):
        for number, batch in enumerate(first):
            ckpt.step()
            seen.append((epoch, batch.tolist()))
            if (epoch, number) == (2, 1) and not gone_back and left:
                gone_back, before = True, list(seen)
                ckpt.load_state(paths[0])
                break
        if epoch == 2 and not gone_back:
            gone_back, before = True, list(seen)
            ckpt.load_state(paths[0])
        if epoch == 0:
            paths.append(ckpt.save_state())
        list(last)
    again = seen[len(before) :]
    assert [epoch for epoch, _ in again] == [*[1] * 4, *[2] * 4, *[3] * 4]
    assert again[: len(before) - 4] == before[4:]
