"""The code of docs/transformers.md runs; the assertions are its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


@pytest.mark.parametrize(("page", "count"), [("transformers.md", 4)])
def test_the_code_of_a_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str, count: int
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (DOCS / page).read_text()
    snippets = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(snippets) == count
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(snippet, names)  # noqa: S102
