"""The command, as a real process with real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ray_accel_ckpt.cli import app
from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.runtime.fake_metadata import FakeMetadata
from tests.node.helpers import PATIENCE, until

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


class Daemon:
    """`watch-node` with a node that writes what is asked of it to a file."""

    def __init__(self, place: Path, *options: str, stdout: int | None = None) -> None:
        self._record = place / "record"
        self._log = place / "log"
        self._out = place / "out"
        script = str(ROOT / "tests" / "node" / "recorded.py")
        command = [sys.executable, script, str(self._record), "watch-node", *options]
        with self._log.open("w") as log, self._out.open("w") as out:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stderr=log, stdout=out if stdout is None else stdout
            )
        until(lambda: "watching over" in self.log or self._process.poll() is not None, self.log)

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def events(self) -> list[dict[str, Any]]:
        """What is printed on stdout."""
        return [json.loads(line) for line in self._out.read_text().splitlines()]

    @property
    def drains(self) -> list[dict[str, Any]]:
        if not self._record.exists():
            return []
        return [json.loads(line) for line in self._record.read_text().splitlines()]

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def make(self, suffix: str) -> None:
        self._record.with_suffix(suffix).touch()

    def exit_status(self) -> int:
        return self._process.wait(PATIENCE)


def test_a_notice_then_sigterm(tmp_path: Path) -> None:
    with (
        FakeMetadata("gcp") as service,
        Daemon(tmp_path, "--metadata-url", service.url, "--poll", "0.1") as daemon,
    ):
        until(lambda: service.count("preempted", 200) > 2)
        noticed = time.time()
        service.preempt(0.0)
        until(lambda: daemon.drains)
        [drain] = daemon.drains
        assert drain["reason"] == "GCP preemption"
        assert noticed + 25 <= drain["deadline"] <= time.time() + 25
        daemon.make(".gone")
        daemon.send(signal.SIGTERM)
        assert daemon.exit_status() == 0
        assert len(daemon.drains) == 1, "SIGTERM leaves more time than the notice"
        assert "this machine runs in GCP" in daemon.log
        assert all(line.startswith("20") for line in daemon.log.splitlines()), "one line an event"


def test_each_notice_and_each_drain_is_a_line_of_json(tmp_path: Path) -> None:
    with (
        FakeMetadata("aws") as service,
        Daemon(tmp_path, "--json", "--metadata-url", service.url, "--poll", "0.1") as daemon,
    ):
        assert daemon.events == []
        began = time.time()
        service.recommend_rebalance()
        until(lambda: len(daemon.events) == 1)
        service.cancel()
        until(lambda: len(daemon.events) == 2)
        service.preempt(2e9)
        until(lambda: len(daemon.events) == 4)
        daemon.make(".gone")
        daemon.send(signal.SIGTERM)
        assert daemon.exit_status() == 0
        events = daemon.events
    times = [event.pop("at") for event in events]
    seen = [began, *times, time.time()]
    assert seen == sorted(seen)
    risk, gone, notice, drain, sigterm, last = events
    without = {"kind": None, "reason": None, "deadline": None, "node": None}
    reason = "AWS spot interruption: terminate"
    assert (risk["event"], risk["kind"], risk["deadline"]) == ("notice", "at_risk", None)
    assert "rebalance" in risk["reason"]
    assert gone == {**without, "event": "gone"}
    told = {"reason": reason, "deadline": 2e9}
    assert notice == {**without, **told, "event": "notice", "kind": "taken"}
    told = {"reason": reason, "deadline": 2e9 - 5, "node": "node"}
    assert drain == {**without, **told, "event": "drain"}
    assert (sigterm["event"], sigterm["kind"], sigterm["reason"]) == ("notice", "taken", "SIGTERM")
    assert (last["event"], last["reason"]) == ("drain", "SIGTERM")
    assert last["deadline"] == sigterm["deadline"]


def test_without_json_nothing_is_printed(tmp_path: Path) -> None:
    with Daemon(tmp_path, "--cloud", "none", "--grace", "1") as daemon:
        daemon.send(signal.SIGTERM)
        assert daemon.exit_status() == 0
        assert len(daemon.drains) == 1
        assert daemon.events == []


def test_a_node_is_drained_also_if_nobody_reads_the_events(tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    with Daemon(tmp_path, "--json", "--cloud", "none", "--grace", "1", stdout=theirs) as daemon:
        os.close(theirs)
        daemon.send(signal.SIGTERM)
        assert daemon.exit_status() == 0
        assert len(daemon.drains) == 1
        assert "an event is not printed" in daemon.log


@pytest.mark.parametrize("cloud", ["none", "auto"])
def test_without_a_cloud_sigterm_drains(tmp_path: Path, cloud: str) -> None:
    with FakeMetadata("none") as service:
        nobody = service.url
    options = ["--cloud", cloud, "--grace", "40"]
    with Daemon(tmp_path, *options, "--metadata-url", nobody) as daemon:
        until(lambda: ("is polled" if cloud == "none" else "does not answer") in daemon.log)
        before = time.time()
        daemon.send(signal.SIGTERM)
        until(lambda: daemon.drains)
        [drain] = daemon.drains
        assert drain["reason"] == "SIGTERM"
        assert before + 40 <= drain["deadline"] <= time.time() + 40
        daemon.make(".gone")
        assert daemon.exit_status() == 0


def test_sigterm_waits_until_the_grace_is_over(tmp_path: Path) -> None:
    with Daemon(tmp_path, "--cloud", "none", "--grace", "1") as daemon:
        before = time.monotonic()
        daemon.send(signal.SIGTERM)
        assert daemon.exit_status() == 0
        assert time.monotonic() - before >= 1
        assert len(daemon.drains) == 1


def test_sigterm_that_reaches_no_ray_is_a_failure_told_without_traceback(tmp_path: Path) -> None:
    with Daemon(tmp_path, "--cloud", "none", "--grace", "1") as daemon:
        daemon.make(".down")
        daemon.send(signal.SIGTERM)
        assert daemon.exit_status() == 1
        assert "Ray has not been told" in daemon.log
        assert "Traceback" not in daemon.log


def test_ctrl_c_ends_it_and_drains_nothing(tmp_path: Path) -> None:
    with Daemon(tmp_path, "--cloud", "none") as daemon:
        daemon.send(signal.SIGINT)
        assert daemon.exit_status() != 0
        assert daemon.drains == []
        assert "Traceback" not in daemon.log


@pytest.mark.parametrize(
    "wrong",
    [
        ["--poll", "0"],
        ["--node-id", "abc"],
        ["--address", "ray://head:10001"],
        ["--metadata-url", "metadata"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_is_refused_at_once(wrong: list[str]) -> None:
    done = run("watch-node", *wrong)
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: ")
    assert "what to do: " in done.stderr


def test_debug_shows_where_an_error_arose() -> None:
    done = run("--debug", "watch-node", "--poll", "0")
    assert isinstance(done.exception, ConfigurationError)


def test_a_command_needs_its_name() -> None:
    assert run("--poll", "1").exit_code == 2
    assert "watch-node" in run("--help").stdout
    assert "--on-rebalance" in run("watch-node", "--help").stdout
    assert "is not one of" in run("watch-node", "--cloud", "ibm").stderr


def test_it_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "ray_accel_ckpt.cli", "watch-node", "--poll", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: poll cannot be 0.0 seconds\n")
