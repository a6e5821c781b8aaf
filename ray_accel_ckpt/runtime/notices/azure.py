"""Azure: Scheduled Events.

https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events

Events are not acknowledged: Azure would begin at once, and the rest of the notice be lost.
"""

from __future__ import annotations

import json
import re
from email.utils import parsedate_to_datetime
from typing import Any

from ray_accel_ckpt.errors import MetadataError
from ray_accel_ckpt.runtime.notices.metadata import UNREADABLE, Metadata
from ray_accel_ckpt.runtime.notices.notice import FirstSeen, Kind, Notice, most_urgent

HEADERS = {"Metadata": "true"}
EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
OWN_NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"

# After each of these but the last, nothing that ran before runs on.
KINDS = {
    "Preempt": Kind.TAKEN,
    "Terminate": Kind.TAKEN,
    "Redeploy": Kind.TAKEN,
    "Reboot": Kind.TAKEN,
    "Freeze": Kind.PAUSED,
}


class AzureNotices:
    """Polls the events of one VM. Those of other VMs of its group are left to them."""

    name = "Azure"

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._own_name = ""
        self._started = FirstSeen()

    def present(self) -> bool:
        reply = self._metadata.get(OWN_NAME, HEADERS)
        return reply.status == 200 and _NAME.fullmatch(reply.text.strip()) is not None

    def poll(self) -> Notice | None:
        if not self._own_name:
            self._own_name = self._look_up_own_name()
        text = self._found(EVENTS)
        try:
            events = [each for each in json.loads(text)["Events"] if self._is_own(each)]
            self._started.keep([event["EventId"] for event in events if not event["NotBefore"]])
            return most_urgent(self._notice(event) for event in events)
        except UNREADABLE as error:
            raise MetadataError(
                "the metadata service answered what are no scheduled events",
                where=EVENTS,
                why=f"{error!r} in {text[:200]!r}",
            ) from error

    def _look_up_own_name(self) -> str:
        """It is kept, so it had better be one: with a wrong name no event would ever be heard."""
        name = self._found(OWN_NAME).strip()
        if not _NAME.fullmatch(name):
            raise MetadataError(
                "the metadata service answered what is no name of a machine",
                where=OWN_NAME,
                why=repr(name[:200]),
            )
        return name

    def _is_own(self, event: dict[str, Any]) -> bool:
        # Names of Azure's resources do not differ by case alone.
        affected = [name.casefold() for name in event["Resources"]]
        return event["EventType"] in KINDS and self._own_name.casefold() in affected

    def _notice(self, event: dict[str, Any]) -> Notice:
        """An event that has started has no time any more: it is now."""
        not_before = event["NotBefore"]
        return Notice(
            kind=KINDS[event["EventType"]],
            reason=f"Azure {event['EventType']}: {event.get('Description') or event['EventId']}",
            deadline=(
                parsedate_to_datetime(not_before).timestamp()
                if not_before
                else self._started[event["EventId"]]
            ),
        )

    def _found(self, path: str) -> str:
        text = self._metadata.get(path, HEADERS).found()
        if text is None:
            raise MetadataError("the metadata service has no such thing (404)", where=path)
        return text
