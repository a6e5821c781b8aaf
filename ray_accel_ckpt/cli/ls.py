"""`ray-accel-ckpt ls`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ray_accel_ckpt.cli import output
from ray_accel_ckpt.cli.options import Anonymous, AsJson, EndpointUrl, Region, Run, place

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ray_accel_ckpt.runtime.listing import ListedCheckpoint, RunListing


def ls(
    run: Run,
    as_json: AsJson = False,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    anonymous: Anonymous = False,
) -> None:
    """List the checkpoints of a run, the newest first.

    Each is opened and checked for wholeness: are all manifests there, do they agree, has each
    file its length. Tensors are not read: see verify.
    """
    from ray_accel_ckpt.runtime.listing import list_run

    listing = list_run(*place(run, endpoint_url, region, anonymous))
    output.emit(listing, lambda: _screen(listing), as_json=as_json)


def _screen(listing: RunListing) -> Iterator[RenderableType]:
    yield f"{listing.run}: {output.counted(len(listing.checkpoints), 'checkpoint')}"
    yield ""
    numbers = ("STEP", "EPOCH", "AGE", "SIZE", "RANKS")
    table = output.table("CHECKPOINT", *numbers, "STATE", "RAY", numbers=numbers)
    for each in listing.checkpoints:
        step, epoch, ranks = (
            "-" if number is None else str(number)
            for number in (each.step, each.epoch, each.world_size)
        )
        nbytes = output.size(each.nbytes) if each.nbytes else "-"
        cells = (step, epoch, output.age(each.saved_at), nbytes, ranks)
        table.add_row(each.name, *cells, each.condition, _known(each), style=_style(each))
    yield table
    remarks = list(_remarks(listing))
    if remarks:
        yield ""
        yield from remarks


def _known(checkpoint: ListedCheckpoint) -> str:
    """What Ray's record says of it."""
    if checkpoint.latest:
        return "latest"
    return "known" if checkpoint.registered else "-"


def _style(checkpoint: ListedCheckpoint) -> str:
    return "" if checkpoint.condition == "good" else "red"


def _remarks(listing: RunListing) -> Iterator[str]:
    for each in listing.checkpoints:
        if each.why:
            yield f"{each.name}: {each.why}"
        if each.stands_for is not None:
            yield f"{each.name}: stands for {each.stands_for}"
    if listing.record == "torn":
        yield "Ray's record of the run is torn, no driver can go on with it: ray-accel-ckpt heal"
