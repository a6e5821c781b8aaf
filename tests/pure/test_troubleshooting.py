"""The page about errors knows each of them."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from ray_accel_ckpt import errors

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()


def test_each_error_has_its_heading() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    leaves = {kind.__name__ for kind in kinds if issubclass(kind, errors.AccelCkptError)}
    headings = set(re.findall(r"^## (\w+Error)$", PAGE, re.MULTILINE))
    assert headings == leaves - {"AccelCkptError"}
