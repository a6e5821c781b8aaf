"""What Ray is asked, and when: a watch against a real HTTP service and a node that remembers."""

from __future__ import annotations

import time

import pytest

from ray_accel_ckpt.errors import ConfigurationError, DrainError
from ray_accel_ckpt.runtime.fake_metadata import FakeMetadata, Fault
from ray_accel_ckpt.runtime.node_watch import NodeWatch, WatchSettings
from ray_accel_ckpt.runtime.notices import detect, metadata
from ray_accel_ckpt.runtime.notices.detect import source_of
from ray_accel_ckpt.runtime.notices.notice import Kind, NoticeSource
from ray_accel_ckpt.runtime.ray_node import RayNode
from tests.node.helpers import RecordingNode, until, watching

QUICK = WatchSettings(poll=0.1, margin=7.0, grace=30.0)
DEADLINE = 2_000_000_000.0


@pytest.fixture(autouse=True)
def _asked_soon_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_accel_ckpt.runtime.node_watch.RETRY_SECONDS", 0.05)


def source(service: FakeMetadata) -> NoticeSource:
    made = source_of(detect.Cloud(service.cloud), service.url)
    assert made is not None
    return made


def polls(service: FakeMetadata) -> int:
    return len(service.requests)


def several_more_polls(service: FakeMetadata) -> None:
    before = polls(service)
    until(lambda: polls(service) >= before + 4)


def test_a_notice_drains_once_with_its_deadline_less_the_margin() -> None:
    node = RecordingNode()
    with FakeMetadata("aws") as service, watching(source(service), node, QUICK):
        several_more_polls(service)
        assert node.drains == []
        service.preempt(DEADLINE)
        until(lambda: node.drains)
        several_more_polls(service)
        assert node.drains == [("AWS spot interruption: terminate", DEADLINE - 7)]


def test_no_deadline_lies_in_the_past() -> None:
    node = RecordingNode()
    before = time.time()
    with FakeMetadata("azure") as service, watching(source(service), node, QUICK):
        service.schedule("Preempt", None)
        until(lambda: node.drains)
    [(_, deadline)] = node.drains
    assert deadline is not None and before <= deadline <= time.time()


def test_an_earlier_deadline_drains_again_and_a_later_one_does_not() -> None:
    node = RecordingNode()
    with FakeMetadata("azure") as service, watching(source(service), node, QUICK):
        service.schedule("Reboot", DEADLINE)
        until(lambda: len(node.drains) == 1)
        service.schedule("Reboot", DEADLINE + 100)
        several_more_polls(service)
        service.schedule("Preempt", DEADLINE - 600, event_id="event-2")
        until(lambda: len(node.drains) == 2)
        several_more_polls(service)
    assert [deadline for _, deadline in node.drains] == [DEADLINE - 7, DEADLINE - 607]


def test_a_cancelled_notice_is_told_and_another_one_drains_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    node = RecordingNode()
    with FakeMetadata("aws") as service, watching(source(service), node, QUICK):
        service.preempt(DEADLINE)
        until(lambda: len(node.drains) == 1)
        service.cancel()
        until(lambda: "the notice is gone" in caplog.text)
        service.preempt(DEADLINE + 50)
        until(lambda: len(node.drains) == 2)
    assert node.drains[1][1] == DEADLINE + 43


def test_ray_is_asked_until_it_answers(caplog: pytest.LogCaptureFixture) -> None:
    node = RecordingNode(unreachable=True)
    with FakeMetadata("aws") as service, watching(source(service), node, QUICK):
        service.preempt(DEADLINE)
        until(lambda: node.tries >= 5)
        assert caplog.text.count("not drained yet") == 1, "one cause is told once"
        node.unreachable = False
        until(lambda: node.drains)
        tries = node.tries
        several_more_polls(service)
        assert node.tries == tries
    assert len(node.drains) == 1


def test_a_notice_that_is_gone_before_ray_is_reached_drains_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    node = RecordingNode(unreachable=True)
    with FakeMetadata("aws") as service, watching(source(service), node, QUICK):
        service.preempt(DEADLINE)
        until(lambda: node.tries)
        service.cancel()
        until(lambda: "nothing is drained" in caplog.text)
        node.unreachable = False
        several_more_polls(service)
        assert node.drains == []


@pytest.mark.parametrize("drains", [False, True])
def test_a_rebalance_recommendation_drains_if_that_is_asked_for(
    drains: bool, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = frozenset({Kind.TAKEN, Kind.AT_RISK} if drains else {Kind.TAKEN})
    settings = WatchSettings(poll=0.1, margin=7.0, grace=30.0, drains=kinds)
    node = RecordingNode()
    with FakeMetadata("aws") as service, watching(source(service), node, settings):
        service.recommend_rebalance()
        until(lambda: "recommends to rebalance" in caplog.text)
        several_more_polls(service)
        recommended = [("AWS recommends to rebalance", None)] if drains else []
        assert node.drains == recommended
        service.preempt(DEADLINE)
        until(lambda: len(node.drains) > len(recommended))
    assert node.drains[-1][1] == DEADLINE - 7


@pytest.mark.parametrize("fault", [500, 404, Fault.SLOW, Fault.GARBAGE], ids=str)
def test_a_fault_is_told_once_and_the_notice_after_it_is_heard(
    fault: Fault | int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(metadata, "READ_TIMEOUT", 0.2)
    monkeypatch.setattr("ray_accel_ckpt.runtime.notices.poller.LONGEST_PAUSE", 0.2)
    node = RecordingNode()
    with FakeMetadata("azure") as service, watching(source(service), node, QUICK):
        for _ in range(2):
            service.break_with(fault)
            several_more_polls(service)
            service.mend()
            several_more_polls(service)
        assert caplog.text.count("no notices at the moment") == 2
        assert caplog.text.count("answers again") == 2
        assert node.drains == []
        service.preempt(DEADLINE)
        until(lambda: node.drains)


def test_a_fault_takes_no_notice_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_accel_ckpt.runtime.notices.poller.LONGEST_PAUSE", 0.2)
    node = RecordingNode()
    with FakeMetadata("aws") as service, watching(source(service), node, QUICK):
        service.preempt(DEADLINE)
        until(lambda: node.drains)
        service.break_with(500)
        several_more_polls(service)
        service.mend()
        several_more_polls(service)
    assert len(node.drains) == 1


# SIGTERM.


def test_sigterm_drains_with_the_grace_and_ends_when_the_node_is_gone() -> None:
    node = RecordingNode()
    before = time.time()
    with watching(None, node, QUICK) as watch:
        watch.terminate()
        until(lambda: node.drains)
    [(reason, deadline)] = node.drains
    assert reason == "SIGTERM"
    assert deadline is not None and before + 30 <= deadline <= time.time() + 30


def test_sigterm_after_an_earlier_deadline_asks_nothing_more() -> None:
    node = RecordingNode()
    with FakeMetadata("aws") as service, watching(source(service), node, QUICK) as watch:
        service.preempt(time.time() + 10)
        until(lambda: node.drains)
        watch.terminate()
    assert len(node.drains) == 1


def test_ray_that_is_never_reached_is_an_error_when_the_time_is_over() -> None:
    node = RecordingNode(unreachable=True)
    watch = NodeWatch(source=None, node=node, settings=WatchSettings(grace=0.2))
    watch.terminate()
    with pytest.raises(DrainError, match="Ray has not been told"):
        watch.run()


def test_a_node_that_was_never_found_is_not_taken_for_gone() -> None:
    watch = NodeWatch(source=None, node=RecordingNode(gone=True), settings=WatchSettings(grace=0.2))
    watch.terminate()
    with pytest.raises(DrainError, match="Ray has not been told"):
        watch.run()


# Wrong arguments.


@pytest.mark.parametrize(
    "wrong",
    [{"poll": 0.0}, {"margin": -1.0}, {"grace": float("inf")}, {"grace": float("nan")}],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        WatchSettings(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"address": "head"},
        {"address": "ray://head:10001"},
        {"address": ""},
        {"node_id": "abc"},
        {"node_id": "g" * 56},
        {"timeout": 0.0},
    ],
    ids=str,
)
def test_nodes_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        RayNode(**wrong)  # type: ignore[arg-type]


def test_a_ray_that_is_not_there_is_an_error_in_bounded_time() -> None:
    with pytest.raises(DrainError, match="no answer within 3 s"):
        RayNode(address="127.0.0.1:1", timeout=3.0).find()
