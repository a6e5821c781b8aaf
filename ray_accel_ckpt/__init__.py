"""Exact, atomic checkpoint and resume for Ray Train loops on machines that vanish."""

from ray_accel_ckpt import errors
from ray_accel_ckpt.checkpointer import Checkpointer
from ray_accel_ckpt.policy import EverySeconds, EverySteps, MaxOverhead
from ray_accel_ckpt.project import ProjectConfiguration
from ray_accel_ckpt.runtime.configs import run_config
from ray_accel_ckpt.runtime.heal import heal_run
from ray_accel_ckpt.storage.opened import open_checkpoint
from ray_accel_ckpt.version import __version__

__all__ = [
    "Checkpointer",
    "EverySeconds",
    "EverySteps",
    "MaxOverhead",
    "ProjectConfiguration",
    "__version__",
    "errors",
    "heal_run",
    "open_checkpoint",
    "run_config",
]
