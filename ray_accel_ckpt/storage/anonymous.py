"""Public buckets of S3, read without credentials: ``s3://anonymous@bucket/run``.

pyarrow knows such URIs for GCS, and for S3 no option in a URI that would say the same.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

from ray_accel_ckpt.errors import ConfigurationError

if TYPE_CHECKING:
    import pyarrow.fs as pafs

NOBODY = "anonymous@"
_OPTIONS = ("endpoint_override", "region", "scheme")
_SERVERS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
"""In the environment. pyarrow looks there for URIs, and not for a filesystem that is made."""


def is_anonymous_s3(uri: str) -> bool:
    return uri.startswith(f"s3://{NOBODY}")


def open_anonymous_s3(uri: str) -> tuple[pafs.S3FileSystem, str]:
    """The filesystem whose requests nobody signs, and the path on it.

    Raises:
        ConfigurationError: the URI has an option that is not known here.
        OSError: no region is given, and it could not be found out.
    """
    import pyarrow.fs as pafs

    parts = urlsplit(uri)
    options = dict(parse_qsl(parts.query))
    unknown = sorted(options.keys() - set(_OPTIONS))
    if unknown:
        raise ConfigurationError(
            f"a URI of a public bucket says {', '.join(unknown)}",
            where=uri.partition("?")[0],
            why=f"such a URI may say {', '.join(_OPTIONS)}",
            remedy="leave the rest out",
        )
    server = next(filter(None, map(os.environ.get, _SERVERS)), None)
    if server is not None and "endpoint_override" not in options:
        options |= {"endpoint_override": urlsplit(server).netloc, "scheme": urlsplit(server).scheme}
    bucket = parts.netloc.removeprefix(NOBODY)
    if not options.keys() & {"endpoint_override", "region"}:
        options["region"] = pafs.resolve_s3_region(bucket)
    return pafs.S3FileSystem(anonymous=True, **options), bucket + unquote(parts.path)
