"""What the events of a run add up to."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_accel_ckpt import errors
from ray_accel_ckpt.report.history import History, history_of
from ray_accel_ckpt.report.page import duration
from ray_accel_ckpt.storage.journal import Event
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


def test_the_time_until_a_finished_run_is_started_again_is_in_no_part() -> None:
    events = [
        *attempt("aaaaaa", 0, 0, 100, end=True),
        *attempt("bbbbbb", 560, 100, 100, tier="storage", end=True),
        event(570, "durable", "bbbbbb", name="x", step=100),
        *attempt("cccccc", 1000, 100, 150, tier="storage"),
        *attempt("dddddd", 1040, 150, 200, tier="storage"),
    ]
    history = history_of(events, where="there")
    assert history.down == (0.0, 0.0, 0.0, 1038 - 1030)
    spent = history.spent
    assert round(spent.all, 6) == 60 + 12 + 32 + (1070 - 1030)
    assert (spent.down, spent.restoring, spent.again) == (8.0, 6.0, 0.0)


def test_time_in_which_two_attempts_overlap_counts_once() -> None:
    events = [*attempt("aaaaaa", 0, 0, 100), *attempt("bbbbbb", 30, 50, 150, tier="storage")]
    history = history_of(events, where="there")
    assert round(history.spent.all, 6) == round(history.known - history.begun, 6) == 90.0


def test_a_first_step_that_takes_long_is_no_step_made_again() -> None:
    events = [
        event(0, "start", "aaaaaa", step=0),
        event(10, "heartbeat", "aaaaaa", step=0),
        event(20, "heartbeat", "aaaaaa", step=5),
        event(30, "start", "bbbbbb", step=5),
        event(40, "heartbeat", "bbbbbb", step=5),
        event(50, "heartbeat", "bbbbbb", step=9),
    ]
    spent = history_of(events, where="there").spent
    assert (spent.again, spent.training, spent.down) == (0.0, 40.0, 10.0)


def test_a_state_that_is_loaded_later_is_no_training() -> None:
    events = [
        event(100, "start", "aaaaaa", step=0),
        event(130, "resumed", "aaaaaa", name="x", step=0, begins=False, seconds=30),
        event(140, "heartbeat", "aaaaaa", step=4),
    ]
    history = history_of(events, where="there")
    assert history.begun == BEGAN + 100
    assert (history.spent.training, history.spent.restoring) == (10.0, 30.0)


def test_a_failure_after_the_end_is_the_end() -> None:
    events = [
        *attempt("aaaaaa", 0, 0, 100, end=True),
        event(70, "failure", "controller", errors={"0": "StorageError: no"}),
    ]
    (only,) = history_of(events, where="there").attempts
    assert only.ending == "failed: rank 0: StorageError: no"


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(), each, max_size=3),
    max_leaves=5,
)
_FIELDS = ("step", "name", "seconds", "blocked", "errors", "share_nbytes", "tier", "begins")
_hostile = st.builds(
    lambda at, kind, writer, fields: Event(at=at, kind=kind, writer=writer, fields=fields),
    st.floats(0, 9e10),
    st.sampled_from(["start", "resumed", "heartbeat", "save", "durable", "failure", "end"]),
    st.sampled_from(["aaaaaa", "bbbbbb", "controller"]),
    st.dictionaries(st.sampled_from(_FIELDS), _json),
)


@given(st.lists(_hostile, max_size=12))
def test_whatever_a_journal_says_is_told_or_left_out(events: list[Event]) -> None:
    history = history_of([event(0, "start", "aaaaaa"), *events], where="there")
    spent = history.spent
    parts = (spent.training, spent.again, spent.saving, spent.restoring, spent.down)
    assert all(part >= 0 for part in parts)
    assert spent.all <= (history.known - history.begun) * (1 + 1e-9)
    assert spent.goodput is None or 0 <= spent.goodput <= 1
    for attempt_ in history.attempts:
        assert not re.search(r"[\x00-\x1f]", attempt_.ending)
    duration(spent.all)
    assert isinstance(json.dumps(dataclasses.asdict(spent)), str)


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
