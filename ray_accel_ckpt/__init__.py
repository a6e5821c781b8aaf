"""Exact, atomic checkpoint and resume for Ray Train loops on machines that vanish."""

from importlib import import_module
from typing import TYPE_CHECKING

from ray_accel_ckpt import errors
from ray_accel_ckpt.version import __version__

if TYPE_CHECKING:
    from ray_accel_ckpt.checkpointer import Checkpointer
    from ray_accel_ckpt.memory import MemoryTier
    from ray_accel_ckpt.policy import EverySeconds, EverySteps, MaxOverhead
    from ray_accel_ckpt.project import ProjectConfiguration
    from ray_accel_ckpt.runtime.configs import run_config
    from ray_accel_ckpt.runtime.heal import heal_run
    from ray_accel_ckpt.storage.opened import open_checkpoint
else:
    # Imported when first asked for: the daemon that stands beside Ray on each
    # machine would otherwise hold torch in memory for nothing.
    _HOMES = {
        "Checkpointer": "checkpointer",
        "EverySeconds": "policy",
        "EverySteps": "policy",
        "MaxOverhead": "policy",
        "MemoryTier": "memory",
        "ProjectConfiguration": "project",
        "heal_run": "runtime.heal",
        "open_checkpoint": "storage.opened",
        "run_config": "runtime.configs",
    }

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *_HOMES} - {"TYPE_CHECKING", "import_module"})


__all__ = [
    "Checkpointer",
    "EverySeconds",
    "EverySteps",
    "MaxOverhead",
    "MemoryTier",
    "ProjectConfiguration",
    "__version__",
    "errors",
    "heal_run",
    "open_checkpoint",
    "run_config",
]
