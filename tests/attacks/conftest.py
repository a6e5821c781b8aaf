"""A good checkpoint in memory, and what it means that a damaged one is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ray_accel_ckpt.errors import CheckpointError
from ray_accel_ckpt.storage.fakes import MemoryFilesystem
from ray_accel_ckpt.storage.opened import LazyDict
from tests.helpers_image import Small, edited, forged, opened, save

PATH = "run/checkpoint_1"
MANIFEST = f"{PATH}/manifest-00000-of-00001.json"
SHARD = f"{PATH}/shard-00000-of-00001.safetensors"

Change = Callable[[dict[str, Any]], None]


class Victim:
    """Somebody who loads a checkpoint that an attacker has written to."""

    def __init__(self) -> None:
        self.memory = MemoryFilesystem()
        save(self.memory, 1)

    def edit(self, change: Change) -> None:
        """Change the manifest's content; its checksum stays right."""
        self.memory.files[MANIFEST] = edited(self.memory.files[MANIFEST], change)

    def forge(self, body: bytes) -> None:
        """A manifest of any content whose checksum is right."""
        self.memory.files[MANIFEST] = forged(body)

    def loads(self) -> None:
        """Load it; whatever is raised, nothing registered may have changed."""
        into = Small(9)
        before = into.bits()
        try:
            into.restorer(self.memory).exactly(PATH)
        except BaseException:
            assert into.bits() == before
            raise

    def looks(self) -> None:
        """Open it and read everything."""
        saved = opened(self.memory, PATH)
        saved.verify()
        for part in saved.parts:
            _walk(saved.state_dict(part))

    def refuses(self, match: str | None = None) -> None:
        with pytest.raises(CheckpointError, match=match):
            self.loads()
        with pytest.raises(CheckpointError, match=match):
            self.looks()


def _walk(value: Any) -> None:
    if isinstance(value, LazyDict):
        for each in value.values():
            _walk(each)


@pytest.fixture
def victim() -> Victim:
    return Victim()
