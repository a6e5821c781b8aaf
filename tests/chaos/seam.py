"""The run's storage, with a switch: a small file says what goes wrong, and until when."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fsspec.implementations.local import LocalFileOpener, LocalFileSystem

Trouble = Literal["reset", "throttled", "timeout", "stall", "full"]
Scope = Literal["uploads", "everything"]

_CHECKPOINT_FILE = re.compile(r"/checkpoint_[0-9]+_[0-9a-f]+/")


@dataclass(frozen=True, kw_only=True)
class Switch:
    """What goes wrong.

    Attributes:
        scope: the writing of checkpoints' files; or each operation of everybody,
            Ray's own record of the run and a starting driver included.
        until: seconds since the epoch.
    """

    trouble: Trouble
    scope: Scope
    until: float

    def write(self, control: Path) -> None:
        partial = control.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self)))
        partial.replace(control)

    def meet(self) -> None:
        """Have an operation meet it: wait, or raise."""
        if self.trouble == "stall":
            time.sleep(max(0.0, self.until - time.time()))
        elif self.trouble == "reset":
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        elif self.trouble == "timeout":
            raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")
        elif self.trouble == "throttled":
            raise OSError("AWS Error SLOW_DOWN: HTTP response code 503: please reduce your rate")
        else:
            raise OSError(errno.ENOSPC, "No space left on device")


class SwitchedFileSystem(LocalFileSystem):
    """A local disk that goes wrong while the file `control` says so."""

    def __init__(self, control: str, **options: Any) -> None:
        super().__init__(auto_mkdir=True, **options)
        self.control = control

    def meet(self, path: str, *, writing: bool) -> None:
        with contextlib.suppress(FileNotFoundError):
            switch = Switch(**json.loads(Path(self.control).read_text()))
            uploads = writing and _CHECKPOINT_FILE.search(path) is not None
            if time.time() < switch.until and (uploads or switch.scope == "everything"):
                switch.meet()

    def _open(self, path: str, mode: str = "rb", block_size: Any = None, **options: Any) -> Any:
        self.meet(path, writing="r" not in mode)
        return SwitchedFile(path, mode, fs=self, **options)

    def ls(self, path: str, detail: bool = False, **options: Any) -> Any:
        self.meet(path, writing=False)
        return super().ls(path, detail=detail, **options)

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        self.meet(path, writing=False)
        super().rm(path, recursive=recursive, maxdepth=maxdepth)


class SwitchedFile(LocalFileOpener):
    """A file that is left cut off when trouble begins while it is written."""

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        half = len(rest) // 2
        written = super().write(rest[:half])
        self.fs.meet(self.path, writing=True)
        return int(written + super().write(rest[half:]))
