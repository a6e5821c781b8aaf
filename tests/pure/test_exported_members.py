"""What `import ray_accel_ckpt` offers, and nothing beside it."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
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
    named = {n: getattr(ray_accel_ckpt, n) for n in dir(ray_accel_ckpt) if not n.startswith("_")}
    public = {n for n, v in named.items() if v is errors or not isinstance(v, ModuleType)}
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


def test_a_name_that_is_not_offered_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'ray_accel_ckpt' has no attribute 'Checkpoint'"):
        ray_accel_ckpt.Checkpoint  # noqa: B018


@pytest.mark.parametrize("module", ["ray_accel_ckpt", "ray_accel_ckpt.cli"])
def test_torch_and_ray_are_imported_only_when_needed(module: str) -> None:
    """`watch-node` runs on each machine of a cluster, for as long as that lives."""
    code = f"import sys, {module}; print({{'torch', 'ray', 'pyarrow'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
