"""A trial: a `TorchTrainer` inside a Tune function, its reports passed on to Tune.

What happens in which process: the workers save and report to the controller of
their Ray Train run, as ever. The controller's callback puts each report into a
queue and never waits, for whatever it did wrong would end the run. The Tune
function takes the reports out and hands them to Tune, and there Tune stops it.

A stopped trial has to end its run itself. Should its process just exit, Ray would end
the run's processes, but the workers' placement group, with all their resources,
would wait for a cleaner of Ray Train's, which needs the cluster's dashboard.
"""

from __future__ import annotations

import copy
import logging
import os
import posixpath
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.tune
from ray.exceptions import RayActorError, RayError
from ray.train import UserCallback
from ray.train.torch import TorchTrainer
from ray.tune.trainable.function_trainable import wrap_function
from ray.util.queue import Empty, Queue

from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.integrations.tune.metrics import completed, remembered
from ray_accel_ckpt.integrations.tune.runs import (
    TrialRuns,
    newest_reference,
    reference_at,
    standing_reference,
)
from ray_accel_ckpt.runtime.configs import run_config
from ray_accel_ckpt.runtime.heal import without_placeholders
from ray_accel_ckpt.storage.filesystem import wrap
from ray_accel_ckpt.storage.reference import REFERENCE

if TYPE_CHECKING:
    from ray.train import ScalingConfig

logger = logging.getLogger(__name__)

MAX_FAILURES = 10
"""Failures that a trial's run survives before the trial fails. Less than a single run's:
some hyperparameters cannot work, and the search has to learn of it."""

_END_TIMEOUT = 60.0
"""Seconds that a stopped trial's run is given to end. Ray Train gives its workers 5."""

_THREAD_TIMEOUT = 90
"""Seconds that Tune waits for the function to end before it gives up on reusing its process.
Longer than the end of a run may take; Tune's default is 2."""

_POLL = 1.0
"""Seconds after which the function looks whether the run has ended without a word."""

_METRICS = "metrics"
_OURS = ("name", "storage_path", "storage_filesystem")


def trainable(
    train_loop_per_worker: Callable[[dict[str, Any]], Any],
    *,
    scaling_config: ScalingConfig,
    run_options: Mapping[str, Any] | None = None,
    **trainer_options: Any,
) -> type[ray.tune.Trainable]:
    """A trainable for `ray.tune.Tuner`, whose trials are Ray Train runs.

    The loop is an ordinary one: a `Checkpointer`, `load_state` before the loop,
    saves with metrics. Its ``config`` is the trial's, from `param_space`. Each save
    is one report to Tune, one `training_iteration`.

    A trial that is started again, after a failure or by `Tuner.restore`, goes on
    with the same bits. One that exploits another trial loads all of the other's state:
    set afterwards what `config` is to decide. A stopped trial's workers are ended.

    Args:
        scaling_config: the workers of each trial. Beside them the trial's function
            takes what `ray.tune.with_resources` says, one CPU by default.
        run_options: for `ray_accel_ckpt.run_config`. Different from there,
            `num_to_keep` is None, so that every checkpoint that Tune knows exists,
            and `max_failures` is 10. Name and storage are the experiment's.
        trainer_options: whatever else `TorchTrainer` takes, e.g. `datasets`.

    Raises:
        ConfigurationError: an option that Tune decides; no workers.
    """
    options = {"num_to_keep": None, "max_failures": MAX_FAILURES, **(run_options or {})}
    for given, taken in ((_OURS, options), (("run_config", "train_loop_config"), trainer_options)):
        if wrong := [name for name in given if name in taken]:
            raise ConfigurationError(
                f"{', '.join(wrong)} cannot be given for the trials of an experiment",
                remedy="name and storage go to tune.RunConfig, the loop's config to param_space, "
                "the rest of a run's config to run_options",
            )
    if scaling_config.num_workers == 0:
        raise ConfigurationError(
            "a trial needs workers",
            why="Ray Train's local mode (num_workers=0) has no storage",
            remedy="ScalingConfig(num_workers=1)",
        )
    # `run_config` takes each of these two or its short form.
    for long, short in (("checkpoint_config", "num_to_keep"), ("failure_config", "max_failures")):
        if long in options and short not in (run_options or {}):
            del options[short]

    def run_trial(config: dict[str, Any]) -> None:
        trial = _Trial.this()

        def trainer(run: str, callback: UserCallback) -> TorchTrainer:
            return TorchTrainer(
                train_loop_per_worker,
                train_loop_config=config,
                scaling_config=scaling_config,
                run_config=run_config(
                    run,
                    trial.runs.directory,
                    storage_filesystem=trial.arrow,
                    **{**options, "callbacks": [*(options.get("callbacks") or ()), callback]},
                ),
                **trainer_options,
            )

        trial.run(trainer)

    # Tune names experiments and trials by it.
    name = getattr(train_loop_per_worker, "__name__", "trial")
    return type(name, (_OfTrials, wrap_function(run_trial, name=name)), {})


class _OfTrials:
    """What Tune's function trainables lack: they end their run, and find what is left."""

    def restore(self, checkpoint_path: Any) -> None:
        """Called by Tune, which would fail the trial if it had itself removed the checkpoint."""
        handed: ray.tune.Checkpoint = checkpoint_path.checkpoint
        standing = standing_reference(wrap(handed.filesystem), handed.path)
        if standing != handed.path:
            checkpoint_path = copy.copy(checkpoint_path)
            checkpoint_path.checkpoint = ray.tune.Checkpoint(standing, handed.filesystem)
        super().restore(checkpoint_path)  # type: ignore[misc]

    def cleanup(self) -> None:
        """Called by Tune when it stops a trial, whose function it does not wait for."""
        super().cleanup()  # type: ignore[misc]
        if not _ENDED.wait(_END_TIMEOUT):
            logger.warning("the run of a stopped trial has not ended in %d s", _END_TIMEOUT)


_ENDED = threading.Event()
"""No run is going on in this process, which runs one trial at a time."""
_ENDED.set()


@dataclass(frozen=True, kw_only=True)
class _Report:
    metrics: Mapping[str, Any]
    checkpoint: str | None
    controller: Any = None


class _Forward(UserCallback):  # type: ignore[misc]  # Ray's classes have no types here
    """In the controller: puts reports into the trial's queue, which has no bound."""

    def __init__(self, inbox: Queue) -> None:
        self._inbox = inbox

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        path = None if checkpoint is None else checkpoint.path
        controller = ray.get_runtime_context().current_actor
        try:
            self._inbox.put(_Report(metrics=metrics[0], checkpoint=path, controller=controller))
        except RayError as e:
            # The function has died, and this process is about to.
            logger.warning("a report could not be passed on to Tune: %s", e)


@dataclass(kw_only=True)
class _Trial:
    """One life of one trial, in the process of its Tune function.

    Attributes:
        told: the checkpoint that Tune was told of last; at first, what the one that it
            handed over stands for.
        metrics: the last value of each that was reported, at first by a life before this one.
    """

    runs: TrialRuns
    arrow: Any
    told: str | None
    metrics: Mapping[str, Any]
    _tells: bool = False

    @classmethod
    def this(cls) -> _Trial:
        """The trial that this process runs."""
        context = ray.tune.get_context()
        storage = context.get_storage()
        arrow = storage.storage_filesystem
        runs = TrialRuns(
            filesystem=wrap(arrow),
            # A user's path may have `..` in it; those that references lead to have none.
            directory=posixpath.normpath(storage.trial_fs_path),
            trial=context.get_trial_id(),
        )
        handed = ray.tune.get_checkpoint()
        reference = None if handed is None else reference_at(runs.filesystem, handed.path)
        # Restored, Tune may have forgotten what it was last told. Storage has not.
        known = reference or newest_reference(runs.filesystem, runs.directory)
        metadata = {} if known is None else ray.tune.Checkpoint(known.path, arrow).get_metadata()
        return cls(
            runs=runs,
            arrow=arrow,
            told=None if reference is None else reference.checkpoint,
            metrics=metadata.get(_METRICS, {}),
        )

    def run(self, trainer: Callable[[str, UserCallback], TorchTrainer]) -> None:
        """Run to the end, telling Tune of each report on the way."""
        run = self.runs.choose(self.told)
        os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", str(_THREAD_TIMEOUT))
        inbox = Queue(actor_options={"num_cpus": 0})
        fitting = _in_background(trainer(run, _Forward(inbox)).fit)
        controller = None
        _ENDED.clear()
        try:
            while (report := _next(inbox, fitting)) is not None:
                controller = report.controller
                self._take(report.metrics)
                # Before there is any metric Tune would miss the one that it searches for.
                if self.metrics:
                    self._report(run, report.checkpoint)
            result = fitting.result()
            # A life before this one may have died between the last save and telling of it; and
            # of a loop without metrics Tune has heard nothing.
            if result.checkpoint is not None and result.checkpoint.path != self.told:
                self._take(result.metrics or {})
                self._report(run, result.checkpoint.path)
        finally:
            # Tune ends a trial by ending this thread in `report`, and the run goes on.
            if controller is not None and not fitting.done():
                _abort(controller)
            _ENDED.set()

    def _take(self, metrics: Mapping[str, Any]) -> None:
        # Some saves have no metrics, or not all: those of a notice of preemption, that at the
        # end of a loop. Tune would end the search at a report that lacks what it searches for.
        self.metrics = completed(self.metrics, without_placeholders(metrics))

    def _report(self, run: str, saved: str | None) -> None:
        if saved is None:
            ray.tune.report(dict(self.metrics))
            return
        if not self._tells:
            self.runs.tell(run)
            self._tells = True
        self.told = saved
        with tempfile.TemporaryDirectory() as local:
            Path(local, REFERENCE).write_bytes(self.runs.reference(saved))
            checkpoint = ray.tune.Checkpoint.from_directory(local)
            checkpoint.set_metadata({_METRICS: remembered(self.metrics)})
            ray.tune.report(dict(self.metrics), checkpoint=checkpoint)


def _abort(controller: Any) -> None:
    """End a run: its workers, their resources, and the controller itself."""
    try:
        ray.get(controller.abort.remote(), timeout=_END_TIMEOUT)
    except RayActorError:
        return  # How it ends.
    except RayError as e:
        logger.warning("the run of a stopped trial could not be ended in order: %s", e)
        ray.kill(controller)


def _next(inbox: Queue, fitting: Future[Any]) -> _Report | None:
    """The next report; None if the run has ended and there is no more."""
    while True:
        # Before looking: what is reported before the end is in the queue by then.
        last = fitting.done()
        try:
            report: _Report = inbox.get(timeout=_POLL)
            return report
        except Empty:
            if last:
                return None


def _in_background(function: Callable[[], Any]) -> Future[Any]:
    """Call it in a thread that does not keep the process alive."""
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as e:  # noqa: BLE001 - raised where the result is asked for
            future.set_exception(e)

    threading.Thread(target=call, daemon=True).start()
    return future
