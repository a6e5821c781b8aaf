"""Live figures of a run, as Ray's own: Prometheus scrapes them from each node's agent."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from ray_accel_ckpt.runtime.ray_run import RayRun

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


@dataclass(frozen=True, kw_only=True)
class Described:
    """One metric, by the name that Ray is told."""

    name: str
    kind: str
    what: str
    tags: tuple[str, ...] = ()

    @property
    def exported(self) -> tuple[str, ...]:
        """The names under which Prometheus finds it."""
        ends = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_count", "_sum")}
        return tuple(f"ray_{self.name}{end}" for end in ends[self.kind])


STALL = Described(
    name="accel_ckpt_save_stall_seconds",
    kind="Histogram",
    what="Seconds that training waited for a save to be frozen.",
)
DURABLE = Described(
    name="accel_ckpt_save_durable_seconds",
    kind="Histogram",
    what="Seconds from the beginning of a save until this worker's share was durable.",
)
SAVED = Described(
    name="accel_ckpt_saved_bytes",
    kind="Counter",
    what="Bytes of this worker's shares that are durable.",
)
RESTORES = Described(
    name="accel_ckpt_restores",
    kind="Counter",
    what="Restores, by where the state came from: memory or storage.",
    tags=("tier",),
)
LOST = Described(
    name="accel_ckpt_steps_lost",
    kind="Counter",
    what="Steps that were made before a restart and had to be made again.",
)
DURABLE_AT = Described(
    name="accel_ckpt_last_durable_timestamp_seconds",
    kind="Gauge",
    what="When this worker's share was last durable, in seconds since the epoch: "
    "time() less this is the age of the last durable state.",
)
ALL = (STALL, DURABLE, SAVED, RESTORES, LOST, DURABLE_AT)


class Metrics:
    """Those of one worker; nothing without a Ray Train run.

    Tags: ``run``, its name, and ``rank``, the worker's world rank.
    """

    def __init__(self, run: RayRun | None) -> None:
        self._made: dict[str, Any] = {}
        if run is None:
            return
        import ray.train
        from ray.util import metrics

        rank = ray.train.get_context().get_world_rank()
        for each in ALL:
            options = {"boundaries": list(_SECONDS)} if each.kind == "Histogram" else {}
            metric = getattr(metrics, each.kind)(
                each.name, each.what, tag_keys=("run", "rank", *each.tags), **options
            )
            metric.set_default_tags({"run": run.name, "rank": str(rank)})
            self._made[each.name] = metric

    def stalled(self, seconds: float) -> None:
        if self._made:
            self._made[STALL.name].observe(seconds)

    def durable(self, nbytes: int, seconds: float) -> None:
        """Any thread."""
        if self._made:
            self._made[DURABLE.name].observe(seconds)
            self._made[DURABLE_AT.name].set(time.time())
            if nbytes:
                self._made[SAVED.name].inc(nbytes)

    def restored(self, tier: str, lost: int) -> None:
        if self._made:
            self._made[RESTORES.name].inc(tags={"tier": tier})
            if lost:
                self._made[LOST.name].inc(lost)
