"""What this library leaves in a directory, be it whole or not."""

from __future__ import annotations

import re

from ray_accel_ckpt.image import manifest as manifests
from ray_accel_ckpt.storage.filesystem import Entry

_PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]+\.partial")
"""What `LocalFilesystem` calls a file that is not whole yet."""


def is_ours(entry: Entry) -> bool:
    """Whether it is a file of a checkpoint, or was about to become one."""
    partial = _PARTIAL.fullmatch(entry.name)
    name = entry.name if partial is None else partial[1]
    return entry.nbytes is not None and manifests.parse_name(name) is not None
