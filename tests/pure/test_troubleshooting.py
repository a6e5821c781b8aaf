"""The page about errors knows each of them, and each leads to its heading there."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from ray_accel_ckpt import errors

ROOT = Path(__file__).parents[2]
KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.AccelCkptError)
]


def _headings(page: str) -> list[str]:
    return re.findall(r"^## (\w+Error)$", (ROOT / page).read_text(), re.MULTILINE)


def test_each_error_has_its_heading() -> None:
    assert sorted(_headings("docs/troubleshooting.md")) == sorted(kind.__name__ for kind in KINDS)


def test_each_error_leads_to_a_heading_that_is_there() -> None:
    for kind in KINDS:
        page, _, anchor = str(kind("it broke")).rpartition("  more: ")[2].partition("#")
        # An anchor is the heading in small letters, on GitHub and on the site.
        assert [each for each in _headings(page) if each.lower() == anchor] == [kind.__name__]
