"""Where a script without Ray keeps its checkpoints: Accelerate's `ProjectConfiguration`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ray_accel_ckpt.arguments import require, whole_number
from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.location import require_location


@dataclass(frozen=True)
class ProjectConfiguration:
    """Names and meaning as in 🤗 Accelerate.

    Attributes:
        project_dir: directory or URI (`s3://...`) under which `checkpoints/` lies.
        automatic_checkpoint_naming: `save_state()` without a directory writes
            `<project_dir>/checkpoints/checkpoint_<n>`. Unlike Accelerate, `n`
            goes on from what exists and nothing is overwritten: on disks, two runs
            at once get numbers of their own.
        total_limit: keep the newest so many. An old one is removed only after
            the new one is whole, and only directories named `checkpoint_<n>`; with
            them goes what earlier saves left that never became whole.
        iteration: the least `n` to use.

    Raises:
        ConfigurationError: on a limit below 1, a negative iteration, a directory
            that is none, automatic naming without one, or what is none of these.
    """

    project_dir: str | os.PathLike[str] | None = None
    automatic_checkpoint_naming: bool = False
    total_limit: int | None = None
    iteration: int = 0

    def __post_init__(self) -> None:
        if self.project_dir is not None:
            require_location(self.project_dir, name="project_dir")
        require(
            isinstance(self.automatic_checkpoint_naming, bool),
            *("automatic_checkpoint_naming", self.automatic_checkpoint_naming),
            expected="True or False",
            remedy="give what comes after project_dir by name: total_limit=3, say",
        )
        if self.automatic_checkpoint_naming and self.project_dir is None:
            raise ConfigurationError(
                "automatic_checkpoint_naming needs a project_dir to put checkpoints under",
                remedy="give one: ProjectConfiguration('runs/a', automatic_checkpoint_naming=True)",
            )
        if self.total_limit is not None:
            keep_all = "use None to keep every checkpoint"
            whole_number("total_limit", self.total_limit, least=1, remedy=keep_all)
        go_on = "leave it out to go on from the checkpoints that exist"
        whole_number("iteration", self.iteration, least=0, remedy=go_on)

    @property
    def checkpoints_dir(self) -> str | None:
        """`<project_dir>/checkpoints` when naming is automatic, else None."""
        if not self.automatic_checkpoint_naming or self.project_dir is None:
            return None
        return f"{os.fspath(self.project_dir).rstrip('/')}/checkpoints"
