"""The code of docs/interop.md runs, and does what the page says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pages import snippets


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    states = []
    for snippet in snippets("docs/interop.md", "python"):
        exec(snippet, names)  # noqa: S102
        states.append({n: t.clone() for n, t in names["model"].state_dict().items()})
    assert all(torch.equal(t, s[n]) for s in states for n, t in states[0].items())
