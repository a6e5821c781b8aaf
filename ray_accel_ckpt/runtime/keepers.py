"""The keepers of a run, as workers and they themselves find each other, and what they hold."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ray_accel_ckpt.image.manifest import parse_name
from ray_accel_ckpt.storage.catalog import step_of

logger = logging.getLogger(__name__)

NAMESPACE = "ray_accel_ckpt"

CHUNK = 32 * 2**20
"""Bytes that travel from one node to another as one object of Ray's."""

ANSWER = 10.0
"""Seconds that a keeper has to say what it holds. One that does not holds nothing."""

Held = Mapping[str, Mapping[str, Mapping[str, tuple[int, int]]]]
"""By node and by name of a snapshot, the files that are there: see `Shelf.snapshots`."""


@dataclass(frozen=True, kw_only=True)
class Keepers:
    """Actors with names, so that whoever knows the run finds them.

    Attributes:
        key: of the run's life under one driver. Another driver's workers have others.
    """

    key: str

    @classmethod
    def of(cls, run: str, controller: str) -> Keepers:
        """Those of the run at a path in storage, and of the life that this controller leads."""
        return cls(key=hashlib.sha256(f"{controller} {run}".encode()).hexdigest()[:16])

    def name(self, node: str) -> str:
        """The name of the actor on a node."""
        return f"keeper-{self.key}-{node}"

    def handle(self, node: str) -> Any:
        """Raises `ValueError` if there is none."""
        import ray

        return ray.get_actor(self.name(node), namespace=NAMESPACE)

    def handles(self) -> dict[str, Any]:
        """All that live, by node."""
        import ray

        prefix, found = self.name(""), {}
        for actor in ray.util.list_named_actors(all_namespaces=True):
            if actor["namespace"] == NAMESPACE and actor["name"].startswith(prefix):
                node = actor["name"].removeprefix(prefix)
                try:
                    found[node] = self.handle(node)
                except ValueError:
                    continue
        return found

    def held(self) -> Held:
        """What each of them holds."""
        import ray

        asked = {node: h.snapshots.remote() for node, h in self.handles().items()}
        _, late = ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER)
        found = {}
        for node, answer in asked.items():
            if answer in late:
                logger.warning("the keeper of node %s does not answer", node[:8])
                continue
            try:
                found[node] = ray.get(answer)
            except ray.exceptions.RayError as e:
                logger.warning("the keeper of node %s is lost: %s", node[:8], e)
        return found


def whole(held: Held) -> list[str]:
    """Names of the snapshots of which every rank's part is held, the newest step first."""
    ranks: dict[str, set[tuple[int, int]]] = {}
    for snapshots in held.values():
        for name, files in snapshots.items():
            parsed = [p for file in files if (p := parse_name(file)) and p[0] == "manifest"]
            ranks.setdefault(name, set()).update(
                (rank, world_size) for _, rank, world_size in parsed
            )
    found = [name for name, have in ranks.items() if len(have) == max(w for _, w in have)]
    return sorted(found, key=lambda name: (step_of(name), name), reverse=True)


def newest_whole(held: Held, chosen: Callable[[str], bool]) -> str | None:
    """The newest of those that are chosen and of which every rank's part is held."""
    return next((name for name in whole(held) if chosen(name)), None)


def of_attempt(attempt: str) -> Callable[[str], bool]:
    """Whether a snapshot, by its name, is of an attempt."""
    return lambda name: attempt_of(name) == attempt


def attempt_of(name: str) -> str:
    """The attempt that took a snapshot, by its name."""
    match = re.fullmatch(r"checkpoint_[0-9]+_([0-9a-f]{6})[0-9a-f]*", name)
    return match[1] if match else ""
