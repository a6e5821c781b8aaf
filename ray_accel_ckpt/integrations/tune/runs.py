"""Which Ray Train run a trial goes on with.

A trial has one run after another, all in its own directory:

    <experiment>/<trial>/checkpoint_000003/reference.json      Tune's: stands for
    <experiment>/<trial>/<trial id>-0/checkpoint_00000040_.../ this one
    <experiment>/<trial>/<trial id>-1/origin.json              begun from another trial's
    <experiment>/<trial>/<trial id>-1/told-tune                Tune has heard of this run

Whenever a trial is started, be it for the first time, after a failure, a pause or
`Tuner.restore`, or because population based training made it exploit another one,
all there is to go by is the checkpoint that Tune hands it:

- None: the trial's first run.
- One of its own: the run that it lies in. That run may be ahead of it, by saves
  that Tune had not heard of yet; it goes on from its newest, and no work is lost.
- Another trial's: an exploit, or a restart after one. The two look the same.
  If the latest run began from just this checkpoint and Tune has heard nothing of
  it, it is a restart: Tune would otherwise hand out one of that run's own. If Tune
  has heard of it, the same checkpoint is exploited once more, and a new run begins.
  (Or Tune itself was set back to before it heard. Then, too, a new run is exact: it
  begins from what Tune believes, and costs the repeated work.)

So the weights that are loaded are never those of a life that Tune has ended.
"""

from __future__ import annotations

import logging
import posixpath
import re
from dataclasses import dataclass

from ray_accel_ckpt.errors import CheckpointError, NotACheckpointError
from ray_accel_ckpt.storage.access import READ_TIMEOUT, listed
from ray_accel_ckpt.storage.filesystem import Filesystem
from ray_accel_ckpt.storage.reference import ORIGIN, encode, read_reference
from ray_accel_ckpt.storage.retry import retried

logger = logging.getLogger(__name__)

TOLD = "told-tune"
_OF_TUNE = re.compile(r"checkpoint_[0-9]{6,}")


@dataclass(frozen=True, kw_only=True)
class TrialRuns:
    """The runs of one trial.

    Args:
        directory: the trial's, on `filesystem`.
        trial: its id, equal over restarts.
    """

    filesystem: Filesystem
    directory: str
    trial: str

    def choose(self, target: str | None) -> str:
        """The name of the run to go on with or to begin; see above.

        Args:
            target: the checkpoint that the one handed over by Tune stands for.
        """
        if target is None:
            return self._name(0)
        run = posixpath.dirname(target)
        if posixpath.dirname(run) == self.directory and self._number(run) is not None:
            return posixpath.basename(run)
        latest = max(self._numbers(), default=0)
        if self._origin(latest) == target and not self._told(latest):
            return self._name(latest)
        begun = self._name(latest + 1)
        self._write(f"{begun}/{ORIGIN}", encode(f"{self.directory}/{begun}", target))
        return begun

    def tell(self, run: str) -> None:
        """Remember that Tune hears of `run`. Before it does: see above."""
        self._write(f"{run}/{TOLD}", b"\n")

    def reference(self, checkpoint: str) -> bytes:
        """What stands for `checkpoint` in a directory of Tune's, which lies in the trial's."""
        return encode(f"{self.directory}/checkpoint", checkpoint)

    def _name(self, number: int) -> str:
        return f"{self.trial}-{number}"

    def _number(self, run: str) -> int | None:
        match = re.fullmatch(re.escape(self.trial) + "-([0-9]{1,9})", posixpath.basename(run))
        return int(match[1]) if match else None

    def _numbers(self) -> list[int]:
        found = map(self._number, _names(self.filesystem, self.directory))
        return [number for number in found if number is not None]

    def _origin(self, number: int) -> str | None:
        run = f"{self.directory}/{self._name(number)}"
        return read_reference(self.filesystem, run, ORIGIN, timeout=READ_TIMEOUT)

    def _told(self, number: int) -> bool:
        return TOLD in _names(self.filesystem, f"{self.directory}/{self._name(number)}")

    def _write(self, name: str, data: bytes) -> None:
        path = f"{self.directory}/{name}"
        retried(
            lambda: self.filesystem.write(path, [data]),
            what="write",
            where=path,
            timeout=READ_TIMEOUT,
        )


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A directory `path` of Tune's, and the `checkpoint` that it stands for."""

    path: str
    checkpoint: str


def newest_reference(filesystem: Filesystem, trial: str) -> Reference | None:
    """The newest good one in the directory of a trial; None if there is none."""
    names = filter(_OF_TUNE.fullmatch, _names(filesystem, trial))
    for name in sorted(names, reverse=True):
        path = f"{trial}/{name}"
        try:
            checkpoint = read_reference(filesystem, path, timeout=READ_TIMEOUT)
        except CheckpointError as e:
            logger.warning("passing over a checkpoint of a trial: %s", e)
            continue
        if checkpoint is not None:
            return Reference(path=path, checkpoint=checkpoint)
    return None


def standing_reference(filesystem: Filesystem, handed: str) -> str:
    """`handed`, a directory of Tune's; if Tune has removed it, the newest of the same trial.

    Where there is none either, `handed` itself.
    """
    if _names(filesystem, handed):
        return handed
    newest = newest_reference(filesystem, posixpath.dirname(handed))
    if newest is None:
        return handed
    logger.warning("%s is gone; going on from %s instead", handed, newest.path)
    return newest.path


def reference_at(filesystem: Filesystem, handed: str) -> Reference:
    """What Tune's checkpoint at `handed` stands for.

    Raises:
        NotACheckpointError: it is none that this integration reported.
        CorruptCheckpointError: the reference is damaged.
    """
    checkpoint = read_reference(filesystem, handed, timeout=READ_TIMEOUT)
    if checkpoint is None:
        raise NotACheckpointError(
            "a trial was handed a checkpoint that is no reference",
            where=handed,
            why="another trainable reported it",
            remedy="restore the experiment with the trainable it was begun with",
        )
    return Reference(path=handed, checkpoint=checkpoint)


def _names(filesystem: Filesystem, directory: str) -> list[str]:
    entries = listed(filesystem, directory)
    return [entry.name for entry in entries]
