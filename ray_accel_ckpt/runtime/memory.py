"""The memory tier as a worker sees it: its part of each snapshot, and what is left of others."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ray_accel_ckpt.errors import AccelCkptError
from ray_accel_ckpt.image.frozen import FrozenShare
from ray_accel_ckpt.image.image import Hashing, Image
from ray_accel_ckpt.image.manifest import shard_name
from ray_accel_ckpt.image.shared import SharedSlot
from ray_accel_ckpt.image.staging import SlotPool
from ray_accel_ckpt.memory import MemoryTier
from ray_accel_ckpt.runtime.group import Group
from ray_accel_ckpt.runtime.keeper import Keeper
from ray_accel_ckpt.runtime.keepers import NAMESPACE, Held, Keepers
from ray_accel_ckpt.runtime.kept import Kept, held_of, memory_path
from ray_accel_ckpt.runtime.ray_run import Controller, RayRun
from ray_accel_ckpt.runtime.room import Share, free_on, needs, peers_of
from ray_accel_ckpt.runtime.shelf import KEPT, PREFIX, Shelf
from ray_accel_ckpt.storage.catalog import checkpoint_name
from ray_accel_ckpt.storage.filesystem import LocalFilesystem
from ray_accel_ckpt.storage.writer import write_rest

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  (it is tmpfs that is wanted, and the root is 0700)

REPLICATE = 120.0
"""Seconds that another node has to make a replica. Training may wait for it."""

CALLS = 128
"""Calls that a keeper serves at a time: more than ranks of other nodes that replicate to it."""

START = 120.0
"""Seconds that a keeper has to start: a process that imports torch."""


class Memory:
    """One worker's part of the memory tier.

    Methods that say so are collective: all ranks call them, in the same order.

    Attributes:
        slots: what to freeze into.
        frozen: of what this process has kept.
        on: from `open` on, unless one of the nodes cannot hold its part.
    """

    def __init__(self, tier: MemoryTier, group: Group, run: RayRun, *, slots: int) -> None:
        self.slots = SlotPool(slots, kept=KEPT, make=self._slot)
        self.frozen = FrozenShare()
        self._tier, self._group, self._run = tier, group, run
        self._own_copies = slots + KEPT
        self._attempt = ""
        self.on = self._begun = self._measured = False
        # Nowhere, until its keeper has said where: a root may be removed with all in it.
        self._shelf = Shelf(root=SHARED_MEMORY / PREFIX)
        self._controller = Controller.current()
        self._keepers = Keepers.of(run.path, self._controller.id)
        self._node = ""
        self._keeper: Any = None
        self._nodes: list[str] = []
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ray_accel_ckpt-memory")
        self._last: Future[None] | None = None
        self._pulling: dict[str, Any] = {}
        self._told: set[str] = set()

    def due(self, global_step: int) -> bool:
        """Whether a snapshot is to be taken after this step: the same on every rank."""
        return self.on and self._tier.due(global_step)

    def path_of(self, name: str) -> str:
        """What a snapshot is called."""
        return memory_path(self._run.name, name)

    # --- beginning ---------------------------------------------------------------------

    def open(self, attempt: str) -> None:
        """See that there is a keeper on each node. Collective the first time, then nothing."""
        if self._attempt:
            return
        import ray

        self._attempt = attempt
        self._node = ray.get_runtime_context().get_node_id()
        problem = self._start()
        told = self._group.gather([self._node, problem])
        self._nodes = [node for node, _ in told]
        problems = [f"node {node[:8]}: {each}" for node, each in told if each is not None]
        self.on = not problems
        if problems:
            self._turn_off("; ".join(dict.fromkeys(problems)))

    def kept(self) -> Kept | None:
        """What is there to go on from. Collective, after `open`."""
        if not self.on:
            return None
        told = self._group.from_rank_zero(self._held() if self._group.rank == 0 else None)
        return Kept(self._run.name, str(self._shelf.root), self._keepers, held_of(told))

    def begin(self, resumed: str | None) -> None:
        """Tell the keeper that this worker goes on: what it does not go on from may go.

        Args:
            resumed: the name of the snapshot that was loaded, if it was one of those kept.
        """
        if self.on and not self._begun:
            self._begun = True
            import ray

            begin = self._keeper.begin.remote(self._attempt, resumed, os.getpid())
            try:
                ray.get(begin, timeout=START)
            except ray.exceptions.RayError as e:
                self._warn("this worker's snapshots are not looked after", e)

    def measure(self, nbytes: int, frozen: int) -> None:
        """See that there is room for such shares. Collective the first time, then nothing.

        Args:
            nbytes: of this rank's share that change,
            frozen: and of those that do not: all snapshots have the same file of them.
        """
        if self._measured:
            return
        self._measured = True
        self.begin(None)
        if not self.on:
            return
        told = self._group.gather([nbytes, frozen, self._free()])
        shares = [Share(node, *each[:2]) for node, each in zip(self._nodes, told, strict=True)]
        needed = needs(shares, replicas=self._tier.replicas, copies=self._own_copies)
        short = {
            node: f"node {node[:8]} has {_gb(free)} for it and needs {_gb(needed[node])}"
            for node, (_, _, free) in zip(self._nodes, told, strict=True)
            if free < needed[node]
        }
        if short:
            self._turn_off(f"{SHARED_MEMORY} is too small: {'; '.join(short.values())}")
        elif self._group.rank == 0:
            self._say(max(needed.values()))

    # --- keeping -----------------------------------------------------------------------

    def wait(self) -> None:
        """Wait until the snapshot before is kept, where it is to be kept, or could not be."""
        if self._last is not None:
            self._last.result()

    def keep(self, image: Image, slot: SharedSlot, *, release: Callable[[], None]) -> None:
        """Publish an image that was frozen into one of `slots`, in the background.

        Args:
            release: called when the slot may be filled with something newer.
        """
        if not self.on:
            release()
            return
        self._last = self._writer.submit(self._publish, image, slot, release)

    def _publish(self, image: Image, slot: SharedSlot, release: Callable[[], None]) -> None:
        info = image.info
        name = checkpoint_name(info.step, info.attempt)
        directory = self._shelf.own(info.rank, name)
        try:
            image.wait()
            hashing = Hashing(image)
            for _ in hashing.chunks():
                pass
            if slot.publish(directory, shard_name(info.rank, info.world_size)):
                write_rest(LocalFilesystem(), str(directory), image, hashing, timeout=1.0)
        except _faults() as e:
            # Training goes on: it has lost nothing but a chance.
            slot.withdraw()
            self._warn("a snapshot is not kept in memory", e)
        else:
            self._replicate(info.rank, name)
        finally:
            if not self._shelf.is_there():
                # Its keeper is gone: what was made since would stay for ever.
                self._shelf.clear()
            release()

    def _replicate(self, rank: int, name: str) -> None:
        import ray

        end = time.monotonic() + REPLICATE
        asked = {}
        for node in peers_of(self._node, self._nodes, self._tier.replicas):
            if node in self._pulling and not ray.wait([self._pulling[node]], timeout=0)[0]:
                # It is behind, and not to fall further behind.
                continue
            try:
                pulled = self._keepers.handle(node).pull.remote(self._node, rank, name)
                asked[node] = self._pulling[node] = pulled
            except _faults() as e:
                self._warn(f"node {node[:8]} keeps no replicas", e)
        for node, pulled in asked.items():
            try:
                ray.get(pulled, timeout=max(0.0, end - time.monotonic()))
            except _faults() as e:
                self._warn(f"node {node[:8]} has no replica of a snapshot", e)

    # --- inside ------------------------------------------------------------------------

    def _held(self) -> Held:
        try:
            return self._keepers.held()
        except _faults() as e:
            # Told as nothing, not raised: the others wait for the answer.
            self._warn("what is kept in memory cannot be asked for", e)
            return {}

    def _free(self) -> int:
        """Bytes of shared memory that this worker's node has for the run."""
        try:
            return free_on(self._node, SHARED_MEMORY) + self._shelf.taken(self._attempt)
        except _faults() as e:
            # Told as nothing, not raised: the others wait for the answer.
            self._warn("whether there is memory for snapshots cannot be found out", e)
            return 0

    def _slot(self, number: int) -> SharedSlot:
        def place() -> Path | None:
            return self._shelf.slot(self._attempt, self._group.rank, number) if self.on else None

        return SharedSlot(place)

    def _start(self) -> str | None:
        """Find this node's keeper, or make it. Returns why there can be none."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if not SHARED_MEMORY.is_dir():
            return f"there is no {SHARED_MEMORY} here"
        root = SHARED_MEMORY / f"{PREFIX}{self._keepers.key}-{self._node[:12]}"
        try:
            # What keepers know the death of a worker by; Linux has it since 5.3.
            os.close(os.pidfd_open(os.getpid()))
            self._keeper = (
                ray.remote(Keeper)
                .options(
                    name=self._keepers.name(self._node),
                    namespace=NAMESPACE,
                    lifetime="detached",
                    get_if_exists=True,
                    num_cpus=0,
                    max_concurrency=CALLS,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(self._node, soft=False),
                )
                .remote(str(root), self._node, self._run, self._keepers, self._controller)
            )
            self._shelf = Shelf(
                root=Path(ray.get(self._keeper.open.remote(self._attempt), timeout=START))
            )
        except _faults() as e:
            # Told, not raised: the others wait for the answer.
            return f"{type(e).__name__}: {e}"
        return None

    def _turn_off(self, why: str) -> None:
        self.on = False
        self.slots.keep_nothing()
        if self._group.rank == 0:
            logger.warning(
                "no snapshots are kept in memory, and a restart reads storage: %s. In Kubernetes, "
                "mount an emptyDir with medium: Memory at %s, and count it in the memory limit",
                why,
                SHARED_MEMORY,
            )

    def _say(self, nbytes: int) -> None:
        logger.info(
            "keeping a snapshot in memory every %d steps, a copy of each node's part on %d of %d "
            "other nodes; this takes up to %s of %s on a node",
            self._tier.every_steps,
            len(peers_of(self._node, self._nodes, self._tier.replicas)),
            len(set(self._nodes)) - 1,
            _gb(nbytes),
            SHARED_MEMORY,
        )

    def _warn(self, what: str, why: Exception) -> None:
        """Once for each kind of fault: it may come with each snapshot."""
        key = f"{what} {type(why).__name__}"
        if key not in self._told:
            self._told.add(key)
            logger.warning("%s: %s: %s", what, type(why).__name__, why)


def _faults() -> tuple[type[Exception], ...]:
    """What may go wrong with memory, with Ray or with what is on another node."""
    import ray

    own = (AccelCkptError, OSError, ValueError, LookupError, AttributeError, RuntimeError)
    return (*own, ray.exceptions.RayError)


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
