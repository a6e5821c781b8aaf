"""`ray-accel-ckpt diff`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ray_accel_ckpt.cli import output
from ray_accel_ckpt.cli.options import Anonymous, AsJson, EndpointUrl, Region
from ray_accel_ckpt.runtime.progress import reading
from ray_accel_ckpt.storage.endpoint import Endpoint

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ray_accel_ckpt.storage.comparison import ChangedTensor, Comparison, Side
    from ray_accel_ckpt.storage.proving import Watcher

_SHOWN = 20
"""Lines of one kind on a screen; the JSON has all."""


def diff(
    left: Annotated[str, typer.Argument(metavar="A", help="A checkpoint: a path or a URI.")],
    right: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    every: Annotated[
        bool, typer.Option("--all", help=f"All differences, not {_SHOWN} of each kind.")
    ] = False,
    as_json: AsJson = False,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    anonymous: Anonymous = False,
) -> None:
    """Compare two checkpoints bit for bit: tensors, and all values that are none.

    How the state is cut into files, and by how many workers, does not matter; when and by which
    run it was saved neither. One tensor of each is in memory at a time.

    Exit status: 0 if they are the same, 1 if not, 2 if one of them cannot be read.
    """
    from ray_accel_ckpt.storage.comparison import compare

    places = Endpoint(url=endpoint_url, region=region, anonymous=anonymous).complete(left, right)
    with reading() as watcher:
        found = compare(*_sides(places, watcher))
    limit = None if every else _SHOWN
    output.emit(found, lambda: _screen(found, limit), as_json=as_json)
    raise typer.Exit(0 if found.same else 1)


def _sides(places: Sequence[str], watcher: Watcher) -> Iterator[Side]:
    from ray_accel_ckpt.storage.catalog import ShardFetch, open_snapshot
    from ray_accel_ckpt.storage.comparison import Side
    from ray_accel_ckpt.storage.filesystem import resolve
    from ray_accel_ckpt.storage.proving import Watched

    opened = []
    for each in places:
        filesystem, path = resolve(each)
        opened.append((filesystem, open_snapshot(filesystem, path)))
    shards = [shard for _, snapshot in opened for shard in snapshot.shards.values()]
    watcher.begins("reading", sum(shard.nbytes for shard in shards))
    for filesystem, snapshot in opened:
        fetch = ShardFetch(Watched(filesystem, watcher), snapshot)
        yield Side(snapshot=snapshot, fetch=fetch)


def _screen(found: Comparison, limit: int | None) -> Iterator[RenderableType]:
    yield f"A  {found.left}"
    yield f"B  {found.right}"
    yield ""
    if found.same:
        tensors = output.counted(found.tensors, "tensor")
        yield f"the same bit for bit: {tensors}, and all other values"
        return
    for name, paths in (("A", found.only_left), ("B", found.only_right)):
        if paths:
            yield f"only in {name}:"
            yield from (f"  {path}" for path in paths[:limit])
            yield from _more(paths, limit)
            yield ""
    if found.reshaped:
        rows = [
            (r.path, *(f"{f.dtype} {list(f.shape)}" for f in (r.left, r.right)))
            for r in found.reshaped
        ]
        yield from _table(("SHAPE OR DTYPE", "A", "B"), rows, limit)
    if found.changed:
        numbers = ("ELEMENTS", "DIFFER", "FIRST", "ABSOLUTE", "RELATIVE", "NAN")
        rows = [_numbers(each) for each in found.changed]
        yield from _table(("TENSOR", *numbers), rows, limit, numbers)
    if found.values:
        rows = [(each.path, each.left, each.right) for each in found.values]
        yield from _table(("VALUE", "A", "B"), rows, limit)
    yield f"{found.equal} of {output.counted(found.tensors, 'tensor')} are equal bit for bit"
    if found.changed:
        yield f"the first that differs is {found.changed[0].path}"


def _numbers(changed: ChangedTensor) -> tuple[str, ...]:
    gap = changed.difference
    if gap is None:
        return (changed.path, *"------")
    numbers = output.number(gap.absolute), output.number(gap.relative)
    counts = str(gap.numel), str(gap.count), str(gap.first)
    return (changed.path, *counts, *numbers, str(gap.nan))


def _table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    limit: int | None,
    numbers: Sequence[str] = (),
) -> Iterator[RenderableType]:
    table = output.table(*columns, numbers=numbers)
    for row in rows[:limit]:
        table.add_row(*row)
    yield table
    yield from _more(rows, limit)
    yield ""


def _more(found: Sequence[object], limit: int | None) -> Iterator[str]:
    if limit is not None and len(found) > limit:
        yield f"  and {len(found) - limit} more: --all shows them"
