"""`ray-accel-ckpt export`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from ray_accel_ckpt.cli import output
from ray_accel_ckpt.cli.options import Anonymous, AsJson, Checkpoint, EndpointUrl, Region
from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.runtime.progress import reading
from ray_accel_ckpt.storage.endpoint import Endpoint

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ray_accel_ckpt.storage.opened import Watching


class To(StrEnum):
    SAFETENSORS = "safetensors"
    TORCH = "torch"
    DCP = "dcp"
    ACCELERATE = "accelerate"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, as paths on their filesystem."""

    to: To
    written: tuple[str, ...]


def _safetensors(checkpoint: Watching, out: str, parts: tuple[str, ...] | None) -> tuple[str, ...]:
    from ray_accel_ckpt.integrations.export import export_safetensors

    if parts is None:
        return export_safetensors(checkpoint, out)
    if len(parts) > 1:
        raise ConfigurationError(
            "safetensors files hold one part",
            where="--part",
            remedy="export each part to a directory of its own",
        )
    return export_safetensors(checkpoint, out, part=parts[0])


def _torch(checkpoint: Watching, out: str, parts: tuple[str, ...] | None) -> tuple[str, ...]:
    from ray_accel_ckpt.integrations.export_torch import export_torch

    return (export_torch(checkpoint, out, parts=parts),)


def _dcp(checkpoint: Watching, out: str, parts: tuple[str, ...] | None) -> tuple[str, ...]:
    from ray_accel_ckpt.integrations.dcp import to_dcp

    return (to_dcp(checkpoint, out, parts=parts),)


def _accelerate(checkpoint: Watching, out: str, parts: tuple[str, ...] | None) -> tuple[str, ...]:
    from ray_accel_ckpt.integrations.accelerate import to_accelerate

    if parts is not None:
        raise ConfigurationError(
            "Accelerate loads all of a folder",
            where="--part",
            remedy="leave it out",
        )
    return (to_accelerate(checkpoint, out),)


_WRITERS: dict[To, Callable[[Watching, str, tuple[str, ...] | None], tuple[str, ...]]] = {
    To.SAFETENSORS: _safetensors,
    To.TORCH: _torch,
    To.DCP: _dcp,
    To.ACCELERATE: _accelerate,
}


def export(
    checkpoint: Checkpoint,
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT",
            help="Where to: a new directory, for torch a new file. A path or a URI.",
        ),
    ],
    to: Annotated[
        To,
        typer.Option(
            "--to",
            help="safetensors: the weights of one part, as transformers and others load them. "
            "torch: one file of state dicts for torch.load(weights_only=True). "
            "dcp: a checkpoint of torch.distributed.checkpoint. "
            "accelerate: a folder for Accelerator.load_state, on this machine.",
        ),
    ],
    part: Annotated[
        list[str] | None,
        typer.Option(
            "--part",
            metavar="NAME",
            help="A part to export, see show; may be repeated. Without it: model for "
            "safetensors, else all that the workers share.",
        ),
    ] = None,
    as_json: AsJson = False,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    anonymous: Anonymous = False,
) -> None:
    """Write a checkpoint in a form that other tools read. Nothing is overwritten."""
    from ray_accel_ckpt.storage.opened import Watching

    endpoint = Endpoint(url=endpoint_url, region=region, anonymous=anonymous)
    source, target = endpoint.complete(checkpoint, out)
    with reading() as watcher:
        watched = Watching(checkpoint=source, watcher=watcher)
        written = _WRITERS[to](watched, target, tuple(part) if part else None)
    found = Exported(to=to, written=written)
    output.emit(found, lambda: _screen(found), as_json=as_json)


def _screen(found: Exported) -> Iterator[RenderableType]:
    yield from (f"written: {path}" for path in found.written)
