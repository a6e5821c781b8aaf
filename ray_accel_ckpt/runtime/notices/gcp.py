"""GCP: preemption of spot VMs, and host maintenance that ends the VM.

https://cloud.google.com/compute/docs/instances/create-use-spot#detect-preemption
https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice
"""

from __future__ import annotations

from ray_accel_ckpt.errors import MetadataError
from ray_accel_ckpt.runtime.notices.metadata import Metadata
from ray_accel_ckpt.runtime.notices.notice import FirstSeen, Kind, Notice

HEADERS = {"Metadata-Flavor": "Google"}
INSTANCE = "/computeMetadata/v1/instance/"

# Neither key comes with a time. These are the shortest that Google promises: a VM
# with a GPU has an hour before maintenance, but which kind this one is, is not said.
PREEMPTION_SECONDS = 30.0
MAINTENANCE_SECONDS = 60.0

_PREEMPTED = {"TRUE": True, "FALSE": False}
_MAINTENANCE = {
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
        # It leaves the least time: nothing that is wrong with the other key may hide it.
        if self._preempted():
            self._seen.keep(["preempted"])
            return Notice(
                kind=Kind.TAKEN,
                reason="GCP preemption",
                deadline=self._seen["preempted"] + PREEMPTION_SECONDS,
            )
        event = self._value("maintenance-event", default="NONE")
        if event == "NONE":
            self._seen.keep([])
            return None
        self._seen.keep([event])
        return Notice(
            # Google says more here from time to time; what is not known is no reason to be deaf.
            kind=_MAINTENANCE.get(event, Kind.AT_RISK),
            reason=f"GCP host maintenance ({event[:100]})",
            deadline=self._seen[event] + MAINTENANCE_SECONDS,
        )

    def _preempted(self) -> bool:
        value = self._value("preempted", default="FALSE")
        if value not in _PREEMPTED:
            raise MetadataError(
                "the metadata service answered with no value known",
                where=INSTANCE + "preempted",
                why=f"{value[:200]!r} is none of {', '.join(_PREEMPTED)}",
            )
        return _PREEMPTED[value]

    def _value(self, key: str, default: str) -> str:
        text = self._metadata.get(INSTANCE + key, HEADERS).found()
        return default if text is None else text.strip()
