"""What ranks tell each other of a failure, without other processes."""

from __future__ import annotations

from typing import Any

import pytest

from ray_accel_ckpt.errors import StorageError
from ray_accel_ckpt.runtime.group import Group


class TapeError(StorageError):
    """What a user derives."""


class _First(Group):
    """Rank 0 of two, which keeps what it tells."""

    rank = 0
    world_size = 2
    told: Any = None

    def gather(self, value: Any) -> list[Any]:
        self.told = value
        return [value, None]


class _Second(Group):
    """Rank 1 of two, which hears what rank 0 told."""

    rank = 1
    world_size = 2

    def __init__(self, told: Any) -> None:
        self._told = told

    def gather(self, value: Any) -> list[Any]:
        return [self._told, value]


def test_an_error_of_a_class_of_the_user_reaches_all_ranks_as_what_it_is_derived_from() -> None:
    first = _First()

    def fails() -> None:
        raise TapeError("no tape", remedy="insert one")

    with pytest.raises(TapeError):
        first.agreed(fails)
    with pytest.raises(StorageError) as caught:
        _Second(first.told).agreed(lambda: None)
    assert type(caught.value) is StorageError
    assert str(caught.value) == (
        "rank 0 found: no tape\n  what to do: insert one\n"
        "  more: docs/troubleshooting.md#storageerror"
    )
