"""The pictures in the docs: `python docs/pictures.py` draws them anew. Needs Chromium."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ray_accel_ckpt.report.figure import png, timeline
from ray_accel_ckpt.report.history import history_of
from ray_accel_ckpt.report.page import page
from tests.report.browser import browse
from tests.report.runs import run

IMAGES = Path(__file__).parent / "images"


def draw() -> None:
    history = history_of(run(), where="")
    (IMAGES / "timeline.png").write_bytes(png(timeline(history)))
    with tempfile.TemporaryDirectory() as temporary:
        html = page(history, run="s3://bucket/runs/digits")
        shot = f"--screenshot={IMAGES / 'report.png'}"
        browse(Path(temporary), html, shot, "--window-size=1100,1760")


if __name__ == "__main__":
    draw()
