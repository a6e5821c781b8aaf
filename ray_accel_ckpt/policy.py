"""When to save: small objects that `Checkpointer.step` asks after every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ray_accel_ckpt.errors import ConfigurationError


class SavePolicy(Protocol):
    """Decides whether a save is due.

    Every rank asks its own copy after the same step and must get the same
    answer, so a policy may depend on nothing but its arguments.
    """

    def due(self, *, global_step: int) -> bool:
        """Whether to save after `global_step` completed steps (1 after the first)."""
        ...


@dataclass(frozen=True)
class EverySteps:
    """Save after every `steps` calls of `Checkpointer.step`.

    Raises:
        ConfigurationError: if `steps` is not a positive integer.
    """

    steps: int

    def __post_init__(self) -> None:
        if type(self.steps) is not int or self.steps < 1:
            raise ConfigurationError(
                f"EverySteps takes a whole number of steps, at least 1; got {self.steps!r}",
                remedy="pass EverySteps(50), say; omit save= to save by hand only",
            )

    def due(self, *, global_step: int) -> bool:
        return global_step % self.steps == 0
