"""A notice, and what gives notices."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class Kind(Enum):
    """What is going to happen, most urgent first."""

    TAKEN = "the machine is taken away"
    AT_RISK = "the machine may be taken away"
    PAUSED = "the machine stands still for a moment"


@dataclass(frozen=True, kw_only=True)
class Notice:
    """What a cloud has announced. Equal notices are the same notice.

    Attributes:
        kind: what is going to happen.
        reason: the cloud's own words, for people.
        deadline: when, in seconds since the epoch; None if the cloud does not say.
    """

    kind: Kind
    reason: str
    deadline: float | None = None


class NoticeSource(Protocol):
    """What can be asked for notices."""

    def poll(self) -> Notice | None:
        """The most urgent notice that stands, or None. Blocks for seconds at most.

        Raises:
            MetadataError: there is no usable answer this time; ask again later.
        """


class CloudNotices(NoticeSource, Protocol):
    """Those of one cloud."""

    name: str

    def present(self) -> bool:
        """Whether this is the cloud that the machine runs in. Blocks for seconds at most.

        Raises:
            MetadataError: nobody answers.
        """


def most_urgent(notices: Iterable[Notice]) -> Notice | None:
    """The first in order of kind, then of deadline; one without deadline comes last."""
    order = list(Kind)
    return min(
        notices,
        key=lambda each: (
            order.index(each.kind),
            float("inf") if each.deadline is None else each.deadline,
        ),
        default=None,
    )


class FirstSeen:
    """Since when something is announced, for announcements without a time.

    The same answer at each poll: a notice must not change from being looked at.
    """

    def __init__(self) -> None:
        self._times: dict[str, float] = {}

    def keep(self, announced: Collection[str]) -> None:
        """Forget what is announced no longer: should it come again, it is another one."""
        self._times = {key: self._times.get(key, time.time()) for key in announced}

    def __getitem__(self, key: str) -> float:
        return self._times[key]
