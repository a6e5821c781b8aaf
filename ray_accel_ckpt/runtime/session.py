"""What the ranks agree on once: who they are, where checkpoints lie, seed and attempt."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import torch

from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.image.frozen import FrozenShare
from ray_accel_ckpt.image.planned import Plans
from ray_accel_ckpt.memory import MemoryTier
from ray_accel_ckpt.project import ProjectConfiguration
from ray_accel_ckpt.runtime.group import Group
from ray_accel_ckpt.runtime.kept import Kept
from ray_accel_ckpt.runtime.memory import Memory
from ray_accel_ckpt.runtime.ray_run import (
    RayRun,
    Registered,
    current_run,
    in_local_mode,
    ray_world_size,
)
from ray_accel_ckpt.runtime.sweep import Sweeper
from ray_accel_ckpt.storage.background import BackgroundWriter
from ray_accel_ckpt.storage.filesystem import Filesystem, resolve
from ray_accel_ckpt.storage.naming import AutomaticNames, newest_whole

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ATTEMPTS: set[str] = set()
"""Of all Checkpointers of this process: what one sweeps, another may be saving."""


class Session:
    """One life of one worker.

    Attributes:
        run: the Ray Train run, or None without storage of Ray's.
        attempt: six hex digits drawn anew by each life of the group.
        seed: of data orders and augmentation.
        memory: the memory tier, if it is wanted; None in Ray's local mode.
        timeout: seconds that passing storage errors are retried for.
        loaded: whether a state was loaded.

    Raises:
        ConfigurationError: saves are wanted and there is nowhere to put them, or
            there are two places, or a memory tier is wanted where there is no Ray.
    """

    def __init__(
        self,
        *,
        project: ProjectConfiguration | None,
        seed: int | None,
        timeout: float,
        saves: bool,
        memory: MemoryTier | None = None,
        slots: int = 2,
    ) -> None:
        self.run: RayRun | None = current_run()
        self.project = project or ProjectConfiguration()
        self.group = Group()
        self.timeout = timeout
        self.writer = BackgroundWriter(timeout=timeout)
        self.attempt = ""
        self._workers = 0
        self.seed = 0
        self._given_seed = seed
        self.plan_checked = False
        self.loaded = False
        self.plans = Plans()
        self.frozen = FrozenShare()
        self.told_of_local_mode = False
        self._latest, self._turns = -1, 0
        self.memory: Memory | None = None
        self._names: AutomaticNames | None = None
        self._shared = False
        self._sweeper: Sweeper | None = None
        self._being_written: set[str] = set()
        checkpoints = self.project.checkpoints_dir
        if self.run is not None and checkpoints is not None:
            raise ConfigurationError(
                "automatic_checkpoint_naming has no place in a Ray Train run",
                why="there, checkpoints go to the run's storage_path and Ray names them",
                remedy="leave project_config out; num_to_keep of run_config limits their number",
            )
        if saves and self.run is None and checkpoints is None and not in_local_mode():
            raise ConfigurationError(
                "save= is given, but there is nowhere to save to",
                why="this process is no worker of a Ray Train run",
                remedy="pass project_config=ProjectConfiguration('dir', "
                "automatic_checkpoint_naming=True)",
            )
        if memory is not None and self.run is not None:
            self.memory = Memory(memory, self.group, self.run, slots=slots)
        elif memory is not None and not in_local_mode():
            raise ConfigurationError(
                "memory= is given, but there is nobody to keep snapshots",
                why="this process is no worker of a Ray Train run, and only Ray's nodes outlive it",
                remedy="leave memory= out",
            )

    def agree(self) -> None:
        """Take rank 0's attempt and seed. Collective the first time, nothing after that.

        Raises:
            ConfigurationError: the peers cannot be heard, or are others than the first time.
        """
        if self.attempt:
            self._require_same_group()
            return
        if self.run is not None and ray_world_size() != self.group.world_size:
            raise ConfigurationError(
                f"Ray Train has {ray_world_size()} workers, torch.distributed knows "
                f"{self.group.world_size}",
                why="no process group was set up",
                remedy="use TorchTrainer, which sets one up before the loop begins",
            )
        _require_group_of_torchrun(self.group)
        self._workers = self.group.world_size
        seed = torch.initial_seed() if self._given_seed is None else self._given_seed
        self.attempt, self.seed = self.group.from_rank_zero([secrets.token_hex(3), seed])
        _ATTEMPTS.add(self.attempt)
        if self.memory is not None:
            self.memory.open(self.attempt)

    def _require_same_group(self) -> None:
        """What peers save who have not agreed with each other is no checkpoint of all."""
        if self.group.world_size == self._workers:
            return
        raise ConfigurationError(
            f"there were {self._workers} workers, and now there are {self.group.world_size}",
            why="the process group was set up after this Checkpointer's first prepare() or "
            "load_state(), or destroyed since: workers would save as if each were alone",
            remedy="call torch.distributed.init_process_group() before, and "
            "destroy_process_group() after the last save",
        )

    def agreed(self, work: Callable[[], T]) -> T:
        """What `work`, which saves, returns; its failure on one rank is that of all.

        Not in a Ray run: there the failure of one ends the attempt of all, and the others may
        be waiting for it in Ray's `report`.
        """
        return work() if self.run is not None else self.group.agreed(work)

    def first(self, work: Callable[[], T]) -> T:
        """What `work` returns: what comes before the plans of the group's first save are compared.

        Until they are, its failure on one rank is that of all, which would wait for that rank.
        """
        return work() if self.plan_checked else self.group.agreed(work)

    def next_save_id(self, step: int) -> str:
        """What names one save of a step: the attempt, and how often a loop has not gone on.

        It stays where it is, or goes back by `load_state`: of two saves of one step, the later
        one has the greater number.
        """
        self._turns += step <= self._latest
        self._latest = step
        return self.attempt + (f"{self._turns:02x}" if self._turns else "")

    @cached_property
    def _project_place(self) -> tuple[Filesystem, str] | None:
        directory = self.project.checkpoints_dir
        return None if directory is None else resolve(directory)

    def source(self, input_dir: str | os.PathLike[str] | None) -> tuple[Filesystem, str] | None:
        """Where `load_state` looks: a checkpoint if `input_dir` is given, else a run's directory.

        Raises:
            ConfigurationError: nothing is given outside Ray.
        """
        if input_dir is not None:
            return resolve(input_dir)
        if self.run is not None:
            return self.run.filesystem, self.run.path
        if self._project_place is not None:
            return self._project_place
        if in_local_mode():
            return None
        raise ConfigurationError(
            "load_state() has no directory to look in",
            why="this process is no worker of a Ray Train run",
            remedy="load_state('some/dir'), or give the Checkpointer a project_config with "
            "automatic_checkpoint_naming=True",
        )

    def flush(self) -> None:
        """Wait until what is written without Ray is where it is to be.

        Raises:
            StorageError: what a save in the background failed with.
        """
        try:
            self.writer.flush()
        finally:
            if self.memory is not None:
                self.memory.wait()

    def registered(self) -> Registered:
        """What Ray knows of the run's checkpoints; nothing without Ray.

        Collective: rank 0's answer, since Ray's differs between ranks once they have reported.

        Raises:
            StorageError: Ray's record of the run cannot be read.
        """
        run = self.run
        if run is None:
            return Registered()

        def asked() -> tuple[Any, ...]:
            found = run.registered()
            return found.names, found.metrics

        names, metrics = self.group.of_rank_zero(asked)
        return Registered(names=tuple(names), metrics=metrics)

    def kept(self) -> Kept | None:
        """What the memory tier has of the run; None without one. Collective."""
        kept = None if self.memory is None else self.memory.kept()
        # Keepers may be writing what these left: not to be swept before something newer is saved.
        self._being_written = set() if kept is None else kept.attempts()
        _ATTEMPTS.update(self._being_written)
        return kept

    def begin_sweeping(self, *, resumed_from: str | None, registered: str | None) -> None:
        """Let rank 0 remove, in the background, what earlier attempts left in the run."""
        if self.run is None or self.group.rank != 0 or self._sweeper is not None:
            return
        self._sweeper = Sweeper(
            self.run, living=_ATTEMPTS, resumed_from=resumed_from, registered=registered
        )
        self._sweeper.start()

    def sweep(self) -> None:
        """Something is saved: look again what has become superfluous. Returns at once."""
        _ATTEMPTS.difference_update(self._being_written)
        if self._sweeper is not None:
            self._sweeper.start()

    def next_automatic(self) -> tuple[Filesystem, str] | None:
        """The next automatic name, rank 0's on every rank; None without automatic naming.

        Raises:
            StorageError: rank 0 could not find out, or not make its directory.
            ConfigurationError: at the first save: some rank does not see that directory.
        """
        if self._project_place is None:
            return None
        filesystem, path = self._project_place
        first = self._names is None
        names = self._names or AutomaticNames(filesystem, path, at_least=self.project.iteration)
        self._names = names

        def take() -> tuple[str, bool]:
            if first and not self.loaded:
                self._warn_of_earlier(filesystem, path)
            return names.take()

        name, made = self.group.of_rank_zero(take)
        if made and not self._shared:
            self.group.agreed(lambda: None if self.group.rank == 0 else names.require_shared(name))
            self._shared = True
        return filesystem, str(name)

    def _warn_of_earlier(self, filesystem: Filesystem, directory: str) -> None:
        """What is saved now will be taken for the newest, and may displace what is there."""
        earlier = newest_whole(filesystem, directory)
        if earlier is None:
            return
        limit = self.project.total_limit
        logger.warning(
            "%s holds checkpoints of earlier training, the newest %s of step %d, and nothing was "
            "loaded: training began anew, and what it saves counts as newer%s. To go on from "
            "there, call load_state() before the loop; to begin anew, use another project_dir",
            directory,
            earlier.where.rpartition("/")[2],
            earlier.step,
            "" if limit is None else f"; total_limit={limit} removes the earlier ones",
        )


def _require_group_of_torchrun(group: Group) -> None:
    """Raise `ConfigurationError` if `torchrun` has started peers that this process cannot hear."""
    launched = os.environ.get("WORLD_SIZE", "1") if "TORCHELASTIC_RUN_ID" in os.environ else "1"
    if launched != "1" and group.world_size == 1:
        raise ConfigurationError(
            f"torchrun has started {launched} processes, and this one knows of no other",
            why="no process group was set up: each would train and save as if it were alone",
            remedy="call torch.distributed.init_process_group() before prepare() and load_state()",
        )
