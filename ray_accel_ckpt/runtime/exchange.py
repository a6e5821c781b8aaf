"""What the workers tell each other at a heartbeat, and over which wires.

In a Ray Train run over Ray's own collectives: they run on the host, so that no
GPU stream waits for them, and one of them carries the notice of a preemption.
Elsewhere nobody gives notice, and rank 0's word travels over the process group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ray_accel_ckpt.policy import SavePolicy, TimePolicy
from ray_accel_ckpt.runtime.group import Group
from ray_accel_ckpt.runtime.session import Session


@dataclass(frozen=True, kw_only=True)
class Preemption:
    """Nodes of this group are going to be taken away.

    Attributes:
        deadline: when, in seconds since the epoch; None if nobody said.
        nodes: Ray's ids of the nodes.
        ranks: the workers on them.
    """

    deadline: float | None
    nodes: tuple[str, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Rank 0's word to all ranks.

    Attributes:
        save: save now.
        hold: until the next beat, begin no save that the policy asks for.
        ticks: calls until the next beat.
    """

    save: bool
    hold: bool
    ticks: int


class Exchange(Protocol):
    """One beat. Both methods are collective: every rank calls both, in this order."""

    @property
    def rank(self) -> int: ...

    def notice(self) -> Preemption | None:
        """What rank 0 knows of preemptions, on every rank."""
        ...

    def from_rank_zero(self, decision: Decision | None) -> Decision:
        """Rank 0's decision on every rank; the others have none."""
        ...


class RayExchange:
    """Over `ray.train.get_preemption_info` and `ray.train.collective`."""

    @property
    def rank(self) -> int:
        import ray.train

        return int(ray.train.get_context().get_world_rank())

    def notice(self) -> Preemption | None:
        import ray.train

        info = ray.train.get_preemption_info()
        if info is None:
            return None
        return Preemption(
            deadline=None if info.deadline_ms is None else info.deadline_ms / 1000,
            nodes=tuple(info.preempted_node_ids),
            ranks=tuple(info.preempted_ranks),
        )

    def from_rank_zero(self, decision: Decision | None) -> Decision:
        from ray.train.collective import broadcast_from_rank_zero

        save, hold, ticks = broadcast_from_rank_zero(_words(decision))
        return Decision(save=bool(save), hold=bool(hold), ticks=ticks)


class GroupExchange:
    """Over the process group; alone, without any wire."""

    def __init__(self, group: Group) -> None:
        self._group = group

    @property
    def rank(self) -> int:
        return self._group.rank

    def notice(self) -> Preemption | None:
        return None

    def from_rank_zero(self, decision: Decision | None) -> Decision:
        save, hold, ticks = self._group.from_rank_zero(_words(decision))
        return Decision(save=bool(save), hold=bool(hold), ticks=ticks)


def exchange_for(session: Session, policy: SavePolicy | None) -> Exchange | None:
    """The wires of this worker's heartbeats; None if there is nothing to ask.

    Ray gives notice whatever the policy; elsewhere only one that goes by time asks.
    """
    if session.run is not None:
        return RayExchange()
    return GroupExchange(session.group) if isinstance(policy, TimePolicy) else None


def _words(decision: Decision | None) -> list[int] | None:
    return None if decision is None else [decision.save, decision.hold, decision.ticks]
