"""What can be seen of a run from outside: its lives, and the checkpoints that Ray knows."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos.records import Life, read_lives

SNAPSHOT = "checkpoint_manager_snapshot.json"


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A checkpoint that Ray has written into its record of the run."""

    path: Path
    step: int

    @property
    def name(self) -> str:
        return self.path.name


class Watch:
    """Looks at a run's directory and at what its workers write down.

    Attributes:
        seen: every checkpoint that was ever registered, by name, and when that was first seen.
        damaged: the names of those that the campaign has damaged, and when.
    """

    def __init__(self, run: Path, out: Path) -> None:
        self._run, self._out = run, out
        self.seen: dict[str, tuple[float, Registered]] = {}
        self.damaged: dict[str, float] = {}

    def lives(self) -> list[Life]:
        return read_lives(self._out)

    def look(self) -> None:
        """Remember what is registered now."""
        now = time.time()
        for each in self.registered():
            self.seen.setdefault(each.name, (now, each))

    def registered(self) -> list[Registered]:
        """What Ray's record names, in order; nothing while it is torn or not there."""
        return [
            Registered(path=self._run / name, step=int(re.split("_", name)[1]))
            for name in self._names()
        ]

    def whole(self) -> list[Path]:
        """Checkpoints of which each rank's manifest is there, oldest first, known to Ray or not."""
        found = []
        for path in sorted(self._run.glob("checkpoint_*_*")):
            manifests = list(path.glob("manifest-*-of-*.json"))
            if manifests and len(manifests) == int(manifests[0].stem.rpartition("-")[2]):
                found.append(path)
        return found

    def floor(self, before: float) -> int:
        """The step of the newest good checkpoint seen registered before a moment; 0 if none."""
        good = [
            each.step
            for seen, each in self.seen.values()
            if seen < before and each.name not in self.damaged
        ]
        return max(good, default=0)

    def orphans(self) -> list[str]:
        """Checkpoints' directories that Ray's record does not name."""
        there = {path.name for path in self._run.glob("checkpoint_*_*") if path.is_dir()}
        return sorted(there - set(self._names()))

    def _names(self) -> list[str]:
        try:
            state: dict[str, Any] = json.loads((self._run / SNAPSHOT).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return []
        return [result["checkpoint_dir_name"] for result in state["checkpoint_results"]]
