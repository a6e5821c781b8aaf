"""What may pass is tried again with backoff and jitter; what will not is said at once."""

from __future__ import annotations

import errno
import logging
import random
import re
from collections.abc import Callable
from typing import TypeVar

import tenacity

from ray_accel_ckpt.errors import StorageError, StorageTimeoutError

logger = logging.getLogger(__name__)
T = TypeVar("T")

_FIRST_WAIT, _LONGEST_WAIT = 0.2, 15.0

_PASSING_ERRNO = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.EINTR,
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EPIPE,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
}
# pyarrow's clients put the status into the text of a plain OSError and nowhere else.
_PASSING_TEXT = re.compile(
    r"throttl|slow.?down|too many requests|rate exceeded|reduce your request rate"
    r"|timed? ?out|reset by peer|connection (refused|closed|aborted)|broken pipe"
    r"|NETWORK_CONNECTION|INTERNAL_FAILURE|INTERNAL_ERROR|SERVICE_UNAVAILABLE|REQUEST_TIMEOUT"
    r"|internal server error|service unavailable|bad gateway|temporar|curlCode"
    r"|\b(HTTP(?: response| status)?(?: code)?|status(?: code)?)[ :=]*(408|429|5\d\d)\b",
    re.IGNORECASE,
)
_PASSING_STATUS = frozenset({408, 429, *range(500, 600)})

_REMEDIES = {
    errno.ENOSPC: "free space there (or in the bucket's quota); the checkpoints before this "
    "one are untouched",
    errno.EDQUOT: "raise the quota or free space; the checkpoints before this one are untouched",
    errno.EACCES: "give this user read and write permission there; older checkpoints are untouched",
    errno.EPERM: "give this user read and write permission there; older checkpoints are untouched",
    errno.EROFS: "mount it writable; the checkpoints before this one are untouched",
}


# A stream of its own: tenacity's jitter draws from python's global one, which the training uses.
_jitter = random.SystemRandom()


def _wait(state: tenacity.RetryCallState) -> float:
    """Seconds before the next attempt: up to twice as many each time, drawn at random."""
    longest = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** min(state.attempt_number - 1, 16))
    return _jitter.uniform(0, longest)


def retried(operation: Callable[[], T], *, what: str, where: str, timeout: float) -> T:
    """Run `operation` until it succeeds, fails for good, or `timeout` seconds have passed.

    Args:
        what: what it does, for messages: ``"write a shard"``.
        where: the path.
        timeout: seconds from now; the attempt under way then is the last.

    Raises:
        StorageTimeoutError: it kept failing in ways that may pass.
        StorageError: it failed in a way that will not.
        FileNotFoundError, EOFError: as they are; for the caller they are answers.
    """
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(may_pass),
        wait=_wait,
        stop=tenacity.stop_after_delay(timeout),
        before_sleep=lambda state: logger.warning(
            "could not %s (%s), attempt %d: %s; trying again",
            what,
            where,
            state.attempt_number,
            state.outcome and state.outcome.exception(),
        ),
    )
    try:
        return retrying(operation)
    except tenacity.RetryError as e:
        cause = e.last_attempt.exception()
        raise StorageTimeoutError(
            f"could not {what} within {timeout:g} s",
            where=where,
            why=f"{type(cause).__name__}: {cause}",
            remedy="see whether the storage is reachable; raise Checkpointer(storage_timeout=...) "
            "if such outages are normal here",
        ) from cause
    except (FileNotFoundError, EOFError):
        raise
    except Exception as e:
        number = e.errno if isinstance(e, OSError) else None
        raise StorageError(
            f"could not {what}",
            where=where,
            why=f"{type(e).__name__}: {e}",
            remedy=_REMEDIES.get(number or 0, "see whether the path and the credentials are right"),
        ) from e


def making(operation: Callable[[], T], *, what: str, where: str, timeout: float) -> T:
    """`retried`, for what makes something: that something above it is absent is an error.

    Raises:
        StorageError, StorageTimeoutError: naming the path, the cause and the remedy.
    """
    try:
        return retried(operation, what=what, where=where, timeout=timeout)
    except FileNotFoundError as e:
        raise StorageError(
            f"could not {what}",
            where=where,
            why=f"{type(e).__name__}: {e}",
            remedy="make the bucket or the mount that the path begins with; neither is created",
        ) from e


def may_pass(error: BaseException) -> bool:
    """Whether trying again may help: time-outs, resets, throttling, 408, 429 and 5xx."""
    if isinstance(error, (FileNotFoundError, PermissionError, EOFError)):
        return False
    if isinstance(error, (TimeoutError, ConnectionError)):
        return True
    status = getattr(error, "status", getattr(error, "code", None))
    if isinstance(status, int) and status in _PASSING_STATUS:
        return True
    if not isinstance(error, OSError) and type(error).__module__.startswith("builtins"):
        return False
    if isinstance(error, OSError) and error.errno in _PASSING_ERRNO:
        return True
    return _PASSING_TEXT.search(str(error)) is not None
