"""What all commands share: start-up, errors, completion; as real processes where that decides."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ray_accel_ckpt.cli import output
from ray_accel_ckpt.cli.export import To
from ray_accel_ckpt.errors import NotACheckpointError
from ray_accel_ckpt.runtime import listing
from ray_accel_ckpt.storage import survey
from tests.cli import runs
from tests.cli.commands import refused, run, told

ROOT = Path(__file__).parents[2]
COMMANDS = ["ls", "show", "verify", "diff", "export", "heal", "sweep", "report", "watch-node"]


def process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ray_accel_ckpt.cli", *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# --- start-up ------------------------------------------------------------------------------

_IMPORTED = r"""
import sys
from ray_accel_ckpt.cli import app
try:
    app(sys.argv[1:], prog_name="ray-accel-ckpt")
finally:
    print([name for name in ("torch", "ray", "pyarrow", "numpy") if name in sys.modules])
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["diff", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _IMPORTED, *arguments], capture_output=True, text=True, check=True
    )
    assert ran.stdout.endswith("[]\n")


def test_looking_into_checkpoints_does_not_import_ray(digits: Path) -> None:
    for command in ("ls", "verify"):
        ran = subprocess.run(
            [sys.executable, "-c", _IMPORTED, command, str(digits)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.stdout.endswith("['torch', 'pyarrow', 'numpy']\n"), ran


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_says_what_it_is_for(command: str) -> None:
    assert command in told("--help")
    screen = told(command, "--help")
    assert screen.startswith(f"Usage: ray-accel-ckpt {command} ") or "Usage: " in screen
    assert "--json" in screen


def test_as_a_process(digits: Path) -> None:
    done = process("verify", digits / "checkpoint_00000040_5d8e3f", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["good"]
    runs.damage(digits / "checkpoint_00000040_5d8e3f" / "shard-00000-of-00002.safetensors")
    done = process("verify", digits)
    assert done.returncode == 1
    assert "\x1b" not in done.stdout + done.stderr
    assert "shard-00000-of-00002.safetensors" in done.stdout


def test_in_ascii_too(digits: Path) -> None:
    done = process(
        "show", digits / "checkpoint_00000040_5d8e3f", PYTHONIOENCODING="ascii", LC_ALL="C"
    )
    assert done.returncode == 0, done.stderr
    assert "0.weight" in done.stdout


# --- completion ----------------------------------------------------------------------------


def test_completion() -> None:
    asked = {"_RAY_ACCEL_CKPT_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    program = "from ray_accel_ckpt.cli import app; app(prog_name='ray-accel-ckpt')"

    def completed(words: str, at: int) -> list[str]:
        environment = {**os.environ, **asked, "COMP_WORDS": words, "COMP_CWORD": str(at)}
        ran = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return ran.stdout.split()

    assert completed("ray-accel-ckpt ", 1) == COMMANDS
    assert completed("ray-accel-ckpt s", 1) == ["show", "sweep"]
    assert "--dry-run" in completed("ray-accel-ckpt sweep --", 2)
    assert completed("ray-accel-ckpt export a b --to ", 5) == list(To)


def test_completion_can_be_installed() -> None:
    assert "--install-completion" in told("--help")


# --- errors --------------------------------------------------------------------------------


def test_an_error_is_a_text_and_with_debug_a_traceback(tmp_path: Path) -> None:
    done = process("ls", tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.match(
        r"Error: .*\n  where: .*\n  why: .*\n  what to do: .*\n  more: .*\n$", done.stderr
    )
    assert isinstance(run("--debug", "ls", tmp_path).exception, NotACheckpointError)
    done = process("--debug", "ls", tmp_path)
    assert "Traceback" in done.stderr


def _raising(error: BaseException) -> Any:
    def raises(*arguments: object) -> None:
        raise error

    return raises


@pytest.mark.parametrize(("command", "status"), [("ls", 1), ("verify", 2)])
def test_an_error_that_nobody_expected(
    monkeypatch: pytest.MonkeyPatch, command: str, status: int
) -> None:
    error = PermissionError(errno.EACCES, "Permission denied", "/secret")
    monkeypatch.setattr(listing, "list_run", _raising(error))
    monkeypatch.setattr(survey, "checkpoints_at", _raising(error))
    done = run(command, "anything")
    assert done.exit_code == status
    assert done.stderr.splitlines()[:3] == [
        "Error: Permission denied",
        "  where: /secret",
        "  why: PermissionError",
    ]
    assert "what to do: " in done.stderr
    assert run("--debug", command, "anything").exception is error


_WAITING = r"""
import signal
from ray_accel_ckpt.storage import survey

def checkpoints_at(*arguments):
    print("ready", flush=True)
    signal.pause()

survey.checkpoints_at = checkpoints_at
from ray_accel_ckpt.cli import app
app(["verify", "anything"])
"""


def test_ctrl_c_is_no_traceback() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "ready\n"
        waiting.send_signal(signal.SIGINT)
        _, told = waiting.communicate()
    assert (waiting.returncode, told) == (130, "Interrupted.\n")


def test_a_reader_that_goes_away_is_no_error(digits: Path) -> None:
    command = f"{sys.executable} -m ray_accel_ckpt.cli ls {digits} | true"
    done = subprocess.run(
        ["/bin/bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""


def test_where_no_stdout_is_the_exit_status_is_the_answer(checkpoint: Path) -> None:
    command = f"{sys.executable} -m ray_accel_ckpt.cli verify {checkpoint} >&-"
    done = subprocess.run(
        ["/bin/bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("command", "status"), [("ls", 1), ("show", 1), ("verify", 2)])
def test_a_file_is_told_to_be_one(checkpoint: Path, command: str, status: int) -> None:
    for file in (next(checkpoint.glob("shard-*")), checkpoint / "empty"):
        file.touch()
        assert "why: it is a file" in refused(command, file, status=status)


# --- what is printed -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0 s"),
        (0, "0 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7199, "119 min"),
        (7200, "2 h"),
        (172_799, "47 h"),
        (172_800, "2 d"),
    ],
)
def test_ages(monkeypatch: pytest.MonkeyPatch, seconds: float, text: str) -> None:
    monkeypatch.setattr(output, "now", lambda: 1000.0 + seconds)
    assert output.age(1000.0) == text


def test_sizes() -> None:
    assert [output.size(n) for n in (0, 1, 999, 1234, 5 * 10**9)] == [
        *("0 B", "1 B", "999 B", "1.2 kB", "5.0 GB")
    ]


def test_documents_hold_no_number_that_json_has_not() -> None:
    assert output._plain({"a": [float("inf"), 1.5, (float("nan"),)]}) == {
        "a": ["inf", 1.5, ["nan"]]
    }
