"""The examples, as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _run(example: str, storage: Path, *more: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / example), "--storage", str(storage), *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.parametrize(
    ("example", "line"),
    [
        ("resume_digits.py", "identical bits: yes"),
        ("accelerate_loop.py", "identical bits: yes"),
        ("elastic_gpt.py", "the same order: yes"),
        ("transformers_trainer.py", "identical bits: yes"),
        ("lightning_module.py", "identical bits: yes"),
        ("tune_pbt.py", "weights as they were saved, each time: yes"),
    ],
)
def test_an_example_shows_what_it_promises(tmp_path: Path, example: str, line: str) -> None:
    assert line in _run(example, tmp_path).splitlines()


def test_the_job_goes_on_with_the_run_of_its_name(tmp_path: Path) -> None:
    one, two = (
        _run("digits_job.py", tmp_path, "--name", "digits", "--epochs", str(epochs))
        for epochs in (1, 2)
    )
    # 1797 samples by 32. The second run begins where the first has ended.
    assert "run digits is done: step 57, saved by 2 workers" in one
    assert "run digits is done: step 114, saved by 2 workers" in two
