"""Which nodes have copies of what, and how much shared memory that takes."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ray_accel_ckpt.runtime.shelf import KEPT


class Share(NamedTuple):
    """One rank's part of a snapshot: bytes that change from one to the next, and that do not."""

    node: str
    changing: int
    frozen: int


def peers_of(node: str, nodes: Sequence[str], replicas: int) -> list[str]:
    """The nodes that have copies of what a node has: the next ones in the order of ranks.

    Args:
        nodes: each rank's.
    """
    distinct = list(dict.fromkeys(nodes))
    at = distinct.index(node)
    return [*distinct[at + 1 :], *distinct[:at]][:replicas]


def needs(shares: Sequence[Share], *, replicas: int, copies: int) -> dict[str, int]:
    """Bytes that each node needs for its own ranks' shares and for others' replicas.

    Args:
        shares: by rank.
        copies: of its own that a rank has at most.
    """
    nodes = [share.node for share in shares]
    needed: dict[str, int] = defaultdict(int)
    for node, changing, frozen in shares:
        # Of what does not change, another one may come before the one before is gone.
        needed[node] += copies * changing + 2 * frozen
        for peer in peers_of(node, nodes, replicas):
            needed[peer] += (KEPT + 1) * changing + 2 * frozen
    return dict(needed)


def free_on(node: str, directory: Path) -> int:
    """Bytes that are free in shared memory on this node, beside Ray's object store.

    That is in it too, and takes its memory when it is used: what it may take is not free.

    Args:
        node: Ray's id of it.
    """
    import ray

    known = [each for each in ray.nodes() if each["NodeID"] == node]
    objects = sum(int(each["Resources"].get("object_store_memory", 0)) for each in known)
    return max(0, shutil.disk_usage(directory).free - objects)
