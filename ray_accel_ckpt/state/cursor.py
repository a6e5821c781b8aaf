"""The position in the data, counted in samples of one global order.

An epoch has one order of all samples, drawn from (seed, epoch) and the same on
every rank. The workers together take it from the front, one global batch a
step, so that what has been consumed after any step is a prefix of the order.
A position is therefore one number, and means the same to any number of workers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True)
class Cursor:
    """Where one loader stands.

    Attributes:
        seed: what the orders are drawn from.
        epoch: passes over the data begun before this one.
        consumed: samples of this epoch's order (batches, for a user's batch
            sampler) that all workers together have been handed.
        ended: this pass is over; the next one begins with the next `iter()`.
        resumed: the next `iter()` goes on with this pass instead of beginning one.
        spent: the pass resumed into had ended: it is gone through once more, empty.
    """

    seed: int
    epoch: int = 0
    consumed: int = 0
    ended: bool = False
    resumed: bool = False
    started: bool = False
    spent: bool = False

    def begin(self) -> None:
        """Called by every `iter()`: go on if resumed, else begin the next pass."""
        if self.started and not self.resumed:
            self.epoch, self.consumed = self.epoch + 1, 0
        self.started, self.resumed, self.ended = True, False, False

    def state(self, *, replay: bool) -> dict[str, Any]:
        """As saved. With `replay`, an ended pass is gone through again, empty."""
        if self.ended and not replay:
            return {
                "seed": self.seed,
                "epoch": self.epoch + 1,
                "consumed": 0,
                "started": False,
                "spent": False,
            }
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "consumed": self.consumed,
            "started": self.started,
            "spent": self.ended or self.spent,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.seed, self.epoch = int(state["seed"]), int(state["epoch"])
        self.consumed = int(state["consumed"])
        self.started = self.resumed = bool(state["started"])
        self.spent, self.ended = bool(state["spent"]), False
