"""Arguments that cannot work, found where they are given."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable
from typing import Any

from ray_accel_ckpt.errors import ConfigurationError


def whole_number(
    name: str, value: Any, *, least: int, most: int | None = None, remedy: str = ""
) -> int:
    """`value` as an int. One of numpy's is one, True and 3.0 are none.

    Raises:
        ConfigurationError: it is none, or not from `least` to `most`.
    """
    if not isinstance(value, bool) and isinstance(value, numbers.Integral):
        number = operator.index(value)
        if number >= least and (most is None or number <= most):
            return number
    limits = f"at least {least}" if most is None else f"from {least} to {most}"
    raise ConfigurationError(
        f"{name} must be a whole number, {limits}; got {value!r:.100}", remedy=remedy
    )


def texts(name: str, value: Any, *, remedy: str) -> tuple[str, ...]:
    """Several texts. One alone is none of them, though it can be iterated too.

    Raises:
        ConfigurationError: it is something else.
    """
    several = isinstance(value, Iterable) and not isinstance(value, (str, bytes))
    found = tuple(value) if several else ()
    named = several and all(isinstance(each, str) for each in found)
    require(named, name, value, expected="a tuple of names", remedy=remedy)
    return found


def require(holds: bool, name: str, value: Any, *, expected: str, remedy: str = "") -> None:
    """Raise `ConfigurationError` unless `value` can be what is `expected` of argument `name`."""
    if not holds:
        raise ConfigurationError(f"{name} must be {expected}, not {value!r:.100}", remedy=remedy)
