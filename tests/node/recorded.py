"""The command line with a node that writes each drain to a file: `... recorded.py FILE ARGS`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ray_accel_ckpt.cli import app
from ray_accel_ckpt.cli import watch_node as module
from ray_accel_ckpt.errors import DrainError, NodeNotFoundError

record = Path(sys.argv.pop(1))


class FileNode:
    """It is gone as soon as FILE.gone is there, and unreachable while FILE.down is."""

    def __init__(self, **options: object) -> None:
        pass

    def find(self) -> str:
        if record.with_suffix(".gone").exists():
            raise NodeNotFoundError("gone")
        return "node"

    def drain(self, reason: str, deadline: float | None) -> str:
        if record.with_suffix(".down").exists():
            raise DrainError("Ray cannot be reached")
        with record.open("a") as lines:
            print(json.dumps({"reason": reason, "deadline": deadline}), file=lines, flush=True)
        return "node"


sys.modules[module.__module__].RayNode = FileNode  # type: ignore[attr-defined]
app()
