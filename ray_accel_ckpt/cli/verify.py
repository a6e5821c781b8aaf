"""`ray-accel-ckpt verify`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ray_accel_ckpt.cli import output
from ray_accel_ckpt.cli.options import Anonymous, AsJson, EndpointUrl, Region, place
from ray_accel_ckpt.runtime.progress import reading

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ray_accel_ckpt.storage.proving import Proof


@dataclass(frozen=True, kw_only=True)
class Verified:
    good: bool
    checkpoints: tuple[Proof, ...]


def verify(
    location: Annotated[
        str,
        typer.Argument(
            metavar="CKPT|RUN",
            help="The directory of a checkpoint, or of a run: then all of its checkpoints. "
            "A path or a URI.",
        ),
    ],
    as_json: AsJson = False,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    anonymous: Anonymous = False,
) -> None:
    """Read every byte of one checkpoint, or of all of a run, and prove it by its checksum.

    Exit status: 0 if all are good, 1 if one is not (a save that was cut off is not), 2 if that
    cannot be told.
    """
    from ray_accel_ckpt.storage.proving import prove
    from ray_accel_ckpt.storage.survey import checkpoints_at

    filesystem, path = place(location, endpoint_url, region, anonymous)
    with reading() as watcher:
        proofs = tuple(prove(filesystem, p, watcher) for p in checkpoints_at(filesystem, path))
    found = Verified(good=all(each.condition == "good" for each in proofs), checkpoints=proofs)
    output.emit(found, lambda: _screen(found), as_json=as_json)
    raise typer.Exit(0 if found.good else 1)


def _screen(found: Verified) -> Iterator[RenderableType]:
    table = output.table("CHECKPOINT", "STATE", "FILES", "READ", numbers=("FILES", "READ"))
    for each in found.checkpoints:
        style = "" if each.condition == "good" else "red"
        cells = (str(each.files), output.size(each.nbytes)) if each.files else ("-", "-")
        table.add_row(each.name, each.condition, *cells, style=style)
    yield table
    good = sum(each.condition == "good" for each in found.checkpoints)
    yield f"{good} of {output.counted(len(found.checkpoints), 'checkpoint')} good"
    for each in found.checkpoints:
        for fault in each.faults:
            yield ""
            yield fault.where
            yield f"  {fault.what}"
            if fault.why:
                yield f"  why: {fault.why}"
