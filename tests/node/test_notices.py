"""Each cloud's dialect over real HTTP, against a service that insists on tokens and headers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
import requests
from hypothesis import assume, given
from hypothesis import strategies as st

from ray_accel_ckpt.errors import MetadataError
from ray_accel_ckpt.runtime.fake_metadata import Cloud, FakeMetadata, Fault
from ray_accel_ckpt.runtime.notices import detect, metadata
from ray_accel_ckpt.runtime.notices.aws import INSTANCE_ACTION, TOKEN, AwsNotices
from ray_accel_ckpt.runtime.notices.azure import AzureNotices
from ray_accel_ckpt.runtime.notices.detect import source_of
from ray_accel_ckpt.runtime.notices.gcp import GcpNotices
from ray_accel_ckpt.runtime.notices.metadata import Metadata
from ray_accel_ckpt.runtime.notices.notice import Kind, NoticeSource

CLOUDS: list[Cloud] = ["aws", "gcp", "azure"]
DEADLINE = 2_000_000_000.0


@pytest.fixture
def aws() -> Iterator[FakeMetadata]:
    with FakeMetadata("aws") as service:
        yield service


@pytest.fixture
def gcp() -> Iterator[FakeMetadata]:
    with FakeMetadata("gcp") as service:
        yield service


@pytest.fixture
def azure() -> Iterator[FakeMetadata]:
    with FakeMetadata("azure", name="worker_7") as service:
        yield service


def source(service: FakeMetadata) -> NoticeSource:
    made = source_of(detect.Cloud(service.cloud), service.url)
    assert made is not None
    return made


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_notice_is_heard_and_so_is_its_end(cloud: Cloud) -> None:
    with FakeMetadata(cloud) as service:
        notices = source(service)
        assert notices.poll() is None
        before = time.time()
        service.preempt(DEADLINE)
        notice = notices.poll()
        assert notice is not None and notice.kind is Kind.TAKEN and notice.deadline is not None
        if cloud == "gcp":
            # Google says that it is so, and not when: 30 s from now.
            assert before + 30 <= notice.deadline <= time.time() + 30
        else:
            assert notice.deadline == DEADLINE
        assert notices.poll() == notice, "looking at a notice changes nothing"
        service.cancel()
        assert notices.poll() is None


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_cloud_is_found_out(cloud: Cloud) -> None:
    with FakeMetadata(cloud) as service:
        notices = source_of(detect.Cloud.AUTO, service.url)
        assert notices is not None
        service.preempt(DEADLINE)
        notice = notices.poll()
        assert notice is not None
        assert notice.reason.lower().startswith(cloud)


def test_where_no_cloud_answers_it_is_said_and_looked_for_again() -> None:
    with FakeMetadata("none") as service:
        notices = source_of(detect.Cloud.AUTO, service.url)
        assert notices is not None
        with pytest.raises(MetadataError, match="no cloud is found"):
            notices.poll()
        service.cloud = "gcp"
        assert notices.poll() is None
        assert service.count("instance/preempted", 200) == 1


def test_nobody_there_is_said() -> None:
    with FakeMetadata("aws") as service:
        url = service.url
    for cloud in (detect.Cloud.AUTO, detect.Cloud.AWS, detect.Cloud.GCP, detect.Cloud.AZURE):
        notices = source_of(cloud, url)
        assert notices is not None
        with pytest.raises(MetadataError, match="does not answer"):
            notices.poll()


# What goes wrong.


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize(
    "fault", [Fault.SLOW, Fault.GARBAGE, Fault.BREAKING, 429, 500, 503], ids=str
)
def test_a_fault_is_an_error_in_bounded_time_and_passes(
    cloud: Cloud, fault: Fault | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "READ_TIMEOUT", 0.3)
    unanswered = fault in (Fault.SLOW, Fault.BREAKING)
    with FakeMetadata(cloud) as service:
        notices = source(service)
        service.break_with(fault)
        with pytest.raises(MetadataError, match="does not answer" if unanswered else None):
            notices.poll()
        service.mend()
        assert notices.poll() is None
        service.preempt(DEADLINE)
        assert notices.poll() is not None
        service.break_with(fault)
        with pytest.raises(MetadataError):
            notices.poll()


def test_a_body_that_comes_byte_by_byte_is_not_waited_for(gcp: FakeMetadata) -> None:
    gcp.break_with(Fault.DRIBBLING)
    with pytest.raises(MetadataError, match="was not whole"):
        source(gcp).poll()


@given(text=st.text(alphabet=st.characters(codec="utf-8")) | st.just("[" * 100_000))
@pytest.mark.parametrize("cloud", CLOUDS)
def test_no_document_is_believed_that_is_none(cloud: Cloud, text: str) -> None:
    assume(text.strip() not in ("TRUE", "FALSE"))  # GCP's documents

    # Everything but the token and the own name is this text.
    class Constant(Metadata):
        def get(self, path: str, headers: object) -> metadata.Reply:
            body = "name" if "compute/name" in path else text
            return metadata.Reply(status=200, text=body, headers={}, path=path)

        def put(self, path: str, headers: object) -> metadata.Reply:
            return metadata.Reply(status=200, text=text, headers={}, path=path)

    made = {"aws": AwsNotices, "gcp": GcpNotices, "azure": AzureNotices}[cloud]
    with pytest.raises(MetadataError):
        made(Constant("http://nowhere")).poll()


@pytest.mark.parametrize(
    "events",
    [
        {"EventType": "Preempt", "Resources": ["worker_7"], "NotBefore": "soon", "EventId": "1"},
        {"EventType": "Preempt", "Resources": None, "NotBefore": "", "EventId": "1"},
        {"EventType": [], "Resources": ["worker_7"], "NotBefore": "", "EventId": "1"},
        {"EventType": "Preempt", "Resources": ["worker_7"], "NotBefore": "", "EventId": {}},
        {"EventType": "Preempt", "Resources": ["worker_7"], "EventId": "1"},
        "Preempt",
    ],
    ids=str,
)
def test_events_with_wrong_fields_are_errors(azure: FakeMetadata, events: object) -> None:
    azure._events["1"] = events  # type: ignore[assignment]
    with pytest.raises(MetadataError, match="no scheduled events"):
        AzureNotices(Metadata(azure.url)).poll()


def test_a_proxy_of_the_environment_is_not_asked(
    aws: FakeMetadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(requests.exceptions.ProxyError):
        requests.put(aws.url + TOKEN, timeout=5)
    assert source(aws).poll() is None


# AWS.


def test_one_token_serves_many_polls(aws: FakeMetadata) -> None:
    notices = source(aws)
    for _ in range(3):
        assert notices.poll() is None
    assert aws.count(TOKEN, 200) == 1
    assert aws.count(INSTANCE_ACTION, 404) == 3
    assert aws.count("", 401) == 0


def test_a_token_is_renewed_before_it_ends(
    aws: FakeMetadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    notices = AwsNotices(Metadata(aws.url), token_seconds=100)
    assert notices.poll() is None
    now = time.monotonic()
    monkeypatch.setattr("ray_accel_ckpt.runtime.notices.aws.time.monotonic", lambda: now + 95)
    assert notices.poll() is None
    assert aws.count(TOKEN, 200) == 2
    assert aws.count("", 401) == 0


def test_a_token_that_is_over_early_is_renewed_within_the_poll(aws: FakeMetadata) -> None:
    notices = source(aws)
    assert notices.poll() is None
    aws.preempt(DEADLINE)
    aws.expire_tokens()
    assert notices.poll() is not None
    assert aws.count(INSTANCE_ACTION, 401) == 1
    assert aws.count(TOKEN, 200) == 2


def test_a_service_that_takes_no_token_is_an_error(aws: FakeMetadata) -> None:
    notices = source(aws)
    aws.break_with(401)
    with pytest.raises(MetadataError, match="401"):
        notices.poll()


@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
def test_each_spot_interruption_is_heard(aws: FakeMetadata, action: str) -> None:
    aws.set_instance_action(action, DEADLINE)
    notice = source(aws).poll()
    assert notice is not None
    assert (notice.kind, notice.deadline) == (Kind.TAKEN, DEADLINE)
    assert action in notice.reason


def test_hibernation_without_a_time_is_now(aws: FakeMetadata) -> None:
    aws.set_instance_action("hibernate", None)
    notices = source(aws)
    before = time.time()
    notice = notices.poll()
    assert notice is not None and notice.deadline is not None
    assert before <= notice.deadline <= time.time()
    assert notices.poll() == notice


def test_a_rebalance_recommendation_is_a_risk_without_deadline(aws: FakeMetadata) -> None:
    notices = source(aws)
    aws.recommend_rebalance()
    notice = notices.poll()
    assert notice is not None
    assert (notice.kind, notice.deadline) == (Kind.AT_RISK, None)
    aws.preempt(DEADLINE)
    notice = notices.poll()
    assert notice is not None and notice.kind is Kind.TAKEN


def test_an_instance_action_of_another_form_is_an_error(aws: FakeMetadata) -> None:
    for text in ("none", "[]", "{}", json.dumps({"action": "stop", "time": "soon"})):
        aws.set_document("spot/instance-action", text)
        with pytest.raises(MetadataError, match="no instance action"):
            source(aws).poll()


# GCP.


def test_maintenance_that_ends_the_machine_takes_it(gcp: FakeMetadata) -> None:
    gcp.set_document("instance/maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
    notices = source(gcp)
    before = time.time()
    notice = notices.poll()
    assert notice is not None and notice.deadline is not None
    assert notice.kind is Kind.TAKEN
    assert before + 60 <= notice.deadline <= time.time() + 60
    gcp.preempt(DEADLINE)
    sooner = notices.poll()
    assert sooner is not None and sooner.deadline is not None
    assert sooner.deadline < notice.deadline, "the earlier of two notices is told"


def test_maintenance_of_an_unknown_kind_is_a_risk(gcp: FakeMetadata) -> None:
    gcp.set_document("instance/maintenance-event", "SHUTDOWN_ON_HOST_MAINTENANCE")
    notice = source(gcp).poll()
    assert notice is not None and notice.kind is Kind.AT_RISK
    assert "SHUTDOWN_ON_HOST_MAINTENANCE" in notice.reason


@pytest.mark.parametrize("answer", ["SHUTDOWN_ON_HOST_MAINTENANCE", 503])
def test_a_preemption_is_heard_whatever_is_wrong_with_the_other_key(
    gcp: FakeMetadata, answer: str | int
) -> None:
    gcp.set_document("instance/maintenance-event", answer)
    gcp.preempt(DEADLINE)
    notice = source(gcp).poll()
    assert notice is not None and notice.reason == "GCP preemption"


def test_a_live_migration_is_a_pause(gcp: FakeMetadata) -> None:
    gcp.set_document("instance/maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
    notice = source(gcp).poll()
    assert notice is not None and notice.kind is Kind.PAUSED


def test_a_second_preemption_has_its_own_time(
    gcp: FakeMetadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    notices = source(gcp)
    gcp.preempt(DEADLINE)
    first = notices.poll()
    gcp.cancel()
    assert notices.poll() is None
    gcp.preempt(DEADLINE)
    later = time.time() + 3600
    monkeypatch.setattr("ray_accel_ckpt.runtime.notices.notice.time.time", lambda: later)
    second = notices.poll()
    assert first is not None and second is not None
    assert second.deadline == later + 30


# Azure.


@pytest.mark.parametrize("event", ["Preempt", "Terminate", "Reboot", "Redeploy"])
def test_events_that_end_what_runs_take_the_machine(azure: FakeMetadata, event: str) -> None:
    azure.schedule(event, DEADLINE)
    notice = source(azure).poll()
    assert notice is not None
    assert (notice.kind, notice.deadline) == (Kind.TAKEN, DEADLINE)


def test_a_freeze_is_a_pause(azure: FakeMetadata) -> None:
    azure.schedule("Freeze", DEADLINE)
    notice = source(azure).poll()
    assert notice is not None and notice.kind is Kind.PAUSED


def test_another_machines_event_is_not_heard(azure: FakeMetadata) -> None:
    azure.schedule("Preempt", DEADLINE, resources=("worker_8", "worker_70"))
    notices = source(azure)
    assert notices.poll() is None
    azure.schedule("Preempt", DEADLINE, resources=("worker_8", "WORKER_7"))
    assert notices.poll() is not None


def test_an_event_that_has_started_is_now(azure: FakeMetadata) -> None:
    azure.schedule("Preempt", None)
    notices = source(azure)
    before = time.time()
    notice = notices.poll()
    assert notice is not None and notice.deadline is not None
    assert before <= notice.deadline <= time.time()
    assert notices.poll() == notice


def test_of_several_events_the_earliest_is_told(azure: FakeMetadata) -> None:
    azure.schedule("Freeze", DEADLINE - 100, event_id="freeze")
    azure.schedule("Reboot", DEADLINE, event_id="reboot")
    azure.schedule("Preempt", DEADLINE - 50, event_id="preempt")
    notice = source(azure).poll()
    assert notice is not None
    assert (notice.kind, notice.deadline) == (Kind.TAKEN, DEADLINE - 50)


def test_garbage_is_not_taken_for_the_own_name(azure: FakeMetadata) -> None:
    notices = source(azure)
    azure.break_with(Fault.GARBAGE)
    with pytest.raises(MetadataError, match="no name of a machine"):
        notices.poll()
    azure.mend()
    azure.preempt(DEADLINE)
    assert notices.poll() is not None


def test_events_are_not_acknowledged(azure: FakeMetadata) -> None:
    azure.schedule("Preempt", DEADLINE)
    source(azure).poll()
    assert {each.method for each in azure.requests} == {"GET"}
