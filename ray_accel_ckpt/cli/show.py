"""`ray-accel-ckpt show`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from ray_accel_ckpt.cli import output
from ray_accel_ckpt.cli.options import Anonymous, AsJson, Checkpoint, EndpointUrl, Region, place

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.tree import Tree

    from ray_accel_ckpt.storage.description import Description, PartLine, TensorLine


def show(
    checkpoint: Checkpoint,
    rank: Annotated[
        int, typer.Option(help="Whose: of what each worker has for itself.", metavar="N")
    ] = 0,
    brief: Annotated[
        bool, typer.Option("--brief", help="Parts only, without their tensors and values.")
    ] = False,
    as_json: AsJson = False,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    anonymous: Anonymous = False,
) -> None:
    """Show what lies in a checkpoint: parts, tensors, values, files. Tensors are not read."""
    from ray_accel_ckpt.storage.catalog import open_snapshot
    from ray_accel_ckpt.storage.description import describe

    described = describe(
        open_snapshot(*place(checkpoint, endpoint_url, region, anonymous)), rank=rank
    )
    output.emit(described, lambda: _screen(described, brief=brief), as_json=as_json)


def _screen(found: Description, *, brief: bool) -> Iterator[RenderableType]:
    yield found.path
    workers = output.counted(found.world_size, "worker")
    yield (
        f"step {found.step}, epoch {found.epoch}; saved {output.age(found.saved_at)} ago "
        f"by {workers}, {output.size(found.nbytes)}"
    )
    run = f"run {found.run}, " if found.run else ""
    yield (
        f"{run}attempt {found.attempt}; written by ray_accel_ckpt {found.library}, "
        f"format version {found.format_version}"
    )
    if found.random_streams:
        yield f"random streams of each worker: {', '.join(found.random_streams)}"
    if found.world_size > 1:
        yield f"below, what each worker has for itself is rank {found.rank}'s"
    yield ""
    for part in found.parts:
        yield _tree(_title(part), [] if brief else _lines(part))
    files = [[f.name, output.size(f.nbytes), "frozen" if f.frozen else ""] for f in found.files]
    yield _tree("files", _aligned(files))


def _title(part: PartLine) -> str:
    title = part.name if part.name == part.kind else f"{part.name}, of kind {part.kind}"
    if part.per_rank:
        title += ", each worker's own"
    if part.tensors:
        count = output.counted(len({each.stored for each in part.tensors}), "tensor")
        title += f", {count}, {output.size(part.nbytes)}"
    return title


def _lines(part: PartLine) -> list[str]:
    tied = {each.stored: each.path for each in reversed(part.tensors)}
    tensors = [_cells(part, each, tied[each.stored]) for each in part.tensors]
    values = [f"{each.path} = {each.value}" for each in part.values]
    omitted = [f"{name} was left out by a save hook" for name in part.omitted]
    return [*_aligned(tensors), *values, *omitted]


def _cells(part: PartLine, tensor: TensorLine, first: str) -> list[str]:
    remarks = [] if part.per_rank else [tensor.scope.replace("_", " ")]
    if tensor.frozen:
        remarks.append("frozen")
    if tensor.pieces > 1:
        remarks.append(f"{tensor.pieces} pieces")
    if tensor.path != first:
        remarks = [f"tied to {first}"]
    form = f"{tensor.dtype} {list(tensor.shape)}"
    return [tensor.path, form, output.size(tensor.nbytes), ", ".join(remarks)]


def _aligned(rows: list[list[str]]) -> list[str]:
    """Each row as one text, so that the columns stand below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _tree(title: str, lines: Iterable[str]) -> Tree:
    from rich.text import Text
    from rich.tree import Tree

    tree = Tree(Text(title, style="bold"), guide_style="dim")
    for line in lines:
        # Names may hold anything, markup too.
        tree.add(Text(line))
    return tree
