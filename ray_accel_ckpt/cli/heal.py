"""`ray-accel-ckpt heal`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from ray_accel_ckpt.cli import output
from ray_accel_ckpt.cli.options import Anonymous, AsJson, EndpointUrl, Region, Run, place

if TYPE_CHECKING:
    from rich.console import RenderableType


class Order(StrEnum):
    MIN = "min"
    MAX = "max"


@dataclass(frozen=True, kw_only=True)
class Healed:
    """What was mended, or would be, a sentence each."""

    run: str
    dry_run: bool
    mended: tuple[str, ...]


def heal(
    run: Run,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Change nothing; say what would be mended.")
    ] = False,
    score: Annotated[
        str | None,
        typer.Option(
            "--score",
            metavar="METRIC",
            help="The run's checkpoint_score_attribute, if it has one.",
        ),
    ] = None,
    score_order: Annotated[
        Order, typer.Option("--score-order", help="The run's checkpoint_score_order.")
    ] = Order.MAX,
    as_json: AsJson = False,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    anonymous: Anonymous = False,
) -> None:
    """Mend what keeps a new driver from going on with a run that is not going.

    Ray's record of the run's checkpoints is written anew if it is torn, checkpoints that are gone
    are taken out of it, and newer ones that are whole are taken in. Checkpoints are not touched.
    run_config does this before each run.
    """
    from ray_accel_ckpt.runtime.heal import Score
    from ray_accel_ckpt.runtime.heal import heal as mend
    from ray_accel_ckpt.runtime.listing import require_run_of_ray

    filesystem, path = place(run, endpoint_url, region, anonymous)
    require_run_of_ray(filesystem, path)
    ranked_by = Score(attribute=score, order=score_order)
    mended = mend(filesystem, path, score=ranked_by, dry_run=dry_run)
    found = Healed(run=path, dry_run=dry_run, mended=mended)
    output.emit(found, lambda: _screen(found), as_json=as_json)


def _screen(found: Healed) -> Iterator[RenderableType]:
    if not found.mended:
        yield f"{found.run}: nothing is wrong"
        return
    yield f"{found.run}: {'would be' if found.dry_run else 'was'} mended"
    yield from (f"  {each}" for each in found.mended)
