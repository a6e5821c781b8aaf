"""When the ranks exchange a word, and what they then save, in simulated time."""

from __future__ import annotations

import itertools
import random
from unittest import mock

import pytest

from ray_accel_ckpt import EverySeconds, EverySteps, MaxOverhead
from ray_accel_ckpt.policy import SavePolicy
from ray_accel_ckpt.runtime.exchange import Preemption
from ray_accel_ckpt.runtime.heartbeat import MAX_GAP, REGISTRATION, SHARE, Heartbeat
from tests.pure.drains import World, longest_gap

# A pace is known within a quarter, and beats are whole steps apart.
SLACK = 1.6


def _reaction(world: World) -> float:
    """Seconds from the moment the workers are told until the step at which they act."""
    return SLACK * max(MAX_GAP, world.pace) + 2 * world.pace


@pytest.mark.parametrize("seed", range(200))
def test_a_drain_at_any_moment_is_answered_by_a_save(seed: int) -> None:
    draw = random.Random(1000 + seed)
    policies: list[SavePolicy | None] = [None, EverySteps(40), EverySeconds(45), MaxOverhead(0.02)]
    world = World(seed=seed, policy=policies[seed % 4])
    at, lead = draw.uniform(20, 200), draw.uniform(5, 180)
    notice = world.drain(at=at, lead=lead)
    ((seen, _),) = world.notices
    deadline = at + lead
    world.run(until=deadline)

    answer = next((save for save in world.saves if save.begun >= seen), None)
    # One upload may be under way, and one behind it, when the notice comes.
    needed = _reaction(world) + world.blocked + 3 * 1.25 * world.upload + REGISTRATION
    if seen + needed <= deadline:
        assert answer is not None
        assert answer.registered <= deadline
    if answer is not None:
        assert answer.begun - seen <= _reaction(world)
    assert notice.deadline == deadline


@pytest.mark.parametrize("pace", [0, 8, 15])
@pytest.mark.parametrize("lead", [60, 120])
@pytest.mark.parametrize("seed", range(40))
def test_the_last_save_before_the_deadline_loses_little(seed: int, lead: int, pace: float) -> None:
    world = World(seed=seed, policy=None, upload=1.0, pace=pace)
    world.drain(at=50, lead=lead)
    world.run(until=50 + lead)
    assert len([save for save in world.saves if save.begun > 50]) == 2
    last = world.registered(by=50 + lead)[-1]
    assert last is world.saves[-1]
    assert 50 + lead - last.begun <= 1.5 * 1.25 * world.upload + REGISTRATION + _reaction(world)


@pytest.mark.parametrize("seed", range(40))
def test_no_periodic_save_is_begun_that_could_not_be_finished(seed: int) -> None:
    world = World(seed=seed, policy=EverySteps(1), pace=2.5, upload=2.0)
    world.drain(at=60, lead=60)
    world.run(until=120)
    assert not [save for save in world.saves if 120 - 0.8 * world.upload < save.begun < 120]
    assert world.registered(by=120)[-1].begun >= 120 - 1.5 * 2.5 * world.upload - REGISTRATION - 5


def test_after_the_deadline_periodic_saves_go_on() -> None:
    world = World(seed=3, policy=EverySteps(1), pace=1.0, upload=0.1)
    world.drain(at=20, lead=30)
    world.run(until=70)
    late = [save.step for save in world.saves if save.begun > 58]
    assert len(late) >= 8
    assert late == list(range(late[0], world.step + 1))


def test_a_notice_without_a_deadline_has_that_of_ray() -> None:
    """Ray ends the group 120 s after it has heard of the notice."""
    world = World(seed=1, policy=None, pace=0.5, upload=1.0)
    world.notices.append((30.0, Preemption(deadline=None, nodes=("n",), ranks=(0,))))
    world.run(until=150)
    assert len(world.saves) == 2
    last = world.registered(by=150)[-1]
    assert last.begun >= 150 - 10 - 1.5 * 1.25 * world.upload - REGISTRATION - _reaction(world)


def test_two_drains_in_one_window_are_each_answered() -> None:
    world = World(seed=2, policy=None, pace=0.2, upload=0.5)
    first = world.drain(at=30, lead=100)
    seen = world.notices[0][0]
    both = Preemption(deadline=110.0, nodes=(*first.nodes, "b"), ranks=(0, 1))
    world.notices.append((seen + 20, both))
    world.run(until=110)
    answers = [save.begun for save in world.saves]
    assert len(answers) == 3
    assert seen <= answers[0] <= seen + _reaction(world)
    assert seen + 20 <= answers[1] <= seen + 20 + _reaction(world)
    assert world.registered(by=110)[-1] is world.saves[-1]


@pytest.mark.parametrize("seed", range(20))
def test_beats_are_rare_enough_and_often_enough(seed: int) -> None:
    world = World(seed=seed, policy=None)
    world.run(until=400)
    late = [beat for beat in world.beats if beat >= 200]
    assert longest_gap(world.beats, 200) <= max(MAX_GAP * SLACK, 2 * world.pace)
    # No more than their share, unless the longest gap allowed asks for more.
    rarest = MAX_GAP / SLACK
    gaps = [b - a for a, b in itertools.pairwise(late)]
    mean = sum(gaps) / len(gaps)
    assert world.cost / mean <= SLACK * SHARE or mean >= rarest


@pytest.mark.parametrize("seed", range(20))
def test_every_seconds_keeps_its_time(seed: int) -> None:
    world = World(seed=seed, policy=EverySeconds(20), upload=0.5)
    world.run(until=300)
    gaps = [b.begun - a.begun for a, b in itertools.pairwise(world.saves)]
    assert len(gaps) >= 10
    # By half a step too early, or by what the pace was misjudged too late.
    assert all(20 - world.pace <= gap <= 20 * 1.3 + 2 * world.pace for gap in gaps)


@pytest.mark.parametrize("limit", [0.001, 0.01, 0.1])
def test_max_overhead_keeps_below_its_limit(limit: float) -> None:
    world = World(seed=5, policy=MaxOverhead(limit), pace=0.1, upload=0.2, blocked=0.3)
    world.run(until=30 + 10 * 0.3 / limit)
    spent = world.blocked * (len(world.saves) - 1)
    assert len(world.saves) >= 8
    assert spent / (world.now - world.saves[0].begun) <= limit * 1.05


def test_with_failures_known_saves_are_as_far_apart_as_daly_says() -> None:
    world = World(seed=5, policy=MaxOverhead(0.1, mtbf=3600), pace=0.1, upload=0.2, blocked=0.5)
    world.run(until=600)
    gaps = [b.begun - a.begun for a, b in itertools.pairwise(world.saves)]
    # sqrt(2 * 0.5 * 3600) = 60 s, and a little more, less the save itself.
    assert gaps
    assert all(58 <= gap <= 64 for gap in gaps)


def test_without_anybody_to_ask_there_is_no_beat() -> None:
    heartbeat = Heartbeat(None, EverySteps(3))
    assert [step for step in range(1, 10) if heartbeat.after_step(step)] == [3, 6, 9]
    assert not any(heartbeat.tick() for _ in range(100))


@pytest.mark.parametrize("seed", range(20))
def test_no_save_by_the_clock_either(seed: int) -> None:
    world = World(seed=seed, policy=EverySeconds(3), pace=0.5, upload=1.0)
    world.drain(at=60, lead=60)
    world.run(until=120)
    assert not [save for save in world.saves if 120 - 0.8 * world.upload < save.begun < 120]


def test_a_notice_too_short_for_two_saves_gets_one() -> None:
    world = World(seed=7, policy=EverySeconds(60), pace=0.5, upload=10.0)
    world.drain(at=150, lead=32)
    world.run(until=182)
    assert len([save for save in world.saves if save.begun > 150]) == 1


def test_a_later_notice_opens_the_window_again() -> None:
    world = World(seed=2, policy=None, pace=0.2, upload=0.5)
    world.drain(at=30, lead=50)
    world.notices.append((78.0, Preemption(deadline=140.0, nodes=("b",), ranks=(0,))))
    world.run(until=140)
    begun = [save.begun for save in world.saves]
    assert len(begun) == 4
    assert begun[1] < 80 < begun[2] + _reaction(world)
    assert 140 - begun[3] <= 1.5 * 1.25 * world.upload + REGISTRATION + _reaction(world)


@pytest.mark.parametrize("seed", range(20))
def test_a_cheap_beat_comes_as_often_as_its_share_allows(seed: int) -> None:
    world = World(seed=seed, policy=None, pace=0.01, cost=0.001)
    world.run(until=60)
    assert longest_gap(world.beats, 30) <= SLACK * world.cost / SHARE


def test_a_pace_that_was_too_fast_is_not_believed_for_long() -> None:
    world = World(seed=1, policy=None, pace=0.001)
    world.run(until=world.cost + 0.002)
    assert world.step <= 3
    world.pace = 1.0
    world.run(until=100)
    assert longest_gap([*world.beats, world.now], 0) <= 10


def test_what_saves_take_is_no_part_of_the_pace() -> None:
    world = World(seed=1, policy=EverySteps(10), pace=0.1, upload=0.1, blocked=2.0, cost=0.004)
    world.run(until=300)
    assert len(world.beats) * world.cost <= SLACK * SHARE * world.step * world.pace


def test_steps_are_counted_apart_from_batches_of_an_evaluation() -> None:
    world = World(seed=1, policy=None, pace=1.0)
    world.run(until=60)
    world.pace = 0.01
    world.run(until=120, evaluating=True)
    world.pace = 1.0
    world.run(until=300)
    assert longest_gap([*world.beats, world.now], 20) <= SLACK * MAX_GAP


def test_saves_that_block_do_not_make_beats_rare() -> None:
    world = World(seed=1, policy=EverySteps(1), pace=0.1, upload=0.1, blocked=1.0)
    world.run(until=300)
    assert longest_gap(world.beats, 50) <= SLACK * MAX_GAP


def test_a_failed_exchange_is_tried_again() -> None:
    world = World(seed=1, policy=None, pace=0.1)
    world.run(until=20)
    heartbeat = world.workers[0]
    exchange = heartbeat._exchange
    assert exchange is not None
    with mock.patch.object(type(exchange), "notice", side_effect=TimeoutError):
        failures = 0
        for step in range(200):
            try:
                heartbeat.after_step(step)
            except TimeoutError:
                failures += 1
    assert failures > 1


def test_what_training_took_is_no_part_of_an_evaluation() -> None:
    """Else a save by the clock would come early: the next call would seem to be far away."""
    world = World(seed=1, policy=EverySeconds(350), pace=0.5, upload=0.2)
    while world.now < 3000:
        world.run(until=world.now + 300)
        world.run(until=world.now + 1, evaluating=True)
    gaps = [b.begun - a.begun for a, b in itertools.pairwise(world.saves)]
    assert len(gaps) >= 6
    assert all(349 <= gap <= 360 for gap in gaps)


def test_a_second_notice_without_a_deadline_puts_nothing_off() -> None:
    world = World(seed=1, policy=None, pace=0.5, upload=1.0)
    world.notices.append((30.0, Preemption(deadline=None, nodes=("n",), ranks=(0,))))
    world.notices.append((90.0, Preemption(deadline=None, nodes=("m", "n"), ranks=(0, 1))))
    world.run(until=150)
    assert len(world.saves) == 3
    assert world.saves[-1].begun >= 120


def test_no_last_save_is_begun_that_has_no_chance() -> None:
    world = World(seed=1, policy=None, pace=0.5, upload=20.0)
    world.notices.append((30.0, Preemption(deadline=60.0, nodes=("n",), ranks=(0,))))
    world.run(until=60)
    assert len(world.saves) == 1
