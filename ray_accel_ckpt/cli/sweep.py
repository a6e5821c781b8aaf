"""`ray-accel-ckpt sweep`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from ray_accel_ckpt.cli import output
from ray_accel_ckpt.cli.options import Anonymous, AsJson, EndpointUrl, Region, Run, place

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ray_accel_ckpt.runtime.quiet import Swept

_SECONDS = {"": 1, "s": 1, "min": 60, "h": 3600, "d": 86_400}


def _duration(text: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(s|min|h|d|)", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no time: give one like 90s, 30min, 1h or 2d")
    return float(match[1]) * _SECONDS[match[2]]


def sweep(
    run: Run,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Remove nothing; say what would be removed.")
    ] = False,
    older_than: Annotated[
        float,
        typer.Option(
            "--older-than",
            metavar="TIME",
            parser=_duration,
            help="How long nothing must have been written to the run (90s, 30min, 1h, 2d), "
            "so that it is not going. 0s if you know that it is not.",
        ),
    ] = "1h",  # type: ignore[assignment]  # parsed like what is typed
    as_json: AsJson = False,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    anonymous: Anonymous = False,
) -> None:
    """Remove what earlier attempts left in a run that is not going, and nobody will use.

    That is: saves that were cut off, and checkpoints that Ray never registered and that are older
    than the latest it has. What Ray names is never removed, nor a directory that holds anything
    that this library did not write. A run that goes on sweeps itself.
    """
    from ray_accel_ckpt.runtime.quiet import sweep_quiet_run

    filesystem, path = place(run, endpoint_url, region, anonymous)
    found = sweep_quiet_run(filesystem, path, quiet_for=older_than, dry_run=dry_run)
    output.emit(found, lambda: _screen(found), as_json=as_json)


def _screen(found: Swept) -> Iterator[RenderableType]:
    if not found.directories:
        yield f"{found.run}: nothing to sweep"
        return
    yield f"{found.run}: {'would be' if found.dry_run else 'was'} removed"
    yield ""
    table = output.table("DIRECTORY", "SIZE", "WHY")
    for each in found.directories:
        table.add_row(each.name, output.size(each.nbytes), each.why)
    yield table
