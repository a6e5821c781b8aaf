"""A promise links the test that proves it: the tests that the documents name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("cluster/*.md")])

# A link to a file of tests, and the names of tests that stand beside it.
_PROOF = re.compile(r"\[test_\w+\.py\]\(([^)]+)\)((?:,?\s+`test_\w+`)*)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_tests_that_a_document_names_are_there(document: Path) -> None:
    absent = []
    for path, names in _PROOF.findall(document.read_text()):
        file = document.parent / path
        tests = file.read_text() if file.exists() else ""
        absent += [path] if not tests else []
        absent += [n for n in re.findall(r"test_\w+", names) if f"def {n}(" not in tests]
    assert absent == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tables_and_lists_are_such_on_the_site_too(document: Path) -> None:
    """mkdocs takes them for text where GitHub does not: without a blank line before them."""
    text = re.sub(r"^ *```.*?^ *```$", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = ["", *text.splitlines(), ""]
    for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
        if line.startswith("|") and not before.startswith("|"):
            assert before == "", line
            assert re.fullmatch(r"\|[-:| ]+\|", after), f"no head of a table: {line}"
        if re.match(r"([-*]|\d+\.) ", line):
            assert re.match(r"$| *([-*]|\d+\.) |  ", before), line
