"""What saving and loading take of a process's memory at most, as the kernel counts it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARE = 64 * 2**20
"""Bytes of the model: large beside what else comes and goes."""
ROOM = SHARE // 2

_SCRIPT = r"""
import re, sys
from pathlib import Path
import torch
from torch import nn
from ray_accel_ckpt import Checkpointer, EverySteps, ProjectConfiguration

def peak():
    # Not ru_maxrss: that begins with what the process had that started this one.
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

what, slots, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
model = nn.Linear(4096, 4096, bias=False)
project = ProjectConfiguration(directory, automatic_checkpoint_naming=True)
ckpt = Checkpointer(
    slots=slots, overlap=what == "overlap", save=EverySteps(1), project_config=project
)
make = torch.optim.Adam if what.endswith("moments") else torch.optim.SGD
model, optimizer = ckpt.prepare(model, make(model.parameters(), lr=0.1))
if what == "save moments":
    model(torch.ones(1, 4096)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
# What is imported late, and threads that are started once, is not what is measured.
Checkpointer().save_state(f"{directory}/{what}")
before = peak()
if what.startswith("load"):
    ckpt.load_state()
else:
    for _ in range(3):
        ckpt.step()
    ckpt.flush()
print(peak() - before)
"""


def _peak(what: str, slots: int, directory: Path) -> int:
    command = [sys.executable, "-c", _SCRIPT, what, str(slots), str(directory)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout)


@pytest.fixture
def directory() -> Iterator[Path]:
    """In memory, but not in the process's: a disk would make the test slow and show nothing."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.mark.parametrize(("what", "slots"), [("save", 1), ("save", 2), ("overlap", 2)])
def test_saving_takes_its_slots_and_no_more(directory: Path, what: str, slots: int) -> None:
    taken = _peak(what, slots, directory)
    assert taken < slots * SHARE + ROOM
    # Else what is measured is not what saving takes.
    assert taken > SHARE


def test_loading_takes_one_slot_and_no_more(directory: Path) -> None:
    _peak("save", 1, directory)
    taken = _peak("load", 2, directory)
    assert SHARE < taken < SHARE + ROOM


def test_what_nothing_holds_yet_is_read_to_where_it_stays(directory: Path) -> None:
    """Adam's two moments are made by loading; they are not staged beside that."""
    _peak("save moments", 1, directory)
    taken = _peak("load moments", 1, directory)
    assert 3 * SHARE < taken < 3 * SHARE + ROOM
