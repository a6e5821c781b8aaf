"""Where a worker dies: SIGKILL on itself at a given moment of a save or of the loop.

Installed inside a worker process, before its loop begins. Each fires once a
run: a marker file remembers it over the restart.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from ray_accel_ckpt.image.staging import Slot
from ray_accel_ckpt.storage.filesystem import LocalFilesystem

POINTS = (
    "staging",
    "mid-upload",
    "after the shard, before the manifest",
    "after the manifest, before Ray registers",
    "mid-epoch",
    "at an epoch's end",
)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`rank` dies at `point`, the first time after its step `after`."""

    point: str
    rank: int
    after: int
    marker: str

    def install(self, rank: int, step: Callable[[], int]) -> None:
        """Arrange for the death of this process if it is `rank`'s."""
        if rank != self.rank or Path(self.marker).exists():
            return

        def die() -> None:
            if step() > self.after:
                Path(self.marker).write_text(str(step()))
                os.kill(os.getpid(), signal.SIGKILL)

        write, fill = LocalFilesystem.write, Slot.fill

        def staging(slot: Slot, *args: Any, **options: Any) -> Any:
            filled = fill(slot, *args, **options)
            die()
            return filled

        def writing(filesystem: Any, path: str, chunks: Iterable[Any]) -> None:
            name = Path(path).name
            if self.point == "after the shard, before the manifest" and "manifest" in name:
                die()
            torn = self.point == "mid-upload" and "shard" in name
            write(filesystem, path, _torn(chunks, die) if torn else chunks)
            if self.point == "after the manifest, before Ray registers" and "manifest" in name:
                die()

        if self.point == "staging":
            mock.patch.object(Slot, "fill", staging).start()
        mock.patch.object(LocalFilesystem, "write", writing).start()

    def on_step(self, rank: int, step: int) -> None:
        if self.point == "mid-epoch" and rank == self.rank and step == self.after + 2:
            self._once(step)

    def on_epoch_end(self, rank: int, step: int) -> None:
        if self.point == "at an epoch's end" and rank == self.rank and step > self.after:
            self._once(step)

    def _once(self, step: int) -> None:
        if not Path(self.marker).exists():
            Path(self.marker).write_text(str(step))
            os.kill(os.getpid(), signal.SIGKILL)


def _torn(chunks: Iterable[Any], die: Callable[[], None]) -> Iterator[Any]:
    for chunk in chunks:
        yield bytes(chunk)[: len(chunk) // 2]
        die()
        yield bytes(chunk)[len(chunk) // 2 :]
