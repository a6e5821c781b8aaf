"""Everything this library raises.

    AccelCkptError
    ├── ConfigurationError (ValueError)        a wrong argument, found when it is given
    ├── UnsupportedStateError (TypeError)      a value that neither JSON nor a tensor can hold
    ├── StateMismatchError (ValueError)        the checkpoint is of another model
    ├── TornSnapshotError                      a tensor was written while it was being saved
    ├── ElasticDataError (ValueError)          this position in the data cannot be continued
    ├── StorageError (OSError)                 a read or a write failed for good
    │   └── StorageTimeoutError (TimeoutError) it kept failing for as long as ``storage_timeout``
    ├── CheckpointExistsError (FileExistsError)  the place to save to holds another checkpoint
    ├── MetadataError                          the cloud's metadata service gave no usable answer
    ├── DrainError                             Ray was not reached, or refused to drain a node
    │   └── NodeNotFoundError                  Ray answered, and knows no such living node
    └── CheckpointError
        ├── NotACheckpointError                no checkpoint there, or not all of one
        ├── CorruptCheckpointError             bytes that are not the bytes that were written
        ├── FormatVersionError                 written by a newer version of this library
        └── NoUsableCheckpointError            checkpoints are there, and not one is good

Each message says what happened, where, why, and what to do about it; the four
are also attributes. Its last line is where the page about errors tells more. All
of them survive pickling, which is how Ray carries an error from a worker to the
driver.
"""

from __future__ import annotations

import re

_PAGE = "docs/troubleshooting.md"
_MORE = re.compile(rf"\n *more: {re.escape(_PAGE)}#\w+")


class AccelCkptError(Exception):
    """The root of the tree.

    Attributes:
        what: what happened, one sentence.
        where: the file, tensor or argument it happened at.
        why: the cause, as far as it is known.
        remedy: what to do about it.
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", remedy: str = "") -> None:
        # A message that tells of other errors of this tree has one link, its own.
        what, where, why, remedy = (_MORE.sub("", each) for each in (what, where, why, remedy))
        lines = [what]
        lines += [f"  where: {where}"] if where else []
        lines += [f"  why: {why}"] if why else []
        lines += [f"  what to do: {remedy}"] if remedy else []
        super().__init__("\n".join(lines))
        self.what, self.where, self.why, self.remedy = what, where, why, remedy

    def __str__(self) -> str:
        return f"{self.args[0]}\n  more: {_PAGE}#{documented(type(self)).__name__.lower()}"


class ConfigurationError(AccelCkptError, ValueError):
    """An argument that cannot work. Raised where it is given, before anything runs."""


class UnsupportedStateError(AccelCkptError, TypeError):
    """A state holds a value that neither a tensor nor tagged JSON represents exactly."""


class StateMismatchError(AccelCkptError, ValueError):
    """A checkpoint does not fit the registered objects. No object has been changed.

    Attributes:
        missing: names that are registered and not in the checkpoint.
        unexpected: names that are in the checkpoint and not registered.
        differing: names in both whose shape or dtype differ, each with the two.
    """

    def __init__(
        self,
        what: str,
        *,
        missing: tuple[str, ...] = (),
        unexpected: tuple[str, ...] = (),
        differing: tuple[str, ...] = (),
        where: str = "",
        why: str = "",
        remedy: str = "",
    ) -> None:
        groups = (("missing", missing), ("unexpected", unexpected), ("differing", differing))
        found = [f"{title}: {_shortened(names)}" for title, names in groups if names]
        super().__init__(what, where=where, why="; ".join([why] * bool(why) + found), remedy=remedy)
        self.missing, self.unexpected, self.differing = missing, unexpected, differing


class TornSnapshotError(AccelCkptError):
    """A tensor changed while it was being saved. The save was given up: it is no checkpoint."""


class ElasticDataError(AccelCkptError, ValueError):
    """The position in the data that a checkpoint holds cannot be continued here."""


class StorageError(AccelCkptError, OSError):
    """Storage refused an operation for good: retrying would not help."""


class StorageTimeoutError(StorageError, TimeoutError):
    """Storage kept failing in a way that may pass, for longer than ``storage_timeout``."""


class CheckpointExistsError(AccelCkptError, FileExistsError):
    """The directory to save to already holds files of another checkpoint."""


class MetadataError(AccelCkptError):
    """The metadata service of the cloud did not answer, or with something that is no answer."""


class DrainError(AccelCkptError):
    """Ray could not be asked to drain a node, or refused to."""


class NodeNotFoundError(DrainError):
    """Ray answered, and the node is not among its living nodes."""


class CheckpointError(AccelCkptError):
    """A checkpoint cannot be used."""


class NotACheckpointError(CheckpointError):
    """There is no checkpoint, or it was never written whole."""


class CorruptCheckpointError(CheckpointError):
    """A checksum, a length or a structure is not what was written."""


class FormatVersionError(CheckpointError):
    """The checkpoint's format is newer than this library reads."""


class NoUsableCheckpointError(CheckpointError):
    """Checkpoints exist, and none of them can be loaded. The message lists each and why."""


def documented(kind: type[AccelCkptError]) -> type[AccelCkptError]:
    """The nearest class of this tree, which the page about errors has: of a subclass, its base."""
    return next(each for each in kind.__mro__ if each.__module__ == __name__)


def _shortened(names: tuple[str, ...], limit: int = 20) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
