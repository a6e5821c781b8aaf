"""Watch over one node: when its machine is going to end, have Ray drain it in time."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from ray_accel_ckpt.errors import ConfigurationError, DrainError, NodeNotFoundError
from ray_accel_ckpt.runtime.notices.notice import Kind, Notice, NoticeSource
from ray_accel_ckpt.runtime.notices.poller import Poller

logger = logging.getLogger(__name__)

RETRY_SECONDS = 2.0
"""Between two tries to reach Ray."""


class Node(Protocol):
    """What is drained: `RayNode`."""

    def find(self) -> str: ...

    def drain(self, reason: str, deadline: float | None) -> str: ...


@dataclass(frozen=True, kw_only=True)
class WatchSettings:
    """How to watch.

    Attributes:
        poll: seconds between two looks at the metadata service.
        margin: seconds by which Ray's deadline is earlier than the cloud's.
        grace: seconds that are left after SIGTERM.
        drains: the kinds of notice that drain; others are only logged.

    Raises:
        ConfigurationError: one of these cannot be.
    """

    poll: float = 1.0
    margin: float = 5.0
    grace: float = 25.0
    drains: frozenset[Kind] = frozenset({Kind.TAKEN})

    def __post_init__(self) -> None:
        for name, least in (("poll", 0.1), ("margin", 0.0), ("grace", 0.0)):
            value = getattr(self, name)
            if not least <= value < float("inf"):
                raise ConfigurationError(
                    f"{name} cannot be {value} seconds", where=name, remedy=f"give {least} or more"
                )


@dataclass(frozen=True, kw_only=True)
class _Drain:
    reason: str
    deadline: float | None

    def covers(self, other: _Drain) -> bool:
        """Whether `other` would tell Ray nothing more urgent."""
        return _time(self.deadline) <= _time(other.deadline)


@dataclass(frozen=True, kw_only=True)
class WatchEvent:
    """Something that a watch has seen or done.

    Attributes:
        event: ``notice``: something is announced, by the cloud or by SIGTERM. ``gone``: nothing
            is announced any more. ``drain``: Ray has accepted to drain.
        at: when, in seconds since the epoch.
        kind: of a notice: ``taken``, ``at_risk`` or ``paused``.
        reason: the cloud's own words, also those that Ray was told.
        deadline: the end that is announced, or the one that Ray was told; None if there is none.
        node: the Ray node that is drained.
    """

    event: str
    at: float
    kind: str | None = None
    reason: str | None = None
    deadline: float | None = None
    node: str | None = None


class _Signal(Enum):
    TERMINATE = "terminate"


class NodeWatch:
    """Drains `node` when `source` announces its end, or at SIGTERM (`terminate`).

    A notice drains once; another one drains again only if its deadline is
    earlier. Ray is asked until it accepts.

    Args:
        tell: called with each event, on the thread that runs; must not raise. None: the log
            is enough.
    """

    def __init__(
        self,
        *,
        source: NoticeSource | None,
        node: Node,
        settings: WatchSettings,
        tell: Callable[[WatchEvent], None] | None = None,
    ) -> None:
        self._node = node
        self._tell = tell or (lambda event: None)
        self._settings = settings
        # SimpleQueue: the one queue that a signal handler may put into.
        self._events: queue.SimpleQueue[Notice | _Signal | None] = queue.SimpleQueue()
        self._poller = (
            None if source is None else Poller(source, every=settings.poll, tell=self._events.put)
        )
        self._accepted: _Drain | None = None
        self._wanted: _Drain | None = None
        self._failure = ""
        self._found = False

    def terminate(self) -> None:
        """The machine ends in `grace` seconds. May be called from a signal handler."""
        self._events.put(_Signal.TERMINATE)

    def run(self) -> None:
        """Watch until `terminate`, drain, and return when the node or its time is gone.

        Raises:
            DrainError: Ray did not accept until the end.
        """
        self._say_whom()
        if self._poller is None:
            logger.info("no metadata service is polled: waiting for SIGTERM")
        else:
            self._poller.start()
        try:
            while (event := self._next_event()) is not _Signal.TERMINATE:
                self._hear(event)
        finally:
            if self._poller is not None:
                self._poller.stop()
        self._leave()

    def _say_whom(self) -> None:
        try:
            logger.info("watching over Ray node %s", self._node.find())
            self._found = True
        except DrainError as error:
            logger.warning("watching; when a notice comes, Ray is looked for again: %s", error)

    def _next_event(self) -> Notice | _Signal | None:
        """Wait for one, and as long as none comes, for Ray."""
        while True:
            try:
                return self._events.get(timeout=RETRY_SECONDS if self._wanted else None)
            except queue.Empty:
                self._ask()

    def _hear(self, notice: Notice | _Signal | None) -> None:
        if not isinstance(notice, Notice):
            self._tell(WatchEvent(event="gone", at=time.time()))
            self._forget()
            return
        self._tell_of(notice)
        if notice.kind not in self._settings.drains:
            logger.warning("%s: %s; not drained for this", notice.reason, notice.kind.value)
            self._forget()
            return
        deadline = None if notice.deadline is None else notice.deadline - self._settings.margin
        logger.warning("%s: %s%s", notice.reason, notice.kind.value, _in(notice.deadline))
        self._want(_Drain(reason=notice.reason, deadline=deadline))

    def _tell_of(self, notice: Notice) -> None:
        self._tell(
            WatchEvent(
                event="notice",
                at=time.time(),
                kind=notice.kind.name.lower(),
                reason=notice.reason,
                deadline=notice.deadline,
            )
        )

    def _forget(self) -> None:
        if self._accepted is not None:
            logger.warning(
                "the notice is gone, but Ray has no way back from draining: "
                "if the machine stays, start Ray on it again"
            )
        elif self._wanted is not None:
            logger.info("the notice is gone before Ray was reached: nothing is drained")
        self._accepted = self._wanted = None

    def _want(self, drain: _Drain) -> None:
        if self._accepted is not None and self._accepted.covers(drain):
            return
        self._wanted = drain
        self._ask()

    def _ask(self) -> None:
        """Have Ray drain as wanted, if it can be reached now."""
        if self._wanted is None:
            return
        reason, deadline = self._wanted.reason, self._wanted.deadline
        told = None if deadline is None else max(deadline, time.time())
        try:
            node_id = self._node.drain(reason, told)
        except DrainError as error:
            if str(error) != self._failure:
                logger.warning("not drained yet, trying on: %s", error)
            self._failure = str(error)
            return
        logger.warning("Ray drains node %s%s (%s)", node_id, _in(deadline), reason)
        drained = WatchEvent(
            event="drain", at=time.time(), reason=reason, deadline=told, node=node_id
        )
        self._tell(drained)
        self._accepted, self._wanted, self._failure = self._wanted, None, ""
        self._found = True

    def _leave(self) -> None:
        end = time.time() + self._settings.grace
        logger.warning("SIGTERM: %g s are left", self._settings.grace)
        self._tell_of(Notice(kind=Kind.TAKEN, reason="SIGTERM", deadline=end))
        pending = _time(self._wanted.deadline) if self._wanted is not None else end
        self._want(_Drain(reason="SIGTERM", deadline=min(end, pending)))
        while (left := end - time.time()) > 0:
            time.sleep(min(RETRY_SECONDS, left))
            self._ask()
            if self._is_gone():
                logger.info("the node is gone")
                return
        if self._wanted is not None:
            raise DrainError(
                "the time is over, and Ray has not been told",
                why=self._failure.splitlines()[0],
                remedy="see the log above",
            )

    def _is_gone(self) -> bool:
        """Whether Ray says so; not of a node that it was never found to have."""
        try:
            self._node.find()
        except NodeNotFoundError:
            return self._found
        except DrainError:
            return False
        return False


def _in(deadline: float | None) -> str:
    return "" if deadline is None else f" in {max(0.0, deadline - time.time()):.0f} s"


def _time(deadline: float | None) -> float:
    return float("inf") if deadline is None else deadline
