"""What the events of a run add up to."""

from __future__ import annotations

import pytest

from ray_accel_ckpt import errors
from ray_accel_ckpt.report.history import History, history_of
from tests.report.runs import BEGAN, STEP, attempt, event, run


def _history() -> History:
    return history_of(run(), where="there")


def test_attempts_say_where_they_came_from_how_far_they_came_and_how_they_ended() -> None:
    first, second, third = _history().attempts
    assert (first.first, first.last, first.resumed_from, first.tier) == (0, 240, None, None)
    assert first.ending == "failed: rank 2: ActorDiedError: the node is gone"
    assert (second.first, second.last, second.tier) == (150, 300, "storage")
    assert (second.resumed_from, second.restoring) == ("checkpoint_00000150_000000", 2.0)
    assert second.ending == "lost"
    assert (third.tier, third.ending, third.world_size) == ("memory", "finished", 4)


def test_an_attempt_that_nobody_saw_ending_may_still_go_on() -> None:
    (only,) = history_of(attempt("aaaaaa", 0, 0, 100), where="there").attempts
    assert only.ending == ""


def test_what_becomes_durable_after_the_end_does_not_undo_it() -> None:
    late = event(70, "durable", "aaaaaa", name="checkpoint_00000100_aaaaaa", step=100, seconds=9.0)
    events = [*attempt("aaaaaa", 0, 0, 100, unfinished=100, end=True), late]
    (only,) = history_of(events, where="there").attempts
    assert only.ending == "finished"
    assert only.saves[-1].durable == 9.0


def test_saves_are_told_with_what_became_of_them() -> None:
    saves = {save.step: save for save in _history().attempts[0].saves}
    assert sorted(saves) == [50, 100, 150, 200]
    assert (saves[150].durable, saves[150].nbytes, saves[150].registered) == (3.0, 7, True)
    assert (saves[200].durable, saves[200].nbytes, saves[200].registered) == (None, None, False)
    assert saves[150].at == BEGAN + 150 * STEP


def test_all_of_the_time_is_accounted_for() -> None:
    history = _history()
    spent = history.spent
    assert history.lost == (90, 0)
    # 90 steps again, one save among them, ends on the save's very moment left out.
    assert round(spent.again, 6) == round(90 * STEP - 1 * 0.5, 6)
    assert spent.saving == 0.5 * len(history.saves)
    assert spent.restoring == 4.0
    assert round(spent.down, 6) == ((178 - 144) + (298 - 270))
    assert round(spent.all, 6) == round(history.known - history.begun, 6)
    assert spent.goodput is not None
    assert round(spent.goodput * spent.all, 6) == round(spent.training, 6)


def test_events_of_two_writers_may_come_in_any_order() -> None:
    for by_writer in (False, True):
        events = sorted(run(), key=lambda event: event.writer, reverse=by_writer)
        assert history_of(events, where="there").attempts == _history().attempts


def test_a_loop_that_goes_back_by_itself_only_goes_on(tmp_path: object) -> None:
    events = [*attempt("aaaaaa", 0, 0, 100), event(90, "heartbeat", "aaaaaa", step=40)]
    (only,) = history_of(events, where="there").attempts
    assert [step for _, step in only.points] == sorted(step for _, step in only.points)
    assert only.last == 100


def test_a_run_without_a_journal_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(errors.ConfigurationError, match="the run's own directory") as caught:
        history_of([event(0, "registered", "controller", name="x")], where="s3://b/run")
    assert caught.value.where == "s3://b/run"
