"""Headless Chromium."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def browse(directory: Path, html: str, *options: str) -> str:
    """What it says of a page. The page and its profile lie in `directory`."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium is not None, "there is no Chromium: make browser"
    (directory / "page.html").write_text(html)
    command = [chromium, *_FLAGS, f"--user-data-dir={directory / 'profile'}", *options]
    ran = subprocess.run(
        [*command, (directory / "page.html").as_uri()], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout
