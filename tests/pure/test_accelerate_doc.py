"""The code of docs/accelerate.md runs, and its diff is that of the two loops."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import pytest

from tests.accelerate_loops import before
from tests.accelerated import reset
from tests.pages import snippets
from tests.pure.helpers import digest

PAGE = "docs/accelerate.md"


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole, saved, converted, back = snippets(PAGE, "python")
    names: dict[str, Any] = {}
    reset()
    exec(whole, names)  # noqa: S102
    # It went through two epochs; called again, it loads the end and goes on from it.
    assert sum(1 for _ in (tmp_path / "run" / "checkpoints").iterdir()) == 7
    expected = digest(names["model"])
    reset()
    again, _ = names["train"](epochs=2)
    assert digest(again) == expected
    states = []
    for snippet in (saved, converted, back):
        exec(snippet, names)  # noqa: S102
        states.append(digest(names["model"], names["optimizer"].state_dict()))
    assert states == states[:1] * 3


def test_the_diff_of_the_page_is_that_of_the_loops() -> None:
    loops = Path(before.__file__).parent
    texts = [(loops / name).read_text().splitlines() for name in ("before.py", "after.py")]
    shown = [line[0] + line[2:] for line in difflib.ndiff(*texts) if line.startswith(("+ ", "- "))]
    (block,) = snippets(PAGE, "diff")
    assert sorted(block.splitlines()) == sorted(shown)
