"""What was read and proved, dealt out over the ranks into live tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from ray_accel_ckpt.image.pieces import Piece
from ray_accel_ckpt.image.staged import Staged
from ray_accel_ckpt.runtime.destination import Destination, Wanted
from ray_accel_ckpt.runtime.group import Group

_CHUNK = 32 * 2**20
"""Bytes of one broadcast, at most: the memory a rank needs beside its slot."""


class Dealer:
    """Broadcasts what all ranks need, from the rank that read it. Collective.

    Args:
        readers: by shard, the rank that read what all need of it.
        staged: what this rank read, by shard.
    """

    def __init__(
        self,
        group: Group,
        wanted: Wanted,
        readers: Mapping[int, int],
        staged: Mapping[int, Staged],
        tensors: Destination,
    ) -> None:
        self._group, self._wanted, self._readers = group, wanted, readers
        self._staged, self._tensors = staged, tensors
        # Kept from chunk to chunk: fresh memory takes longer than the bytes that come in it.
        self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")

    def deal(self, *, live: bool) -> None:
        """Fill the fresh tensors, or those of live objects, from the slots of all ranks."""
        tensors = self._tensors
        for stored, pieces in self._wanted.own.items():
            chosen = [piece for piece in pieces if tensors.is_live(piece) is live]
            self._put(chosen, self._staged[stored])
        for stored, pieces in self._wanted.common.items():
            chosen = [piece for piece in pieces if tensors.is_live(piece) is live]
            for chunk in _chunks(sorted(chosen, key=lambda p: p.info.begin)):
                self._deal_chunk(chunk, self._readers[stored], self._staged.get(stored))

    def _deal_chunk(self, chunk: list[Piece], source: int, held: Staged | None) -> None:
        group, tensors = self._group, self._tensors
        nbytes = sum(padded(p.nbytes) for p in chunk)
        if self._buffer.numel() < nbytes:
            self._buffer = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        buffer = self._buffer[:nbytes]
        views = []
        at = 0
        for piece in chunk:
            views.append(piece.view(buffer[at : at + piece.nbytes]))
            at += padded(piece.nbytes)
        if held is not None and group.rank == source:
            torch._foreach_copy_(views, [held.rows(piece) for piece in chunk])
        group.broadcast(buffer, source)
        if held is not None and group.rank == source:
            self._put(chunk, held)
        else:
            tensors.put(zip(chunk, views, strict=True))

    def _put(self, pieces: Iterable[Piece], held: Staged) -> None:
        """Copy what this rank read to where it goes, unless it was read there."""
        self._tensors.put((p, held.rows(p)) for p in pieces if not held.in_place(p))


def _chunks(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Cut slices at row boundaries into chunks of about `_CHUNK` bytes; the same on each rank."""
    chunk: list[Piece] = []
    room = _CHUNK
    for piece in pieces:
        rows = piece.stop - piece.first
        if piece.nbytes == 0:
            continue
        row_nbytes = max(1, piece.nbytes // rows)
        start = piece.first
        while start < piece.stop:
            take = min(piece.stop - start, max(1, room // row_nbytes))
            chunk.append(Piece(info=piece.info, first=start, stop=start + take))
            room -= take * row_nbytes
            start += take
            if room <= 0:
                yield chunk
                chunk, room = [], _CHUNK
    if chunk:
        yield chunk


def padded(nbytes: int) -> int:
    """Rounded up to where any dtype may begin."""
    return -(-nbytes // 64) * 64
