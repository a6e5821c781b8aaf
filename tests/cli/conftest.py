"""Runs on this disk, and servers that speak S3 and GCS."""

from __future__ import annotations

from pathlib import Path
from threading import Event

import pytest

from ray_accel_ckpt.runtime import progress
from tests.cli import runs
from tests.storage.conftest import gcs, s3

__all__ = ["gcs", "s3"]


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """A run of 2 workers: two checkpoints that Ray knows, one that it does not, half of one."""
    run = tmp_path / "digits"
    names = [runs.saved(run, step) for step in (20, 40)]
    runs.saved(run, 30, attempt="0c1d2e")
    runs.saved(run, 60, ranks=1)
    runs.register(run, *names)
    return run


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """One checkpoint of 2 workers."""
    run = tmp_path / "digits"
    return run / runs.saved(run, 20)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[progress._Far]:
    """How far each bar came, in the place of the bars."""
    found: list[progress._Far] = []

    def bar(count: progress._Count, over: Event) -> None:
        over.wait()
        found.append(count.far)

    monkeypatch.setattr(progress, "_bar", bar)
    return found
