"""The code of docs/transformers.md and docs/lightning.md runs; the assertions are theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.pages import snippets

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    # Lightning's own, about how small everything is here.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.mark.parametrize("page", ["docs/transformers.md", "docs/lightning.md"])
def test_the_code_of_a_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for snippet in snippets(page, "python"):
        exec(snippet, names)  # noqa: S102
