"""Small checkpoints without a training loop, forged manifests, and how to load them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from ray_accel_ckpt.image import partition, shard
from ray_accel_ckpt.image.frozen import FrozenShare
from ray_accel_ckpt.image.image import Image, SaveInfo, parts_of
from ray_accel_ckpt.image.reader import Snapshot
from ray_accel_ckpt.image.staging import Slot
from ray_accel_ckpt.runtime.group import Group
from ray_accel_ckpt.runtime.restore import Restored, Restorer
from ray_accel_ckpt.state.bundle import Plan, StateBundle
from ray_accel_ckpt.state.part import Captured, Scope, captured_tree
from ray_accel_ckpt.storage.catalog import ShardFetch, open_snapshot
from ray_accel_ckpt.storage.filesystem import Filesystem, LocalFilesystem
from ray_accel_ckpt.storage.opened import SavedCheckpoint
from ray_accel_ckpt.storage.writer import write_image

RUN = "run"


class Holder:
    """A registered object that keeps whatever it is given."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


class Small:
    """Under a kilobyte of state, of every scope; all of it follows from `number` and `rank`."""

    names = ("model", "shared", "own")

    def __init__(self, number: int, rank: int = 0) -> None:
        self.model = nn.Sequential(nn.Linear(7, 3), nn.BatchNorm1d(3))
        with torch.no_grad():
            for i, tensor in enumerate(self.model.state_dict().values()):
                values = torch.arange(tensor.numel()) + 1000 * number + 100 * i
                tensor.copy_(values.reshape(tensor.shape))
        self.shared = Holder({"number": number, "moments": torch.full((5,), number / 3)})
        self.own = Holder({"rank": rank, "noise": torch.full((3,), 10 * number + rank)})
        self.bundle = StateBundle()
        self.bundle.add_model(self.model)
        self.bundle.add_object("shared", self.shared, kind="object")
        self.bundle.add_object("own", self.own, kind="object", per_rank=True)

    def captured(self) -> dict[str, Captured]:
        found = self.bundle.capture()
        return {name: found[name] for name in self.names}

    def bits(self) -> bytes:
        """Everything, to be compared."""
        found = []
        for captured in self.captured().values():
            found.append(json.dumps(captured.value).encode())
            found += [bytes_of(tensor) for tensor in captured.tensors.values()]
        return b"|".join(found)

    def decide(self, snapshot: Snapshot) -> Plan:
        return self.bundle.plan(
            snapshot.parts(0),
            only=self.names,
            skip=frozenset(),
            strict=True,
            where=snapshot.where,
        )

    def restorer(self, filesystem: Filesystem) -> Restorer:
        return Restorer(
            filesystem=filesystem,
            group=Group(),
            slot=Slot(),
            device=torch.device("cpu"),
            decide=self.decide,
        )


def part_of(value: Any, name: str = "part", scope: Scope = Scope.REPLICATED) -> dict[str, Captured]:
    """`value` as the only part of a bundle."""
    per_rank = scope is Scope.PER_RANK
    captured = captured_tree(value, name=name, kind="object", scope=scope, per_rank=per_rank)
    return {name: captured}


def image_of(
    captured: dict[str, Captured],
    *,
    rank: int = 0,
    world_size: int = 1,
    step: int = 0,
    attempt: str = "abc123",
    run: str = RUN,
    epoch: int = 0,
    saved_at: float = 1.5,
    library: str = "test",
    frozen: Collection[str] = (),
) -> Image:
    """What `rank` would write of a captured bundle."""
    specs = partition.specs_of(captured, rank=rank, world_size=world_size, frozen=frozen)
    mine = partition.share(specs, rank=rank)
    layout = shard.plan(piece for piece in mine if not piece.spec.frozen)
    still = shard.plan(piece for piece in mine if piece.spec.frozen)
    info = SaveInfo(
        run=run,
        attempt=attempt,
        step=step,
        epoch=epoch,
        rank=rank,
        world_size=world_size,
        plan=partition.plan_digest(specs, world_size=world_size),
        library=library,
        saved_at=saved_at,
    )
    tensors = {name: t for part in captured.values() for name, t in part.tensors.items()}
    slot = Slot()
    data = slot.fill(layout, tensors)
    return Image(
        info=info,
        layout=layout,
        data=data,
        parts=parts_of(captured, rank=rank),
        wait=slot.copies.wait,
        frozen=FrozenShare().image(still, tensors, lasting=True) if frozen else None,
    )


def save(filesystem: Filesystem, number: int, *, world_size: int = 1, directory: str = RUN) -> str:
    """Save `Small(number)` as checkpoint `number` of a run; the checkpoint's path."""
    path = f"{directory}/checkpoint_{number}"
    for rank in range(world_size):
        image = small_image(number, rank=rank, world_size=world_size)
        write_image(filesystem, path, image, timeout=1.0)
    return path


def small_image(number: int, *, rank: int = 0, world_size: int = 1) -> Image:
    captured = Small(number, rank).captured()
    attempt = f"{number:06x}"
    return image_of(captured, rank=rank, world_size=world_size, step=number, attempt=attempt)


def newest(filesystem: Filesystem, into: Small, directory: str = RUN) -> Restored | None:
    """What `load_state()` does, into `into`."""
    return into.restorer(filesystem).newest(directory)


def opened(filesystem: Filesystem, path: str) -> SavedCheckpoint:
    """`open_checkpoint` on a filesystem that has no URI."""
    snapshot = open_snapshot(filesystem, path)
    return SavedCheckpoint(snapshot, ShardFetch(filesystem, snapshot))


def forged(body: bytes | dict[str, Any]) -> bytes:
    """A manifest file of any content whose checksum is right."""
    if isinstance(body, dict):
        body = json.dumps(body, separators=(",", ":")).encode()
    checksum = xxhash.xxh3_128_hexdigest(body).encode()
    return b'{"checksum":"' + checksum + b'","body":' + body + b"}\n"


def edited(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A manifest file with its body changed, and the checksum right again."""
    body = json.loads(data)["body"]
    change(body)
    return forged(body)


def flip(directory: Path, name: str) -> None:
    """Turn one bit of the stored tensor `name` of a checkpoint on disk."""
    for manifest in open_snapshot(LocalFilesystem(), str(directory)).manifests:
        for info in manifest.slices:
            if info.name == name and info.begin < info.end:
                shard = directory / manifest.shard.file
                data = bytearray(shard.read_bytes())
                data[info.begin] ^= 1
                shard.write_bytes(data)
                return
    raise LookupError(name)


def bytes_of(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""
