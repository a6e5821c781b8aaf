"""The walk without Ray, of docs/getting-started.md, taken as it is shown."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "getting-started.md").read_text().partition("## Without Ray")[2]
PROGRAMS = {"python": [], "ray-accel-ckpt": ["-m", "ray_accel_ckpt.cli"]}
KILLED = -9


def _block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return str(found)


def _run(directory: Path, command: str) -> str:
    """What a command prints, and the shell if it was killed."""
    program, *arguments = command.split()
    words = [sys.executable, "-W", "ignore", *PROGRAMS[program], *arguments]
    done = subprocess.run(words, cwd=directory, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, KILLED), done.stderr
    return done.stdout + ("Killed\n" if done.returncode == KILLED else "")


def _form(text: str) -> list[list[str]]:
    """What does not depend on the machine: words, and that there is a number.

    What the kill came into does: a save, whose directory is then listed too, and why it is none;
    and with the save before it an epoch that is made again, so lines of one form count once.
    """
    cut_off = re.compile(r".* not whole |checkpoint_\d+: ")
    lines = [line for line in text.splitlines() if line and not cut_off.match(line)]
    forms = (re.sub(r"\S*/runs|\d[\d.]*( s\b| min\b)?", "N", line).split() for line in lines)
    return [form for form, _ in groupby(forms)]


def test_a_script_that_is_killed_goes_on_as_the_page_shows(tmp_path: Path) -> None:
    code = _block("python")
    (tmp_path / "train.py").write_text(code)
    shown = re.findall(r"^\$ (.*)\n([^$]*)", _block("console"), re.MULTILINE)
    printed = [(command, _run(tmp_path, command)) for command, _ in shown]
    assert [(c, _form(text)) for c, text in printed] == [(c, _form(text)) for c, text in shown]

    (died, before), (resumed, after), (_, listed) = printed
    assert (died, resumed) == ("python train.py --die", "python train.py")
    assert re.match(r"resumed at step [567]0\n", after)
    assert listed.count(" good ") == 3
    # The epochs of both lives are those of a run that was never killed.
    (tmp_path / "whole.py").write_text(code.replace("runs/script", "runs/whole"))
    told = [line for line in (before + after).splitlines() if line.startswith("epoch ")]
    assert list(dict.fromkeys(told)) == _run(tmp_path, "python whole.py").splitlines()
