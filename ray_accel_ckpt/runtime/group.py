"""The workers as a group: what few words they exchange, and never during a save.

Spoken over `torch.distributed`'s default group, which a `TorchTrainer` sets up and a script
under `torchrun` itself; without one, a process is a group of its own. What travels is
JSON in byte tensors: nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ray_accel_ckpt import errors
from ray_accel_ckpt.errors import AccelCkptError

T = TypeVar("T")


class Group:
    """This process among its peers. Every method but the properties is collective:
    all ranks must call the same ones in the same order."""

    @property
    def rank(self) -> int:
        return dist.get_rank() if _initialized() else 0

    @property
    def world_size(self) -> int:
        return dist.get_world_size() if _initialized() else 1

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (JSON), by rank, on every rank. Blocks until all have called."""
        if self.world_size == 1:
            return [value]
        data = json.dumps(value).encode()
        lengths = [self._bytes(8) for _ in range(self.world_size)]
        dist.all_gather(lengths, self._tensor(len(data).to_bytes(8, "little")))
        sizes = [int.from_bytes(_raw(length), "little") for length in lengths]
        padded = data.ljust(max(sizes), b" ")
        gathered = [self._bytes(len(padded)) for _ in range(self.world_size)]
        dist.all_gather(gathered, self._tensor(padded))
        return [json.loads(_raw(each)[:size]) for each, size in zip(gathered, sizes, strict=True)]

    def from_rank_zero(self, value: Any) -> Any:
        """Rank 0's `value` (JSON) on every rank."""
        return self.gather(value if self.rank == 0 else None)[0]

    def agreed(self, work: Callable[[], T]) -> T:
        """What `work` returns here; if it failed on any rank, every rank raises that failure.

        Raises:
            AccelCkptError: the first rank's failure, of its kind: what is done about it
                depends on that. On the other ranks a class that is not in `errors` is
                the one there that it is derived from. Of what this library does not raise
                itself, that rank raises its own error, and the others one that names it.
        """
        result, problem = None, None
        try:
            result = work()
        except Exception as e:  # noqa: BLE001 - raised below, by all
            problem = e
        told = self.gather(None if problem is None else _told(problem))
        for rank, failure in enumerate(told):
            if failure is not None and rank == self.rank and problem is not None:
                raise problem
            if failure is not None:
                raise _error(rank, *failure) from problem
        return result  # type: ignore[return-value]

    def of_rank_zero(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on rank 0 (JSON), the only one that does it. Raises as `agreed`."""
        result, problem = None, None
        if self.rank == 0:
            try:
                result = work()
            except Exception as e:  # noqa: BLE001 - raised below, by all
                problem = e
        failure = None if problem is None else _told(problem)
        result, failure = self.from_rank_zero([result, failure])
        if failure is not None:
            raise problem or _error(0, *failure)
        return result

    def broadcast(self, buffer: torch.Tensor, source: int) -> None:
        """Fill `buffer` (uint8, on the host) on every rank with rank `source`'s bytes."""
        if self.world_size == 1 or buffer.numel() == 0:
            return
        device = self._device()
        if device.type == "cpu":
            dist.broadcast(buffer, src=source)
            return
        on_device = buffer.to(device)
        dist.broadcast(on_device, src=source)
        if self.rank != source:
            buffer.copy_(on_device)

    def _device(self) -> torch.device:
        """Where the group's backend wants its tensors: NCCL has no ears on the host."""
        if "gloo" in str(dist.get_backend_config()):
            return torch.device("cpu")
        accelerator = torch.accelerator.current_accelerator()
        return accelerator if accelerator is not None else torch.device("cpu")

    def _bytes(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device())

    def _tensor(self, data: bytes) -> torch.Tensor:
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._device())


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _told(problem: Exception) -> tuple[str, str]:
    """What peers are told of an error: its kind, if it is one of this library's, and its words."""
    if isinstance(problem, AccelCkptError):
        return errors.documented(type(problem)).__name__, str(problem)
    return "", f"{type(problem).__name__}: {problem}"


def _error(rank: int, kind: str, words: str) -> AccelCkptError:
    """The error of a peer."""
    if kind:
        known: type[AccelCkptError] = getattr(errors, kind)
        return known(f"rank {rank} found: {words}")
    return AccelCkptError(f"rank {rank} failed", why=words, remedy="its own error says where")


def _raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.cpu().numpy())
