"""Which cloud this is."""

from __future__ import annotations

import logging
from enum import StrEnum

from ray_accel_ckpt.errors import MetadataError
from ray_accel_ckpt.runtime.notices.aws import AwsNotices
from ray_accel_ckpt.runtime.notices.azure import AzureNotices
from ray_accel_ckpt.runtime.notices.gcp import GcpNotices
from ray_accel_ckpt.runtime.notices.metadata import DEFAULT_URL, Metadata
from ray_accel_ckpt.runtime.notices.notice import CloudNotices, Notice, NoticeSource

logger = logging.getLogger(__name__)


class Cloud(StrEnum):
    AUTO = "auto"
    AWS = "aws"
    GCP = "gcp"
    AZURE = "azure"
    NONE = "none"


def source_of(cloud: Cloud, base_url: str = DEFAULT_URL) -> NoticeSource | None:
    """Where notices of `cloud` come from; None if there are none."""
    metadata = Metadata(base_url)
    match cloud:
        case Cloud.AWS:
            return AwsNotices(metadata)
        case Cloud.GCP:
            return GcpNotices(metadata)
        case Cloud.AZURE:
            return AzureNotices(metadata)
        case Cloud.AUTO:
            return DetectedNotices(metadata)
        case Cloud.NONE:
            return None


class DetectedNotices:
    """Those of whichever cloud answers.

    As long as none does, each poll looks again: at boot the network may come
    up later than this.
    """

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._clouds: tuple[CloudNotices, ...] = (
            AwsNotices(metadata),
            GcpNotices(metadata),
            AzureNotices(metadata),
        )
        self._found: CloudNotices | None = None

    def poll(self) -> Notice | None:
        if self._found is None:
            self._found = self._look()
        return self._found.poll()

    def _look(self) -> CloudNotices:
        found = next((cloud for cloud in self._clouds if cloud.present()), None)
        if found is None:
            raise MetadataError(
                "no cloud is found",
                where=self._metadata.base_url,
                why="what answers there speaks none of the dialects of AWS, GCP and Azure",
                remedy="if this machine is in one of these, name it with --cloud",
            )
        logger.info("this machine runs in %s", found.name)
        return found
