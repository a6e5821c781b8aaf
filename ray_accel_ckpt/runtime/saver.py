"""From a bundle as it stands to a save under way."""

from __future__ import annotations

import time

from ray_accel_ckpt.image.staging import SlotPool
from ray_accel_ckpt.runtime.chronicle import Chronicle
from ray_accel_ckpt.runtime.heartbeat import Heartbeat
from ray_accel_ckpt.runtime.prepare import Preparer
from ray_accel_ckpt.runtime.report import Metrics
from ray_accel_ckpt.runtime.session import Session
from ray_accel_ckpt.runtime.sinks import Moment, Sink
from ray_accel_ckpt.state.bundle import StateBundle
from ray_accel_ckpt.state.hooks import Hooks
from ray_accel_ckpt.state.model import ModelPart
from ray_accel_ckpt.state.passes import EpochWatch


class Saver:
    """Freezes a bundle and hands it to a sink. The other way round: `resume.Resumer`.

    Args:
        overlap: whether copies may go on until an optimizer steps.
        watch: knows which batches an epoch under way would serve again.
    """

    def __init__(
        self,
        *,
        session: Session,
        bundle: StateBundle,
        hooks: Hooks,
        preparer: Preparer,
        slots: SlotPool,
        heartbeat: Heartbeat,
        chronicle: Chronicle,
        watch: EpochWatch,
        overlap: bool,
    ) -> None:
        self._session, self._bundle, self._hooks = session, bundle, hooks
        self._preparer, self._slots, self._heartbeat = preparer, slots, heartbeat
        self._chronicle, self._watch, self._overlap = chronicle, watch, overlap
        self._measured = False
        self._checked: set[str] = set()

    def save(self, sink: Sink, *, step: int, epoch: int, metrics: Metrics) -> None:
        """Save what the bundle holds now. Blocks until it is frozen; see `Checkpointer.step`."""
        session = self._session
        self._slots.settle()
        waited = self._slots.take_waited()
        if self._measured:
            self._heartbeat.also_blocked(waited)
        self._measured = sink.of_run
        if not sink.of_run:
            # It takes other times, and nobody resumes from it.
            moment = session.first(lambda: self._moment(sink.path, step=step, epoch=epoch))
            sink.save(moment, self._slots, metrics=metrics, durable=lambda nbytes: None)
            return
        self._chronicle.begin()
        begin = time.perf_counter()
        with self._heartbeat.saving() as measured:

            def durable(nbytes: int) -> None:
                measured()
                seconds = time.perf_counter() - begin
                self._chronicle.durable(sink.path, step=step, nbytes=nbytes, seconds=seconds)

            moment = session.first(lambda: self._moment(sink.path, step=step, epoch=epoch))
            sink.save(moment, self._slots, metrics=metrics, durable=durable)
        blocked = waited + time.perf_counter() - begin
        self._chronicle.frozen(sink.path, step=step, epoch=epoch, blocked=blocked)

    def flush(self) -> None:
        """Wait until all that was saved is where it is to be; see `Checkpointer.flush`."""
        try:
            self._slots.settle()
        finally:
            self._session.flush()

    def _moment(self, path: str, *, step: int, epoch: int) -> Moment:
        models = self._bundle.of_type(ModelPart)
        captured = self._bundle.capture(
            weights=self._hooks.weights(models, path),
            replayed=self._watch.replayed(),
            with_gradients=self._preparer.window.open,
        )
        # Once, and again when there is more, as after an optimizer's first step.
        names = {name for each in captured.values() for name in each.tensors}
        if not names <= self._checked:
            self._bundle.require_loadable(captured)
            self._checked |= names
        return Moment(
            captured=captured,
            late=self._bundle.written_by_optimizers(captured) if self._overlap else {},
            frozen=self._bundle.frozen(captured),
            step=step,
            epoch=epoch,
        )
