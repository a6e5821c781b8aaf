"""The layout of one safetensors shard, planned before a byte is copied.

8 bytes   length H of the header, little-endian
H bytes   JSON header, padded with spaces so that the data begins at 64 bytes' alignment
the rest  tensors end to end, widest items first, so that each begins aligned
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from ray_accel_ckpt.errors import UnsupportedStateError
from ray_accel_ckpt.image.dtypes import STORED
from ray_accel_ckpt.image.manifest import MAX_HEADER_NBYTES
from ray_accel_ckpt.image.partition import Slice

ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A slice and the bytes [begin, end) of the file that hold it."""

    slice: Slice
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where everything of one shard lies.

    Attributes:
        header: the file's first bytes, the 8 of the length included.
        placed: slices in file order.
        nbytes: length of the file.
    """

    header: bytes
    placed: tuple[Placed, ...]
    nbytes: int


def plan(slices: Iterable[Slice]) -> Layout:
    """Lay slices out. The same slices give the same bytes.

    Raises:
        UnsupportedStateError: there are more tensors than safetensors' header has room for.
    """
    ordered = sorted(slices, key=lambda s: (-s.spec.dtype.itemsize, s.spec.name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    offsets = []
    for piece in ordered:
        stored = STORED[piece.spec.dtype]
        end = offset + piece.nbytes
        entries[piece.spec.name] = {
            "dtype": stored.name,
            "shape": [*piece.box.size, *stored.extra],
            "data_offsets": [offset, end],
        }
        offsets.append((offset, end))
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    if len(header) > MAX_HEADER_NBYTES:
        raise UnsupportedStateError(
            f"too many tensors for one shard: {len(ordered)}",
            why=f"their names and shapes take {len(header)} bytes, the limit of safetensors "
            f"is {MAX_HEADER_NBYTES}",
            remedy="join small tensors into larger ones",
        )
    placed = tuple(
        Placed(slice=piece, begin=len(header) + begin, end=len(header) + end)
        for piece, (begin, end) in zip(ordered, offsets, strict=True)
    )
    return Layout(header=header, placed=placed, nbytes=len(header) + offset)
