"""Options and arguments that several commands have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ray_accel_ckpt.storage.endpoint import Endpoint

if TYPE_CHECKING:
    from ray_accel_ckpt.storage.filesystem import Filesystem

Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="The directory that holds the checkpoints (Ray's <storage_path>/<name>): "
        "a path, or a URI (s3://, gs://, abfs://).",
    ),
]
Checkpoint = Annotated[
    str, typer.Argument(metavar="CKPT", help="The directory of a checkpoint: a path or a URI.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]
EndpointUrl = Annotated[
    str | None,
    typer.Option(
        "--endpoint-url",
        metavar="URL",
        help="The server that s3:// URIs lead to, if it is not Amazon's.",
    ),
]
Region = Annotated[
    str | None, typer.Option("--region", metavar="NAME", help="The region of s3:// buckets.")
]
Anonymous = Annotated[
    bool,
    typer.Option(
        "--anonymous",
        help="Look for no credentials and send none: for public buckets of s3://, gs://, abfs://.",
    ),
]


def place(
    location: str, endpoint_url: str | None, region: str | None, anonymous: bool
) -> tuple[Filesystem, str]:
    """Where a location lies: its filesystem, and its path there."""
    from ray_accel_ckpt.storage.filesystem import resolve

    endpoint = Endpoint(url=endpoint_url, region=region, anonymous=anonymous)
    (completed,) = endpoint.complete(location)
    return resolve(completed)
