"""What `import ray_accel_ckpt` offers, and nothing beside it."""

from __future__ import annotations

import inspect
import re
from importlib import metadata
from types import ModuleType

import pytest

import ray_accel_ckpt
from ray_accel_ckpt import Checkpointer, errors


def test_all_is_sorted() -> None:
    assert ray_accel_ckpt.__all__ == sorted(ray_accel_ckpt.__all__)


def test_all_has_at_most_twelve_names() -> None:
    assert len(ray_accel_ckpt.__all__) <= 12


def test_all_is_what_is_public() -> None:
    """Modules that an import leaves behind as attributes are no offer, except `errors`."""
    public = {
        name
        for name, value in vars(ray_accel_ckpt).items()
        if not name.startswith("_") and (value is errors or not isinstance(value, ModuleType))
    }
    assert {*ray_accel_ckpt.__all__} == public | {"__version__"}


@pytest.mark.parametrize("name", ray_accel_ckpt.__all__)
def test_every_name_is_documented(name: str) -> None:
    value = getattr(ray_accel_ckpt, name)
    assert name == "__version__" or inspect.getdoc(value)


def test_every_method_of_the_checkpointer_is_documented() -> None:
    public = {n: m for n, m in vars(Checkpointer).items() if not n.startswith("_")}
    assert [name for name, member in public.items() if not inspect.getdoc(member)] == []


def test_the_version_is_that_of_the_package() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", ray_accel_ckpt.__version__)
    assert ray_accel_ckpt.__version__ == metadata.version("ray_accel_ckpt")
