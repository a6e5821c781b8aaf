"""submit.sh, with a `ray` that is a stub: what it asks of Ray, and when it asks again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.files import CLUSTER, executable

SUBMIT = CLUSTER / "submit.sh"
STUB = Path(__file__).with_name("stub_ray.py")
ARGUMENTS = ["--name", "digits", "--storage", "s3://b/runs", "--pause", "0"]
SCRIPT = ["--", "train.py", "--epochs", "3 or more"]


class Cluster:
    """A folder with a `ray` in it."""

    def __init__(self, folder: Path, *plan: str) -> None:
        self.folder = folder
        self.environment = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "STUB": str(folder),
        }
        ray = folder / "ray"
        ray.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {STUB} "$@"\n')
        ray.chmod(0o755)
        (folder / "plan").write_text(" ".join(plan))

    def job(self, job: str, state: str, *, ends: str | None = None) -> None:
        (self.folder / f"job-{job}").write_text(state)
        if ends:
            (self.folder / f"job-{job}.ends").write_text(ends)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(SUBMIT), *arguments],
            env=self.environment | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        started = self.start(*arguments, **environment)
        out, err = started.communicate(timeout=120)
        return started.returncode, out + err

    def calls(self, command: str) -> list[list[str]]:
        lines = (self.folder / "calls").read_text().splitlines()
        return [call[2:] for call in map(json.loads, lines) if call[1] == command]

    def submitted(self) -> list[str]:
        return [call[call.index("--submission-id") + 1] for call in self.calls("submit")]


def test_a_job_that_fails_is_submitted_again_with_the_same_name_and_storage(
    tmp_path: Path,
) -> None:
    cluster = Cluster(tmp_path, "failed", "failed", "succeeded")
    status, said = cluster.run(*ARGUMENTS, "--address", "http://head:8265", *SCRIPT)
    assert status == 0, said
    assert cluster.calls("submit") == [
        [
            *("--address", "http://head:8265", "--submission-id", f"digits-{number}"),
            *("--", "python", "train.py", "--epochs", "3 or more"),
            *("--storage", "s3://b/runs", "--name", "digits"),
        ]
        for number in (1, 2, 3)
    ]


def test_it_gives_up_at_the_last_failure(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, "failed", "failed", "succeeded")
    status, said = cluster.run(*ARGUMENTS, "--failures", "2", *SCRIPT)
    assert status == 1
    assert "digits-2 failed (failure 2 of 2)" in said
    assert cluster.submitted() == ["digits-1", "digits-2"]


def test_the_working_directory_is_sent_and_the_environment_gives_the_address(
    tmp_path: Path,
) -> None:
    cluster = Cluster(tmp_path, "succeeded")
    status, _ = cluster.run(
        *ARGUMENTS, "--working-dir", "my code", *SCRIPT, RAY_API_SERVER_ADDRESS="http://other:1"
    )
    assert status == 0
    (call,) = cluster.calls("submit")
    assert call[call.index("--working-dir") + 1] == "my code"
    assert call[call.index("--address") + 1] == "http://other:1"


def test_jobs_that_were_over_before_are_history(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, "succeeded")
    for number, state in enumerate(("failed", "stopped", "succeeded"), 1):
        cluster.job(f"digits-{number}", state)
    status, _ = cluster.run(*ARGUMENTS, "--failures", "1", *SCRIPT)
    assert status == 0
    assert cluster.submitted() == ["digits-4"]


def test_a_job_that_is_going_is_followed_and_no_second_one_started(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    cluster.job("digits-1", "failed")
    cluster.job("digits-2", "RUNNING", ends="succeeded")
    status, said = cluster.run(*ARGUMENTS, *SCRIPT)
    assert status == 0, said
    assert [call[-2:] for call in cluster.calls("logs")] == [["--follow", "digits-2"]]
    assert cluster.submitted() == []


def test_a_job_that_somebody_stops_is_not_started_again(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, "stopped", "succeeded")
    status, said = cluster.run(*ARGUMENTS, *SCRIPT)
    assert status == 1
    assert "digits-1 was stopped" in said
    assert cluster.submitted() == ["digits-1"]


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "term"]
)
def test_a_signal_stops_the_job_and_ends_the_script(
    tmp_path: Path, sent: signal.Signals, status: int
) -> None:
    cluster = Cluster(tmp_path, "goes-on", "succeeded")
    started = cluster.start(*ARGUMENTS, *SCRIPT)
    assert started.stdout is not None
    assert started.stdout.readline() == "the job is going\n"
    # The terminal sends Ctrl-C to all of its foreground processes.
    if sent is signal.SIGINT:
        os.killpg(started.pid, sent)
    else:
        started.send_signal(sent)
    try:
        _, said = started.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == status, said
    assert [call[-1] for call in cluster.calls("stop")] == ["digits-1"]
    assert cluster.submitted() == ["digits-1"]


def test_a_job_server_that_does_not_answer_is_asked_so_many_times(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, "succeeded")
    (tmp_path / "away").touch()
    status, said = cluster.run(*ARGUMENTS, "--failures", "3", *SCRIPT)
    assert status == 1
    assert "does not answer (failure 3 of 3)" in said
    assert len(cluster.calls("status")) == 3
    assert cluster.calls("submit") == []


def test_a_submission_that_is_refused_counts_as_failure(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, "refused", "refused")
    status, said = cluster.run(*ARGUMENTS, "--failures", "2", *SCRIPT)
    assert status == 1
    assert "digits-1 was not accepted (failure 2 of 2)" in said


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--storage", "s", *SCRIPT], "--name must be"),
        (["--name", "a b", "--storage", "s", *SCRIPT], "--name must be"),
        (["--name", "a", *SCRIPT], "--storage is missing"),
        (["--name", "a", "--storage", "s"], "no script"),
        (["--name", "a", "--storage", "s", "train.py"], "what is 'train.py'?"),
        (["--name"], "--name needs a value"),
        ([*ARGUMENTS, "--failures", "0", *SCRIPT], "--failures must be"),
        ([*ARGUMENTS, "--pause", "soon", *SCRIPT], "--pause must be"),
    ],
)
def test_wrong_arguments_are_refused_before_ray_is_asked(
    tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    cluster = Cluster(tmp_path)
    status, said = cluster.run(*arguments)
    assert status == 2
    assert complaint in said
    assert not (tmp_path / "calls").exists()


def test_help_tells_of_every_option(tmp_path: Path) -> None:
    status, said = Cluster(tmp_path).run("--help")
    assert status == 0
    options = ("name", "storage", "address", "working-dir", "failures", "pause", "help")
    for option in options:
        assert f"  --{option} " in said


def test_shellcheck_finds_nothing() -> None:
    shellcheck = executable("shellcheck")
    if shellcheck is None:
        pytest.skip("no shellcheck here")
    checked = subprocess.run(
        [shellcheck, "--enable=quote-safe-variables,check-unassigned-uppercase", str(SUBMIT)],
        text=True,
        capture_output=True,
    )
    assert checked.returncode == 0, checked.stdout
    assert shutil.which(str(SUBMIT)) is not None, "executable"
