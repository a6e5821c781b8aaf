"""Whether tensors hold the bytes that they held before: a checksum of them, where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
import xxhash

from ray_accel_ckpt.image.shard import Layout, Placed
from ray_accel_ckpt.image.staging import bytes_of, rows_of
from ray_accel_ckpt.image.threads import for_each

Mark: TypeAlias = tuple[object, ...]
"""Equal if the same slices of the same tensors hold the same bytes."""

_CHUNK = 64 * 2**20
"""Bytes that a device checksums at once: it needs a few times that beside them."""
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
"""2^64 over the golden ratio, as a signed number: multiples of it look like random weights."""


def mark_of(layout: Layout, tensors: Mapping[str, torch.Tensor]) -> Mark:
    """The mark of a layout's tensors as they are now.

    On the host by several threads, 128 bits a slice (xxh3). On an accelerator by the
    device itself, 64 bits a slice, after what is enqueued on the current stream; the
    calling thread waits for that.
    """
    found: dict[str, object] = {}
    rows = {placed.slice.spec.name: rows_of(placed.slice, tensors) for placed in layout.placed}

    def hash_host(name: str) -> None:
        found[name] = xxhash.xxh3_128_hexdigest(bytes_of(_bytes(rows[name])))

    on_host = _on_host(rows)
    sums = {name: weighted_sum(_bytes(rows[name])) for name in rows.keys() - set(on_host)}
    for_each(hash_host, on_host)
    found |= {name: int(total) for name, total in sums.items()}
    return (layout.header, *((_place(p), found[p.slice.spec.name]) for p in layout.placed))


def weighted_sum(data: torch.Tensor) -> torch.Tensor:
    """Of 1-D uint8: 32-bit words times odd weights that differ by place, summed modulo 2^64.

    One word that changes changes the sum; any other change does but for one in 2^64, about.
    Computed where `data` lies: nothing is waited for.
    """
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for begin in range(0, data.numel(), _CHUNK):
        part = data[begin : begin + _CHUNK]
        # A copy begins aligned, and is padded to whole words.
        words = torch.zeros(-(-part.numel() // 4) * 4, dtype=torch.uint8, device=data.device)
        words[: part.numel()].copy_(part)
        first = begin // 4
        places = torch.arange(first, first + words.numel() // 4, device=data.device)
        weights = (places * _GOLDEN) | 1
        total += (words.view(torch.int32) * weights).sum()
    return total


def _on_host(rows: Mapping[str, torch.Tensor]) -> list[str]:
    return [name for name, each in rows.items() if each.device.type == "cpu"]


def _bytes(rows: torch.Tensor) -> torch.Tensor:
    plain = rows.resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8)


def _place(placed: Placed) -> tuple[object, ...]:
    spec, box = placed.slice.spec, placed.slice.box
    return spec.name, spec.scope, spec.shape, box.start, box.size
