"""Errors say what, where, why and what to do, and travel from a worker to the driver whole."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from ray_accel_ckpt import errors
from ray_accel_ckpt.errors import (
    AccelCkptError,
    ConfigurationError,
    CorruptCheckpointError,
    NotACheckpointError,
    NoUsableCheckpointError,
    StateMismatchError,
    StorageError,
)

CLASSES: list[type[AccelCkptError]] = [
    found
    for _, found in inspect.getmembers(errors, inspect.isclass)
    if issubclass(found, AccelCkptError)
]


def example(kind: type[AccelCkptError]) -> AccelCkptError:
    return kind("it broke", where="file.json", why="the disk is full", remedy="make room")


@pytest.mark.parametrize("kind", CLASSES)
def test_the_message_has_the_four_lines_and_where_to_read_on(kind: type[AccelCkptError]) -> None:
    assert str(example(kind)) == (
        "it broke\n  where: file.json\n  why: the disk is full\n  what to do: make room\n"
        f"  more: docs/troubleshooting.md#{kind.__name__.lower()}"
    )


@pytest.mark.parametrize("kind", CLASSES)
def test_the_four_are_attributes(kind: type[AccelCkptError]) -> None:
    error = example(kind)
    assert (error.what, error.where) == ("it broke", "file.json")
    assert (error.why, error.remedy) == ("the disk is full", "make room")


def test_lines_without_content_are_left_out() -> None:
    more = "\n  more: docs/troubleshooting.md#accelckpterror"
    assert str(AccelCkptError("it broke", remedy="retry")) == f"it broke\n  what to do: retry{more}"
    assert str(AccelCkptError("it broke")) == f"it broke{more}"


class OurError(StorageError):
    """What a user derives, for a filesystem of theirs say."""


def test_a_class_of_a_user_leads_to_what_it_is_derived_from() -> None:
    error = OurError("no tape")
    assert str(error) == "no tape\n  more: docs/troubleshooting.md#storageerror"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_message_that_tells_of_other_errors_has_one_link() -> None:
    inner = [example(CorruptCheckpointError), example(NotACheckpointError)]
    listed = NoUsableCheckpointError("none", why="\n".join(f"{each}" for each in inner))
    outer = StorageError(f"rank 1 found: {listed}", remedy="retry")
    assert str(outer).count("more: ") == 1
    assert str(outer).endswith(
        "\n  what to do: retry\n  more: docs/troubleshooting.md#storageerror"
    )
    assert "more: " not in listed.why
    assert listed.why.count("it broke\n  where: file.json\n  why: the disk is full") == 2


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_survives_pickling(kind: type[AccelCkptError]) -> None:
    error = example(kind)
    error.add_note("rank 3")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_a_mismatch_survives_pickling_with_its_lists() -> None:
    error = StateMismatchError("no", missing=("a",), unexpected=("b",), differing=("c",))
    again = pickle.loads(pickle.dumps(error))
    assert (again.missing, again.unexpected, again.differing) == (("a",), ("b",), ("c",))
    assert again.why == "missing: a; unexpected: b; differing: c"


def test_a_mismatch_shows_twenty_names_and_holds_all() -> None:
    names = tuple(f"n{i}" for i in range(25))
    error = StateMismatchError("no", missing=names, why="renamed")
    assert error.missing == names
    assert error.why == f"renamed; missing: {', '.join(names[:20])} and 5 more"


@pytest.mark.parametrize("kind", CLASSES)
def test_one_except_clause_catches_them_all(kind: type[AccelCkptError]) -> None:
    with pytest.raises(AccelCkptError):
        raise example(kind)


def test_wrong_arguments_are_value_errors() -> None:
    with pytest.raises(ValueError, match="batch"):
        raise ConfigurationError("a batch")


def test_the_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    """Each line: its parent by indentation, and the built-in error it is also one of."""
    drawn: dict[str, tuple[str, set[str]]] = {}
    parents: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^ {4}([│├└─ ]*)(\w+Error)(?: \((\w+)\))? *", line)
        if found is None:
            continue
        depth, name, builtin = len(found[1]), found[2], found[3]
        parents = [p for p in parents if p[0] < depth]
        drawn[name] = (parents[-1][1] if parents else "Exception", {builtin} - {None})
        parents.append((depth, name))

    actual = {}
    for kind in CLASSES:
        ours, *others = [base.__name__ for base in kind.__bases__]
        actual[kind.__name__] = (ours, set(others))
    assert drawn == actual
