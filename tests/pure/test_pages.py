"""Every piece of code on a page is run, or if nothing here can run it, checked."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from typer.main import get_command

from ray_accel_ckpt.cli import app
from tests.pages import ROOT, blocks, commands, pages, snippets, split


def _by(count: int, *tests: str) -> tuple[int, tuple[str, ...]]:
    """None for what is a drawing, or an excerpt of what is run elsewhere."""
    return count, tests


EXAMPLES = "tests/examples/test_examples.py"
HERE = "tests/pure/test_pages.py"

BLOCKS: dict[str, dict[str, tuple[int, tuple[str, ...]]]] = {
    "CONTRIBUTING.md": {"sh": _by(1, HERE)},
    "README.md": {
        "python": _by(5, "tests/ray/test_docs.py"),
        "sh": _by(6, HERE, "tests/ray/test_walk.py", "tests/cli/test_docs.py"),
        "": _by(2, EXAMPLES),
    },
    "benchmarks/README.md": {"sh": _by(1, HERE)},
    "cluster/README.md": {"sh": _by(17, HERE)},
    "docs/accelerate.md": {
        "python": _by(4, "tests/pure/test_accelerate_doc.py"),
        "diff": _by(1, "tests/pure/test_accelerate_doc.py"),
    },
    "docs/api.md": {},
    "docs/cli.md": {
        "console": _by(9, "tests/cli/test_docs.py"),
        "python": _by(1, "tests/cli/test_docs.py"),
        "sh": _by(1, "tests/cli/test_docs.py"),
    },
    "docs/design.md": {"": _by(1)},
    "docs/elastic.md": {
        "python": _by(2, "tests/ray/test_docs.py"),
        "": _by(1, EXAMPLES),
    },
    "docs/format.md": {"": _by(5, "tests/pure/test_format_doc.py")},
    "docs/getting-started.md": {
        "python": _by(3, "tests/ray/test_docs.py", "tests/pure/test_script_doc.py"),
        "sh": _by(2, "tests/ray/test_docs.py"),
        "console": _by(1, "tests/pure/test_script_doc.py"),
    },
    "docs/guarantees.md": {},
    "docs/index.md": {},
    "docs/interop.md": {"python": _by(4, "tests/pure/test_interop_doc.py")},
    "docs/lightning.md": {
        "python": _by(2, "tests/pure/test_integrations_doc.py"),
        "text": _by(1),
    },
    "docs/memory.md": {"python": _by(1, "tests/ray/test_docs.py")},
    "docs/notices.md": {
        "python": _by(1, "tests/node/test_docs.py"),
        "json": _by(1, "tests/node/test_docs.py"),
        "sh": _by(1, HERE),
    },
    "docs/performance.md": {},
    "docs/ray-train.md": {"python": _by(5, "tests/ray/test_docs.py")},
    "docs/reliability.md": {"sh": _by(1, HERE)},
    "docs/report.md": {"sh": _by(1, "tests/cli/test_docs.py")},
    "docs/spot.md": {"python": _by(1, "tests/ray/test_docs.py"), "sh": _by(1, HERE)},
    "docs/transformers.md": {
        "python": _by(4, "tests/pure/test_integrations_doc.py"),
        "": _by(1),
    },
    "docs/troubleshooting.md": {"console": _by(1, "tests/cli/test_docs.py")},
    "docs/tune.md": {
        "python": _by(2, "tests/ray/test_docs.py", "tests/pure/test_tune_runs.py"),
        "": _by(1),
    },
    "examples/README.md": {},
}
"""By page and language, how many blocks there are, and the files of tests that know them."""

ELSEWHERE = {"aws", "docker", "eksctl", "gcloud", "helm", "kubectl"}
"""Programs for what no test has: a cloud, a cluster of Kubernetes, an image."""
SHELL = {".", "source", "grep", "head", "kill", "ls", "pgrep", "sleep", "tail"}

COMMANDS = [(page, words) for page in pages() for words in commands(page)]


def test_each_block_on_a_page_is_known_to_a_test() -> None:
    """One more? Have it run by the test of its page, and count it here."""
    assert {page: dict(blocks(page)) for page in pages()} == {
        page: {language: count for language, (count, _) in known.items()}
        for page, known in BLOCKS.items()
    }


def test_the_tests_of_the_blocks_speak_of_the_page() -> None:
    for page, known in BLOCKS.items():
        files = {file for _, tests in known.values() for file in tests}
        # The pages show how examples end, which their tests know by the last line.
        for file in files - {HERE, EXAMPLES}:
            code = (ROOT / file).read_text()
            assert f'{page.removeprefix("docs/")}"' in code, f"{file}: {page}"


@pytest.mark.parametrize("page", [page for page in pages() if snippets(page, "sh")])
def test_the_commands_of_a_page_are_sound_shell(page: str) -> None:
    script = "\n".join(snippets(page, "sh"))
    checked = subprocess.run(["/bin/bash", "-n"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[f"{page}: {' '.join(words)[:60]}" for page, words in COMMANDS]
)
def test_what_a_command_names_is_there(page: str, words: list[str]) -> None:
    for path in re.findall(r"(?<![\w/.])(?:cluster|examples)/[\w./-]+", " ".join(words)):
        assert (ROOT / path).is_file(), f"{page}: {path}"
    if words[0] not in ELSEWHERE | SHELL:
        _check(words)


def _check(words: list[str]) -> None:
    program, *arguments = words
    if program == "make":
        for recipe in _recipe(arguments):
            _check(recipe)
    elif program == "ray-accel-ckpt":
        _check_click(get_command(app), arguments)
    elif program == "ray":
        from ray.scripts.scripts import cli

        _check_click(cli, arguments)
    elif program == "python":
        _check_python(arguments)
    elif program == "pip":
        _check_pip(arguments)
    elif program == "cluster/submit.sh":
        said = subprocess.run([ROOT / program, "--help"], text=True, capture_output=True).stdout
        own = arguments[: arguments.index("--")]
        assert [each for each in _options(own) if f"  {each} " not in said] == []
    else:
        pytest.fail(f"nothing here knows {program}: run it in a test, or add it to ELSEWHERE")


def _recipe(arguments: list[str]) -> Iterator[list[str]]:
    """What `make` would run of this repository's own."""
    make = shutil.which("make")
    assert make is not None
    dry = subprocess.run([make, "-n", *arguments], cwd=ROOT, text=True, capture_output=True)
    assert dry.returncode == 0, dry.stderr
    python = ".venv/bin/python"
    for words in split(dry.stdout):
        if words[0] == python and words[1:3] != ["-m", "pip"]:
            yield ["python", *words[1:]]


def _check_click(command: Any, arguments: list[str]) -> None:
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    known = set(_names(command))
    for word in own:
        # Typer has a click of its own.
        if hasattr(command, "commands") and not word.startswith("-") and word != "COMMAND":
            found = command.commands.get(word)
            assert found is not None, f"{command.name} has no {word}"
            command = found
            known |= set(_names(command))
    assert [each for each in _options(own) if each not in known] == []
    if own != arguments:
        _check(arguments[len(own) + 1 :])


def _names(command: Any) -> Iterator[str]:
    for parameter in command.params:
        yield from (*parameter.opts, *parameter.secondary_opts)


def _check_python(arguments: list[str]) -> None:
    if arguments[0] != "-m":
        path = ROOT / arguments[0].removeprefix("$PWD/")
        assert path.is_file()
        _check_options(arguments[1:], path.read_text())
    elif arguments[1] == "ray_accel_ckpt.cli":
        _check_click(get_command(app), arguments[2:])
    elif arguments[1] == "pytest":
        for each in arguments[2:]:
            assert (ROOT / each).exists() or not each.startswith("tests/")
    else:
        files = ROOT.joinpath(*arguments[1].split(".")).glob("*.py")
        _check_options(arguments[2:], "".join(file.read_text() for file in files))


def _check_options(arguments: list[str], code: str) -> None:
    assert code
    assert [each for each in _options(arguments) if f'"{each}"' not in code] == []


@cache
def _extras() -> set[str]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return set(tomllib.load(file)["project"]["optional-dependencies"])


def _check_pip(arguments: list[str]) -> None:
    for each in arguments:
        extras = re.fullmatch(r"(?:\.|ray_accel_ckpt)\[(.*)\]", each)
        assert extras is None or set(extras[1].split(",")) <= _extras()
    if "-c" in arguments:
        assert (ROOT / arguments[arguments.index("-c") + 1]).is_file()


def _options(arguments: list[str]) -> list[str]:
    return [each.partition("=")[0] for each in arguments if re.match(r"--?[a-z]", each)]
