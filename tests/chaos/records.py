"""What the workers of a run write down as they go, and how it is read back.

A file a rank and life, one JSON object a line, flushed: what was written before
a SIGKILL is there after it.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Diary:
    """Written by one worker in one life. Collective: the ranks agree on the life's number."""

    def __init__(self, out: Path, rank: int, world_size: int) -> None:
        import ray
        import torch

        life = torch.tensor(len(list(out.glob("life-*-rank-0.jsonl"))))
        torch.distributed.broadcast(life, src=0)
        # All have read the number before the file is there that makes it one higher.
        torch.distributed.barrier()
        self._file = (out / f"life-{int(life):03d}-rank-{rank}.jsonl").open("w")
        node = ray.get_runtime_context().get_node_id()
        self.write(pid=os.getpid(), node=node, world_size=world_size)

    def loaded(self, step: int, path: str | None) -> None:
        """`load_state` has returned. The source is a checkpoint's name, if it was in storage."""
        stored = path is not None and not path.startswith("memory://")
        self.write(resumed=step, source=path.rpartition("/")[2] if path and stored else None)

    def write(self, **entry: Any) -> None:
        print(json.dumps({"time": time.time(), **entry}), file=self._file, flush=True)


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One rank in one life.

    Attributes:
        began: seconds since the epoch.
        resumed: the step it went on from; None while it is loading.
        source: the name of the checkpoint it loaded; None if it began anew.
        steps: by number: what was written down, in order.
        digest: of what it ended with.
    """

    pid: int
    node: str
    world_size: int
    began: float
    resumed: int | None = None
    source: str | None = None
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class Life:
    """One life of the worker group, as far as rank 0 got to write it down."""

    number: int
    ranks: dict[int, Rank]

    @property
    def world_size(self) -> int:
        return self.ranks[0].world_size

    @property
    def resumed(self) -> int | None:
        return self.ranks[0].resumed

    @property
    def step(self) -> int:
        """The last that rank 0 did."""
        return max(self.ranks[0].steps, default=self.resumed or 0)

    @property
    def digests(self) -> list[str | None]:
        return [self.ranks[rank].digest for rank in sorted(self.ranks)]


def read_lives(out: Path) -> list[Life]:
    """All lives of a run, oldest first."""
    lives = []
    for first in sorted(out.glob("life-*-rank-0.jsonl")):
        number = int(first.name.split("-")[1])
        ranks = {}
        for file in out.glob(f"life-{number:03d}-rank-*.jsonl"):
            found = _rank(file)
            if found is not None:
                ranks[int(file.stem.rpartition("-")[2])] = found
        if 0 in ranks:
            lives.append(Life(number=number, ranks=ranks))
    return lives


def _rank(file: Path) -> Rank | None:
    # The last line may be half there.
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    if not lines:
        return None
    begin, *rest = lines
    loaded = [(line["resumed"], line["source"]) for line in rest if "resumed" in line]
    digests = [line["digest"] for line in rest if "digest" in line]
    return Rank(
        pid=begin["pid"],
        node=begin["node"],
        world_size=begin["world_size"],
        began=begin["time"],
        resumed=loaded[0][0] if loaded else None,
        source=loaded[0][1] if loaded else None,
        steps={line["step"]: line for line in rest if "step" in line},
        digest=digests[0] if digests else None,
    )
