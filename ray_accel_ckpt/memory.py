"""What a Checkpointer keeps in memory between its saves to storage."""

from __future__ import annotations

from dataclasses import dataclass

from ray_accel_ckpt.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class MemoryTier:
    """Snapshots in the memory of the nodes, for restarts that do not touch storage.

    On each node of a Ray Train run the newest two are kept in `/dev/shm`, by an actor
    that outlives the workers, and as many other nodes have a copy.

    Attributes:
        every_steps: a snapshot after each so many calls of `step`; one that is saved to
            storage is kept too.
        replicas: nodes that keep a copy of each node's part. 0: the loss of a node is the
            loss of what it kept, and the run goes on from storage.

    Raises:
        ConfigurationError: a number that cannot be.
    """

    every_steps: int = 1
    replicas: int = 1

    def __post_init__(self) -> None:
        for name, value, least in (
            ("every_steps", self.every_steps, 1),
            ("replicas", self.replicas, 0),
        ):
            if type(value) is not int or value < least:
                raise ConfigurationError(
                    f"{name} must be a whole number, at least {least}; got {value!r}",
                    where=f"MemoryTier({name}=...)",
                )

    def due(self, global_step: int) -> bool:
        """Whether a snapshot is taken after this step."""
        return global_step % self.every_steps == 0
