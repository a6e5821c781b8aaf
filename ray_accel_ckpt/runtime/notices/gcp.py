"""GCP: preemption of spot VMs, and host maintenance that ends the VM.

https://cloud.google.com/compute/docs/instances/create-use-spot#detect-preemption
https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice
"""

from __future__ import annotations

from typing import TypeVar

from ray_accel_ckpt.errors import MetadataError
from ray_accel_ckpt.runtime.notices.metadata import Metadata
from ray_accel_ckpt.runtime.notices.notice import FirstSeen, Kind, Notice, most_urgent

Meaning = TypeVar("Meaning")

HEADERS = {"Metadata-Flavor": "Google"}
INSTANCE = "/computeMetadata/v1/instance/"

# Neither key comes with a time. These are the shortest that Google promises: a VM
# with a GPU has an hour before maintenance, but which kind this one is, is not said.
PREEMPTION_SECONDS = 30.0
MAINTENANCE_SECONDS = 60.0

_PREEMPTED = {"TRUE": True, "FALSE": False}
_MAINTENANCE = {
    "NONE": None,
    "MIGRATE_ON_HOST_MAINTENANCE": Kind.PAUSED,
    "TERMINATE_ON_HOST_MAINTENANCE": Kind.TAKEN,
}


class GcpNotices:
    """Polls one Compute Engine VM's metadata. Deadlines count from when a notice is first seen."""

    name = "GCP"

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._seen = FirstSeen()

    def present(self) -> bool:
        reply = self._metadata.get(INSTANCE + "id", HEADERS)
        return reply.status == 200 and reply.headers.get("Metadata-Flavor") == "Google"

    def poll(self) -> Notice | None:
        preempted = self._one_of("preempted", _PREEMPTED, default="FALSE")
        maintenance = self._one_of("maintenance-event", _MAINTENANCE, default="NONE")
        self._seen.keep(["preempted"] * preempted + ["maintenance"] * (maintenance is not None))
        notices = []
        if preempted:
            notices.append(
                Notice(
                    kind=Kind.TAKEN,
                    reason="GCP preemption",
                    deadline=self._seen["preempted"] + PREEMPTION_SECONDS,
                )
            )
        if maintenance is not None:
            notices.append(
                Notice(
                    kind=maintenance,
                    reason="GCP host maintenance",
                    deadline=self._seen["maintenance"] + MAINTENANCE_SECONDS,
                )
            )
        return most_urgent(notices)

    def _one_of(self, key: str, meanings: dict[str, Meaning], default: str) -> Meaning:
        text = self._metadata.get(INSTANCE + key, HEADERS).found()
        value = default if text is None else text.strip()
        if value not in meanings:
            raise MetadataError(
                "the metadata service answered with no value known",
                where=INSTANCE + key,
                why=f"{value[:200]!r} is none of {', '.join(meanings)}",
            )
        return meanings[value]
