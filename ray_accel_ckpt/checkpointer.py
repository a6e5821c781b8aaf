"""Checkpointer: the one object a training loop talks to."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.hooks import RemovableHandle

from ray_accel_ckpt.arguments import texts, whole_number
from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.image.staging import SlotPool
from ray_accel_ckpt.memory import MemoryTier
from ray_accel_ckpt.policy import SavePolicy, TimePolicy, require_policy
from ray_accel_ckpt.project import ProjectConfiguration
from ray_accel_ckpt.runtime.adopt import adopt, require_accelerator
from ray_accel_ckpt.runtime.chronicle import Chronicle
from ray_accel_ckpt.runtime.exchange import exchange_for
from ray_accel_ckpt.runtime.heartbeat import Heartbeat
from ray_accel_ckpt.runtime.lives import Lives
from ray_accel_ckpt.runtime.options import require_options
from ray_accel_ckpt.runtime.prepare import Preparer
from ray_accel_ckpt.runtime.refusals import refuse_containers
from ray_accel_ckpt.runtime.report import Metrics, require_metrics
from ray_accel_ckpt.runtime.restore import Restored
from ray_accel_ckpt.runtime.resume import Resumer
from ray_accel_ckpt.runtime.saver import Saver
from ray_accel_ckpt.runtime.session import Session
from ray_accel_ckpt.runtime.sinks import Sink, memory_sink, sink_for
from ray_accel_ckpt.state.bundle import StateBundle, require_stateful
from ray_accel_ckpt.state.dealing import require_global_batch_size
from ray_accel_ckpt.state.hooks import Hooks, LoadHook, SaveHook
from ray_accel_ckpt.state.loader import PreparedLoader
from ray_accel_ckpt.state.parts import ProgressPart
from ray_accel_ckpt.state.passes import EpochWatch
from ray_accel_ckpt.state.rng import SEEDS
from ray_accel_ckpt.state.scaling import ScalerPart
from ray_accel_ckpt.state.skipping import SkippedLoader
from ray_accel_ckpt.storage.filesystem import Filesystem

_NO_SEED = "pass an int, seed=42 say; without, torch.initial_seed() decides"
_EPOCHS = "epochs(3), say; the epochs of earlier lives are among them"


class Checkpointer:
    """Saves all that a training loop is made of, and brings it back bit for bit.

    Made inside `train_loop_per_worker`, or in a plain script, or in one under
    `torchrun` that sets up its process group. Every rank makes one and calls its
    methods in the same order.

    Args:
        save: when `step` saves: ``EverySteps(50)``, ``EverySeconds(600)``,
            ``MaxOverhead(0.01)``. None: only `save_state` does, and a notice of
            preemption.
        project_config: where checkpoints go without Ray (Accelerate's
            `ProjectConfiguration`). In a Ray Train run they go to the run's own
            storage, and this must be left out.
        scaler: a `torch.amp.GradScaler` for `backward` and the prepared
            optimizers' `step` to use, which then skips infinite gradients; it is saved
            too. ``scaler.unscale_(optimizer)`` may come before a step, its own `step` and
            `update` are not called by the loop. The scale is updated when all prepared
            optimizers have stepped, or before the next `backward`: so gradients of one
            backward are unscaled by its scale, and a GAN's optimizers need not wait for
            each other.
        seed: what data orders and augmentation are drawn from. None: rank 0's
            `torch.initial_seed()` at the first `prepare`, so `torch.manual_seed`
            before that decides.
        slots: staging buffers on the host, each as large as this rank's share.
            A save waits when none is free.
        overlap: whether a save may go on copying parameters and optimizer state while the
            next forward and backward run, until an optimizer steps. Whatever else writes
            them meanwhile makes a `TornSnapshotError`, if torch counts the write. It does
            not count what goes through ``tensor.data``, collectives, replayed CUDA graphs
            and extensions: loops that write so must not overlap.
        memory: ``MemoryTier(every_steps=1)`` keeps snapshots in the nodes' memory too, so that
            a restart loses little and reads no storage. A snapshot costs training what a save
            does; one waits until the one before is where it is to be.
        broadcast: whether `load_state` has what all workers need read once by all of them
            together, each its part, and broadcast over the training's group. False: each worker
            reads all it needs. That spares the group, and takes the storage's answers and host
            memory for the whole model on each worker instead of for a part of it: for files that
            are in the cache or on the disk of each node. All workers must say the same.
        storage_timeout: seconds that throttling, resets and 5xx are retried
            for, in the background, before the save fails.
        ddp_kwargs: passed to `DistributedDataParallel`.

    Raises:
        ConfigurationError: an argument that cannot work.
    """

    def __init__(
        self,
        *,
        save: SavePolicy | None = None,
        project_config: ProjectConfiguration | None = None,
        scaler: torch.amp.GradScaler | None = None,
        seed: int | None = None,
        slots: int = 2,
        overlap: bool = False,
        memory: MemoryTier | None = None,
        broadcast: bool = True,
        storage_timeout: float = 600.0,
        ddp_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if save is not None:
            require_policy(save)
        require_options(project_config, scaler, storage_timeout, ddp_kwargs)
        if seed is not None:
            seed = whole_number("seed", seed, least=SEEDS[0], most=SEEDS[1], remedy=_NO_SEED)
        for name, given in (("overlap", overlap), ("broadcast", broadcast)):
            if not isinstance(given, bool):
                raise ConfigurationError(f"{name} must be True or False, not {given!r}")
        if memory is not None and not isinstance(memory, MemoryTier):
            raise ConfigurationError(f"memory must be a MemoryTier or None, not {memory!r}")
        self.scaler = scaler
        self.resumed_from: str | None = None
        self._policy = save
        self._session = Session(
            project=project_config,
            seed=seed,
            timeout=storage_timeout,
            saves=save is not None,
            memory=memory,
            slots=slots,
        )
        kept = self._session.memory
        self._slots = SlotPool(slots) if kept is None else kept.slots
        self._lives = Lives()
        self._global_step = 0
        self._chronicle = Chronicle(self._session, step=lambda: self._global_step, policy=save)
        self._heartbeat = Heartbeat(
            exchange_for(self._session, save),
            save,
            mtbf=self._lives.mtbf,
            noticed=self._chronicle.noticed,
        )
        self._epoch = 0
        self._in_epochs = self._gone_back = False
        self._saved_at: tuple[int, int] | None = None
        self._last_metrics: Metrics = None
        self._hooks = Hooks()
        self._bundle = StateBundle()
        self._bundle.add(ProgressPart(self._progress, self._set_progress))
        self._scaling = None if scaler is None else ScalerPart(scaler)
        if self._scaling is not None:
            self._bundle.add(self._scaling)
        self._preparer = Preparer(
            self._bundle, self._session, scaling=self._scaling, ddp_kwargs=ddp_kwargs or {}
        )
        self._resumer = Resumer(
            session=self._session,
            bundle=self._bundle,
            hooks=self._hooks,
            preparer=self._preparer,
            slots=self._slots,
            broadcast=broadcast,
        )
        self._watch = EpochWatch(lambda: self._bundle.of_type(PreparedLoader))
        self._saver = Saver(
            session=self._session,
            bundle=self._bundle,
            hooks=self._hooks,
            preparer=self._preparer,
            slots=self._slots,
            heartbeat=self._heartbeat,
            chronicle=self._chronicle,
            watch=self._watch,
            overlap=overlap,
        )

    @classmethod
    def from_accelerator(cls, accelerator: Any, **options: Any) -> Self:
        """A checkpointer of everything that an `accelerate.Accelerator` holds.

        Its prepared models, optimizers, schedulers and loaders, its scaler, its registered
        objects and hooks become part of the state where they are: the loop keeps its
        variables, and all of `accelerator` goes on working but for `save_state`, `load_state`
        and `skip_first_batches`, which say what to use instead. Loaders go on at their
        batch after `load_state`. Collective when there are peers.

        To be called after the last ``accelerator.prepare`` and
        ``accelerator.register_for_checkpointing``. What comes later is found at the
        next load or save, which is refused then.

        Args:
            accelerator: one whose models are plain, under DDP, or sharded by FSDP2.
            options: as `Checkpointer` takes them, but for `scaler` and `ddp_kwargs`.

        Raises:
            ConfigurationError: an object that cannot be adopted; nothing was prepared yet;
                the accelerator knows of other peers than there are; options that cannot work.
        """
        require_accelerator(accelerator, options)
        ckpt = cls(scaler=accelerator.scaler, **options)
        adopt(
            accelerator,
            bundle=ckpt._bundle,
            session=ckpt._session,
            preparer=ckpt._preparer,
            hooks=ckpt._hooks,
        )
        return ckpt

    # --- where the loop stands ---------------------------------------------------------

    @property
    def global_step(self) -> int:
        """Calls of `step` since the run's very first start."""
        return self._global_step

    @property
    def epoch(self) -> int:
        """The epoch under way; without `epochs`, the first prepared loader's."""
        loaders = self._bundle.of_type(PreparedLoader)
        if self._in_epochs or not loaders:
            return self._epoch
        cursor = loaders[0].cursor
        return cursor.epoch + cursor.ended

    @property
    def device(self) -> torch.device:
        """Where prepared models and batches are."""
        return self._preparer.device

    # --- setting up --------------------------------------------------------------------

    def prepare(
        self,
        *objects: Any,
        global_batch_size: int | None = None,
        data_mesh: DeviceMesh | None = None,
    ) -> Any:
        """Make models, optimizers, loaders and schedulers part of the state.

        Models move to this worker's device and are wrapped for data
        parallelism, unless they are sharded already (`fully_shard`, tensor
        parallel plans). Loaders, and what `iter_torch_batches` of a Ray Data
        shard returns, become resumable; loaders serve this worker's share.
        Optimizers step through the scaler if there is one. They, and anything
        else, are returned as they are. Collective when there are peers.

        A model built on the meta device gets memory here, and first values from its
        modules' `reset_parameters`. What has none must be loaded before it is used;
        parameters keep their identity, so the optimizer may be made before.

        Args:
            global_batch_size: samples of one batch over all workers, for the
                loaders among `objects`, however many workers there are. Their
                own batch size is then not used. Workers' batches may differ in
                size by one: `backward` weighs losses accordingly. None: each
                worker's batches are of the loader's own size.
            data_mesh: the mesh that map-style data is dealt out over, for the
                loaders among `objects`: with tensor parallelism ``mesh["dp"]``,
                so that the ranks of one tensor parallel group get the same
                batches. None: every worker gets batches of its own.

        Returns:
            The prepared objects in the order given; the object itself if it is one.

        Raises:
            ConfigurationError: an object that cannot be prepared as it is, one
                that is sharded in a way that is not read among them, or a list,
                tuple or dict of such objects.
            UnsupportedStateError: a parameter whose shards are not boxes of a
                mesh over all workers.
        """
        refuse_containers(objects)
        if global_batch_size is not None:
            workers = self._session.group.world_size if data_mesh is None else data_mesh.size()
            require_global_batch_size(global_batch_size, objects, world_size=workers)
        prepared = tuple(
            self._preparer.prepare(obj, global_batch_size=global_batch_size, data_mesh=data_mesh)
            for obj in objects
        )
        return prepared[0] if len(prepared) == 1 else prepared

    def register_for_checkpointing(
        self, *objects: Any, per_rank: bool = False, **named: Any
    ) -> None:
        """Make anything with `state_dict` and `load_state_dict` part of the state.

        Args:
            objects: saved under the name of their class.
            per_rank: each worker's state is its own. Otherwise rank 0's is saved
                and comes back on every worker.
            named: saved under the keyword, needed for two objects of one class.

        Raises:
            ConfigurationError: a `ValueError`, naming every object that lacks
                one of the two methods, or a name that is taken.
        """
        require_stateful([*objects, *named.values()])
        for name, obj in [*((None, obj) for obj in objects), *named.items()]:
            self._bundle.add_object(name, obj, kind="object", per_rank=per_rank)

    def register_save_state_pre_hook(self, hook: SaveHook) -> RemovableHandle:
        """Call ``hook(models, weights, output_dir)`` on every rank before each save.

        Also before each snapshot of the memory tier; `output_dir` begins with ``memory://``
        then, and is no place to write to.

        `weights` is a list of state dicts; what a hook takes out of one, or out
        of the list, is not saved. Every rank must take out the same. To put something
        in, or another dict in the place of one, is a `ConfigurationError` of the save.
        """
        return self._hooks.add_save(hook)

    def register_load_state_pre_hook(self, hook: LoadHook) -> RemovableHandle:
        """Call ``hook(models, input_dir)`` on every rank before each load.

        A model that a hook takes out of the list is left to the hook to load.
        """
        return self._hooks.add_load(hook)

    def skip_first_batches(self, dataloader: Any, num_batches: int = 0) -> SkippedLoader:
        """The loader without the first batches of its epoch, for one epoch.

        Not needed to resume: prepared loaders go on by themselves. For
        map-style data nothing that is skipped is read; iterable data is read
        and dropped. A prepared loader counts from the beginning of its epoch.

        Raises:
            ConfigurationError: what is no number of batches.
        """
        num_batches = whole_number("num_batches", num_batches, least=0, remedy="0 skips none")
        return SkippedLoader(dataloader, num_batches)

    # --- the loop ----------------------------------------------------------------------

    def epochs(self, num_epochs: int) -> Iterator[int]:
        """Count epochs, beginning with the one that was under way when the state was saved.

        After the last one the end is saved, if saves are on, so that the run's
        latest checkpoint is its result and a finished run started again ends at once.

        After a `load_state` inside of an epoch, passes under way end at their next batch, and
        the epoch comes next that was under way in what was loaded.

        Raises:
            ConfigurationError: what is no number of epochs.
        """
        return self._epochs(whole_number("num_epochs", num_epochs, least=0, remedy=_EPOCHS))

    def _epochs(self, num_epochs: int) -> Iterator[int]:
        if self._in_epochs and self._watch.done():
            # A loop before this one was left by `break` in an epoch whose data was gone through.
            self._epoch += 1
        self._in_epochs = True
        while self._epoch < num_epochs:
            self._watch.begin()
            self._gone_back = False
            yield self._epoch
            # Where a load has gone to is still to come, unless its pass was gone through since.
            if not self._gone_back or self._watch.done():
                self._epoch += 1
        # An epoch of its own, without data: what is saved now belongs to the end.
        self._watch.begin()
        self.finish()

    def finish(self) -> None:
        """Save the end, if saves are on and it is not saved yet, and flush.

        Every rank must call it; `epochs` does. A loop that counts its epochs in another way
        calls it when it is over, so that the latest checkpoint is its result. An end that
        could not be saved is saved when all call it again.

        A run that an exception broke off is not at its end. In an except or finally
        clause this saves the position, as `save_state` does.

        Raises:
            StorageError, TornSnapshotError: as `flush`, on every rank if on one.
        """
        broken_off = self._watch.broken_off()
        if not (broken_off or self._in_epochs):
            self._watch.begin()
        agreed = self._session.agreed
        with self._watch.as_left():
            saved = self._policy is None or self._is_saved()
        if not saved:
            agreed(lambda: self._save(self._sink(), self._last_metrics))
        agreed(self.flush)
        if not broken_off:
            self._chronicle.end()

    @property
    def loss_weight(self) -> float:
        """What this rank's loss of the latest batch counts in the mean over ranks.

        1, unless the workers' shares of that batch differ in size (with
        `global_batch_size`) or this one's is padding: then the gradient that
        data parallelism averages is that of the mean over the whole batch only
        if each rank's mean loss is multiplied by this. `backward` does so; a
        loop that calls ``loss.backward()`` itself multiplies by it.
        """
        return self._watch.loss_weight()

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """``loss.backward(**kwargs)``, weighed by `loss_weight`, scaled if there is a scaler.

        Args:
            loss: a mean over the samples of the latest batch.
        """
        weight = self.loss_weight
        weighed = loss if weight == 1 else loss * weight
        scaled = self._scaling.scale(weighed) if self._scaling is not None else weighed
        scaled.backward(**kwargs)  # type: ignore[no-untyped-call]

    def step(self, metrics: Metrics = None) -> None:
        """Count a step; save if one is due, or if a node of this group is going to be taken away.

        Every rank must call it, equally often: every few steps it is collective
        (`heartbeat`). A save blocks for copying this rank's share (with `overlap`, for
        beginning to), plus waiting for a slot if all are still being written; the rest
        happens in the background.

        Args:
            metrics: a dict, or a function that returns one and is called only
                when a save is reported to Ray. numpy and torch scalars become
                numbers. A save to a directory has nobody to report to.

        Raises:
            UnsupportedStateError: a state that cannot be represented.
            ConfigurationError: a metric that is no plain value, or `metrics` that are
                neither a dict nor a function.
        """
        require_metrics(metrics)
        self._global_step += 1
        self._watch.stepped()
        self._last_metrics = metrics
        if self._heartbeat.after_step(self._global_step):
            self._save(self._sink(), metrics)
        else:
            self._save(memory_sink(self._session, step=self._global_step), None)

    def heartbeat(self) -> None:
        """Ask for notices of preemption where no steps are counted: in a long evaluation.

        To be called once a batch, say, and by every rank equally often: some of
        the calls are collective. In a Ray Train run, calls are made a few times a
        second at most so that they cost less than 0.5 % of the time, and at least
        every 5 s as long as they come steadily; of the others each costs nothing.
        A save that is due is made here, of the state as it is now.

        Raises:
            UnsupportedStateError, ConfigurationError: as `step` does.
        """
        if self._heartbeat.tick() and not self._is_saved():
            self._save(self._sink(), self._last_metrics)

    # --- saving and loading ------------------------------------------------------------

    def save_state(
        self, output_dir: str | os.PathLike[str] | None = None, *, metrics: Metrics = None
    ) -> str:
        """Save now. Every rank must call it.

        In a Ray Train run without `output_dir`, the save is reported to Ray and
        written in the background. Otherwise this returns when this rank's
        share is durable; the checkpoint is whole when all ranks have returned.

        A pass over a loader that was left by `break` is over: a run resumed from here
        goes on with the next one. In the except or finally clause of the exception that
        left it, the position in it is saved, after the batch that was in hand, and the
        rest of the state as it is: half a step, if that was under way. After the clause
        the pass is over as after `break`.

        Args:
            output_dir: a new directory or a URI. None: the Ray run's storage, or
                the next automatic name of the project.

        Returns:
            The checkpoint's path.

        Raises:
            CheckpointExistsError: another checkpoint is there. Nothing is overwritten.
            StorageError: what storage refused.
            ConfigurationError: there is nowhere to save to, or what is no path, or no metrics.
        """
        require_metrics(metrics)
        sink = self._sink(output_dir)
        if sink is None:
            raise ConfigurationError(
                "there is nowhere to save to",
                why="this is no Ray Train run with storage, and no directory was given",
                remedy="save_state('some/dir'), or Checkpointer(project_config="
                "ProjectConfiguration('dir', automatic_checkpoint_naming=True))",
            )
        path = self._save(sink, metrics)
        self.flush()
        return path

    def load_state(
        self,
        input_dir: str | os.PathLike[str] | None = None,
        *,
        parts: tuple[str, ...] | None = None,
        strict: bool = True,
    ) -> bool:
        """Bring back a state, all of it or none. Every rank must call it.

        Call it last before the loop: the random streams are restored by it. What was saved
        without Ray is awaited first, so that the newest is found.

        Args:
            input_dir: a checkpoint, loaded or an error. None: the newest good one
                of the Ray run or of the project; bad ones are passed over with
                a warning.
            parts: names for a partial start, e.g. ``("model",)``. Counters, data
                position and random streams then start anew, unless named.
            strict: False takes what fits and warns about the rest.

        Returns:
            True if a state was loaded, False if there is none yet.

        Raises:
            StateMismatchError: the checkpoint is of another state; nothing was changed.
            NoUsableCheckpointError: there are checkpoints and none is good.
            CheckpointError: what is wrong with `input_dir`.
            StorageError: storage cannot be read, or a save before failed and nobody was told:
                then nothing was loaded, and the next call loads.
            TornSnapshotError: as `flush`.
            ConfigurationError: `parts` that are no names or not registered, or what is no path.
        """
        only = None if parts is None else texts("parts", parts, remedy='parts=("model",)')
        self._session.agree()
        self._session.group.agreed(self.flush)
        place = self._session.source(input_dir)
        if place is None:
            return False
        filesystem, path = place
        registered = self._session.registered()
        begin = time.perf_counter()
        kept = self._session.kept() if input_dir is None else None
        with self._resumer.restorer(filesystem, only=only, strict=strict) as restorer:
            restored = (
                restorer.newest(path, registered=registered.names, kept=kept)
                if input_dir is None
                else restorer.exactly(path)
            )
        self._session.loaded |= restored is not None
        if input_dir is None:
            self._begin_life(filesystem, path, restored, registered.latest)
            self._chronicle.begin(restored, seconds=time.perf_counter() - begin)
            # For an end that is saved without a step: without a score Ray may rank it best.
            self._last_metrics = self._last_metrics or registered.metrics
        elif restored is not None:
            self._chronicle.loaded(restored, seconds=time.perf_counter() - begin)
        if restored is not None and only is None:
            self._resumer.settle(restored, filesystem)
            self.resumed_from = restored.path
        if restored is not None:
            ray = self._session.run is not None
            newest = restored.name == registered.latest if ray else input_dir is None
            # Of a part, or not from what the run's result is as yet: the end must be saved too.
            saved = only is None and newest
            self._saved_at = (self._global_step, self._epoch) if saved else None
        return restored is not None

    def flush(self) -> None:
        """Wait until nothing that this rank saved without Ray is being written any more.

        If it returns, all of it since the last error is durable. With `memory`, also the latest
        snapshot is kept where it is to be, or a warning said why not. Ray waits itself for what
        was reported to it, at the end of its loop.

        Raises:
            StorageError: what a save in the background failed with; what later ones failed
                with are its notes. Told once: by this, or by the call that saves or loads next.
            TornSnapshotError: see `overlap`.
        """
        with self._doubting():
            self._saver.flush()

    # --- inside ------------------------------------------------------------------------

    def _position(self) -> tuple[int, int]:
        """(step, epoch) as a save now would hold them."""
        ended = self._in_epochs and self._watch.done()
        return self._global_step, self.epoch + ended

    def _progress(self) -> dict[str, int]:
        step, epoch = self._position()
        return {"global_step": step, "epoch": epoch, "seed": self._session.seed}

    def _set_progress(self, *, global_step: int, epoch: int, seed: int) -> None:
        self._global_step, self._epoch = global_step, epoch
        self._session.seed = seed
        self._gone_back = True

    def _sink(self, output_dir: str | os.PathLike[str] | None = None) -> Sink | None:
        self._session.agree()
        return sink_for(self._session, output_dir, step=self._global_step)

    def _save(self, sink: Sink | None, metrics: Metrics) -> str:
        if sink is None:
            return ""
        with self._watch.as_left(), self._doubting():
            step, epoch = self._position()
            self._saver.save(sink, step=step, epoch=epoch, metrics=metrics)
        if sink.of_run:
            self._saved_at = (step, epoch)
        return sink.path

    @contextmanager
    def _doubting(self) -> Iterator[None]:
        """An error may be what the last save failed with: then its position is not saved."""
        try:
            yield
        except Exception:
            self._saved_at = None
            raise

    def _is_saved(self) -> bool:
        """Whether no rank knows better than that the state as it is now is saved. Collective."""
        return all(self._session.group.gather(self._saved_at == self._position()))

    def _begin_life(
        self, filesystem: Filesystem, run: str, restored: Restored | None, registered: str | None
    ) -> None:
        """What is done once a life, beside training's own state: by rank 0, of the run alone."""
        if isinstance(self._policy, TimePolicy) and self._session.group.rank == 0:
            self._lives.begin(filesystem, run)
        resumed_from = None if restored is None else restored.path
        self._session.begin_sweeping(resumed_from=resumed_from, registered=registered)
        if self._session.memory is not None:
            in_memory = restored is not None and restored.kept
            self._session.memory.begin(restored.name if restored and in_memory else None)
