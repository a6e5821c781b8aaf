"""The code of docs/notices.md runs, and what it does is heard as it says."""

from __future__ import annotations

import dataclasses
import json

import pytest

from ray_accel_ckpt.runtime.fake_metadata import FakeMetadata
from ray_accel_ckpt.runtime.node_watch import WatchEvent
from ray_accel_ckpt.runtime.notices.detect import Cloud, source_of
from ray_accel_ckpt.runtime.notices.notice import Kind, Notice
from tests.pages import snippets


def test_the_code_of_the_page_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: list[Notice | None] = []
    preempt = FakeMetadata.preempt

    def preempted(cloud: FakeMetadata, deadline: float) -> None:
        preempt(cloud, deadline)
        source = source_of(Cloud.AWS, cloud.url)
        assert source is not None
        heard.append(source.poll())

    monkeypatch.setattr(FakeMetadata, "preempt", preempted)
    (code,) = snippets("docs/notices.md", "python")
    exec(code, {})  # noqa: S102
    assert [each and each.kind for each in heard] == [Kind.TAKEN]
    command = "ray-accel-ckpt watch-node --cloud aws --metadata-url http://"
    assert capsys.readouterr().out.startswith(command)


def test_the_lines_of_the_page_are_events() -> None:
    (lines,) = snippets("docs/notices.md", "json")
    keys = [field.name for field in dataclasses.fields(WatchEvent)]
    assert [list(json.loads(line)) for line in lines.splitlines()] == [keys, keys]
