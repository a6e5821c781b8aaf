"""Runs a function in several real processes that form a gloo group."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Forked from a process that has imported what takes seconds to import, and done nothing else.
_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["ray_accel_ckpt", "torch.distributed.fsdp", "tests.training"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def spawn(function: Callable[..., Any], world_size: int, *args: Any, kills: bool = False) -> None:
    """Call ``function(rank, world_size, *args)`` in each process; raise what any raised.

    With `kills` the processes may die by SIGKILL, which is then no error.
    """
    # The process that they are forked from has the environment of when it was started.
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    failures = _CONTEXT.SimpleQueue()
    processes = [
        _CONTEXT.Process(
            target=_run, args=(function, rank, world_size, environment, failures, args)
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    _join(processes, kills=kills)
    found = []
    while not failures.empty():
        found.append(failures.get())
    codes = [process.exitcode for process in processes]
    if not kills:
        assert not found, "\n".join(found)
        assert codes == [0] * world_size, f"exit codes {codes}"


def _join(processes: list[Any], *, kills: bool) -> None:
    """Wait for all. One that failed leaves its peers waiting for it: these are ended."""
    running = {process.sentinel: process for process in processes}
    while running:
        for sentinel in multiprocessing.connection.wait(list(running)):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode != 0 and not kills:
                for other in running.values():
                    other.kill()


def _run(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    environment: dict[str, str],
    failures: Any,
    args: tuple[Any, ...],
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        function(rank, world_size, *args)
    except BaseException:
        failures.put(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
    dist.barrier()
    dist.destroy_process_group()


def form(rank: int, size: int, store: Path) -> None:
    """Make the first `size` processes a group; each must have left the one before it."""
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), size), rank=rank, world_size=size
    )


@contextlib.contextmanager
def smaller_group(rank: int, size: int, store: Path) -> Iterator[bool]:
    """Between two groups of all: the first `size` are one for a while; whether this rank is in it.

    Starting processes costs seconds, forming a group milliseconds.
    """
    world_size = dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()
    if rank < size:
        form(rank, size, store)
    yield rank < size
    if rank < size:
        dist.barrier()
        dist.destroy_process_group()
    form(rank, world_size, store.with_name(f"{store.name}-after"))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
