"""The code on the pages: found, and its commands taken apart."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

# A block, wherever it is indented; its language is empty if none is said.
_BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
# `make target`, `ray-accel-ckpt command`: in a line of text.
_SPAN = re.compile(r"(?<!`)`((?:make|ray-accel-ckpt|ray|python -m|pip) [^`\n]+)`(?!`)")
_COMMENT = re.compile(r"(?:^|(?<=\s))#.*$", re.MULTILINE)
_SUBSTITUTION = re.compile(r"\$\(([^()]*)\)")
_BETWEEN = {"", "do", "done", "until", "while", "then", "if", "fi", "!"}
_ASSIGNED = re.compile(r"^(?:export )?\w+=")


def pages() -> list[str]:
    """All that is read by people and can hold code, by its path."""
    found = [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
        *ROOT.glob("docs/**/*.md"),
        *(
            p
            for name in ("benchmarks", "cluster", "examples")
            for p in ROOT.glob(f"{name}/**/*.md")
        ),
    ]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def blocks(page: str) -> Counter[str]:
    """How many blocks of each language a page has."""
    return Counter(language for language, _ in _BLOCK.findall((ROOT / page).read_text()))


def snippets(page: str, language: str) -> list[str]:
    found = _BLOCK.findall((ROOT / page).read_text())
    return [code for each, code in found if each == language]


def commands(page: str) -> Iterator[list[str]]:
    """Each command that a page's `sh` blocks and its text name, as its words."""
    for block in snippets(page, "sh"):
        yield from split(block)
    for span in _SPAN.findall((ROOT / page).read_text()):
        yield from split(span)


def split(script: str) -> Iterator[list[str]]:
    """The simple commands of a script, those inside of substitutions too."""
    script = _COMMENT.sub("", script.replace("\\\n", " ").replace("2>&1", ""))
    for inner in _SUBSTITUTION.findall(script):
        yield from split(inner)
    script = _SUBSTITUTION.sub("SUBSTITUTED", script)
    lexer = shlex.shlex(script, posix=True, punctuation_chars=";&|\n<>")
    lexer.whitespace = " \t"
    lexer.whitespace_split = True
    lexer.commenters = ""
    words: list[str] = []
    for word in [*lexer, "\n"]:
        if set(word) <= set(";&|\n"):
            yield from _without_shell(words)
            words = []
        else:
            words.append(word)


def _without_shell(words: list[str]) -> Iterator[list[str]]:
    while words and (words[0] in _BETWEEN | {"export"} or _ASSIGNED.match(words[0])):
        words = words[1:]
    if words:
        yield words
