"""What a `Checkpointer` is made with: what cannot work is refused when it is given."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

from ray_accel_ckpt.arguments import require
from ray_accel_ckpt.project import ProjectConfiguration

_SCALER = ("scale", "step", "update", "state_dict", "load_state_dict")


def require_options(project: Any, scaler: Any, timeout: Any, ddp_kwargs: Any) -> None:
    """What cannot be used as it is given to a `Checkpointer`, whatever is made of it."""
    require(
        project is None or isinstance(project, ProjectConfiguration),
        *("project_config", project),
        expected="a ray_accel_ckpt.ProjectConfiguration or None",
        remedy="ProjectConfiguration('runs/a', automatic_checkpoint_naming=True), say",
    )
    able = all(callable(getattr(scaler, method, None)) for method in _SCALER)
    require(
        scaler is None or (able and not isinstance(scaler, type)),
        *("scaler", scaler),
        expected="a torch.amp.GradScaler or None",
        remedy="scaler=torch.amp.GradScaler('cuda'), say",
    )
    seconds = isinstance(timeout, numbers.Real) and not isinstance(timeout, bool)
    require(
        seconds and timeout > 0,
        *("storage_timeout", timeout),
        expected="positive seconds",
        remedy="leave it out for 600",
    )
    require(
        ddp_kwargs is None or isinstance(ddp_kwargs, Mapping),
        *("ddp_kwargs", ddp_kwargs),
        expected="a dict or None",
        remedy="ddp_kwargs={'find_unused_parameters': True}, say",
    )
