"""Where a save falls among the passes over the data of one epoch.

A loop body may iterate several loaders: one after the other, or one inside
another (evaluation every so many steps). What a resumed run must do with a
loader whose pass has ended depends on which it was.

A pass that the loop went out of is over: `break` means that. Where it was an exception,
the pass was broken off and not done with, and a save in an except or finally clause
holds the position in it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from ray_accel_ckpt.state.loader import PreparedLoader, next_tick


class EpochWatch:
    """Watches the loaders of the epoch under way."""

    def __init__(self, loaders: Callable[[], Iterable[PreparedLoader]]) -> None:
        self._loaders = loaders
        self._began = 0
        self._handled = sys.exception()

    def begin(self) -> None:
        """An epoch begins."""
        self._began = next_tick()
        # A run may be begun in an except clause: that exception has left no pass of it.
        self._handled = sys.exception()

    def broken_off(self) -> bool:
        """Whether this is in the except or finally clause of an exception of this epoch."""
        return sys.exception() not in (None, self._handled)

    @contextmanager
    def as_left(self) -> Iterator[None]:
        """What is asked and saved inside sees the pass that an exception left as under way,
        as long as that exception is being handled."""
        left = self._left() if self.broken_off() else []
        for loader in left:
            loader.cursor.ended = False
        try:
            yield
        finally:
            for loader in left:
                loader.cursor.ended = True

    def stepped(self) -> None:
        """A step is counted: in the passes under way, or for those that have ended."""
        loaders, began = list(self._loaders()), self._epoch_began()
        under_way = [loader for loader in loaders if loader.under_way(began)]
        for loader in under_way or [each for each in loaders if each.ended_since(began)]:
            loader.trains = True

    def done(self) -> bool:
        """The data of this epoch is gone through: a save now belongs to the next epoch.

        The last batch's own `step` is still inside the pass, so that what the
        loop does between its last batch and the next epoch is done on resuming.
        An evaluation before the training of an epoch is not its data, as soon as it
        is known which loaders are trained on.
        """
        loaders, began = list(self._loaders()), self._epoch_began()
        trained = [loader for loader in loaders if loader.trains]
        # One that is gone through again, empty, had ended when more of the epoch was to come.
        ended = any(o.ended_since(began) and not o.empty for o in trained or loaders)
        return ended and not any(loader.in_flight(began) for loader in loaders)

    def replayed(self) -> list[str]:
        """Loaders that a run resumed into this epoch must find empty.

        Those that ended in this epoch before the one under way began. One that
        ended inside the pass under way will be begun anew from there.
        """
        if self.done():
            return []
        loaders, began = list(self._loaders()), self._epoch_began()
        return [
            loader.name
            for loader in loaders
            if loader.ended_since(began) and not any(o.around(loader, began) for o in loaders)
        ]

    def loss_weight(self) -> float:
        """What the loss of the batch in hand counts in the mean over ranks.

        The batch in hand is the latest of those whose pass is under way: an
        evaluation inside a training step takes nothing from the training batch.
        """
        loaders = [loader for loader in self._loaders() if loader.handed_out]
        under_way = [loader for loader in loaders if loader.in_flight()]
        latest = max(under_way or loaders, key=lambda loader: loader.handed_out, default=None)
        return 1.0 if latest is None else latest.loss_weight

    def _left(self) -> list[PreparedLoader]:
        """The loaders that were left last of all that happened to any.

        Of passes inside one another that is the outer one: an evaluation that was broken
        off begins anew. Several if they took turns, as in ``zip(first, second)``.
        """
        loaders = list(self._loaders())
        last = max((o for o in loaders if o.left), key=lambda o: o.over, default=None)
        if last is None or any(max(o.began, o.handed_out, o.over) > last.over for o in loaders):
            return []
        return [o for o in loaders if o is last or (o.left and o.began < last.handed_out < o.over)]

    def _epoch_began(self) -> int:
        """In a loop that counts its own epochs, the first loader's pass begins one."""
        if self._began:
            return self._began
        first = next(iter(self._loaders()), None)
        return first.began if first is not None else 0
