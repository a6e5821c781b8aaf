"""The examples, as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _run(example: str, storage: Path) -> str:
    command = [sys.executable, str(ROOT / "examples" / example), "--storage", str(storage)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.parametrize(
    ("example", "line"),
    [
        ("resume_digits.py", "identical bits: yes"),
        ("elastic_gpt.py", "the same order: yes"),
        ("tune_pbt.py", "weights as they were saved, each time: yes"),
    ],
)
def test_an_example_shows_what_it_promises(tmp_path: Path, example: str, line: str) -> None:
    assert line in _run(example, tmp_path).splitlines()
