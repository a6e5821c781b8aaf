"""AWS: spot interruptions and rebalance recommendations, by version 2 of the metadata service.

https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/rebalance-recommendations.html
"""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime

from ray_accel_ckpt.errors import MetadataError
from ray_accel_ckpt.runtime.notices.metadata import UNREADABLE, Metadata, Reply
from ray_accel_ckpt.runtime.notices.notice import FirstSeen, Kind, Notice

TOKEN = "/latest/api/token"  # noqa: S105
INSTANCE_ACTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"

TOKEN_SECONDS = 21600
"""The longest a token may live."""


class AwsNotices:
    """Polls one EC2 instance's metadata. The session token is renewed before it ends."""

    name = "AWS"

    def __init__(self, metadata: Metadata, *, token_seconds: int = TOKEN_SECONDS) -> None:
        self._metadata = metadata
        self._token_seconds = token_seconds
        self._token = ""
        self._renew_at = 0.0
        self._actions = FirstSeen()

    def present(self) -> bool:
        return self._new_token().status == 200

    def poll(self) -> Notice | None:
        action = self._get(INSTANCE_ACTION)
        if action is not None:
            return self._interruption(action)
        rebalance = self._get(REBALANCE)
        if rebalance is not None:
            return Notice(kind=Kind.AT_RISK, reason="AWS recommends to rebalance")
        return None

    def _interruption(self, text: str) -> Notice:
        try:
            document = json.loads(text)
            action = str(document["action"])
            self._actions.keep([action])
            # Hibernation begins at once, and may come without a time.
            deadline = _epoch(document["time"]) if "time" in document else self._actions[action]
        except UNREADABLE as error:
            raise MetadataError(
                "the metadata service answered what is no instance action",
                where=INSTANCE_ACTION,
                why=f"{error!r} in {text[:200]!r}",
            ) from error
        return Notice(kind=Kind.TAKEN, reason=f"AWS spot interruption: {action}", deadline=deadline)

    def _get(self, path: str) -> str | None:
        if time.monotonic() >= self._renew_at:
            self._renew_token()
        reply = self._with_token(path)
        if reply.status == 401:
            self._renew_token()
            reply = self._with_token(path)
        return reply.found()

    def _with_token(self, path: str) -> Reply:
        return self._metadata.get(path, {"X-aws-ec2-metadata-token": self._token})

    def _renew_token(self) -> None:
        asked_at = time.monotonic()
        reply = self._new_token()
        if reply.status != 200:
            raise MetadataError(
                f"the metadata service gave no token, but {reply.status}",
                where=TOKEN,
                remedy="allow the instance metadata service, and if this runs in a container, "
                "two hops (HttpPutResponseHopLimit=2)",
            )
        token = reply.text.strip()
        if not (token.isascii() and token.isprintable()):
            raise MetadataError(
                "the metadata service answered what is no token", where=TOKEN, why=repr(token[:200])
            )
        self._token = token
        # With a tenth of its life left: clocks differ, and answers take time.
        self._renew_at = asked_at + 0.9 * self._token_seconds

    def _new_token(self) -> Reply:
        seconds = str(self._token_seconds)
        return self._metadata.put(TOKEN, {"X-aws-ec2-metadata-token-ttl-seconds": seconds})


def _epoch(text: str) -> float:
    """Of a time like 2017-09-18T08:22:00Z."""
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
