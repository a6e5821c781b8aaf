"""What a URI could say of its server and its reader, said beside it."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qs, urlencode, urlsplit

from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.storage.anonymous import NOBODY

_S3 = ("s3", "s3a")
_BY_USER = ("s3", "gs", "gcs")
"""Schemes whose URIs say ``anonymous@``."""
_BY_QUERY = ("abfs", "abfss")
"""Schemes whose URIs say it among their options."""
_AZURE_ANONYMOUS = {"credential_kind": "anonymous"}


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where ``s3://`` URIs lead, and whether buckets are asked without credentials.

    Args:
        url: of the server, ``https://host:port``; None for Amazon's, or for that of
            ``AWS_ENDPOINT_URL``.
        region: of the bucket; None to have it found out.
        anonymous: no credentials are looked for or sent: for public buckets of ``s3://``,
            ``gs://`` and ``abfs://``. Otherwise those of the environment are, as ever.

    Raises:
        ConfigurationError: `url` is no URL of a server.
    """

    url: str | None = None
    region: str | None = None
    anonymous: bool = False

    def __post_init__(self) -> None:
        if self.url is None:
            return
        parts = urlsplit(self.url)
        beyond = parts.path.strip("/") or parts.query or parts.fragment
        if parts.scheme not in ("http", "https") or not parts.netloc or beyond:
            raise ConfigurationError(
                f"{self.url!r} is no URL of a server",
                where="--endpoint-url",
                remedy="give one like https://storage.example.com or http://localhost:9000",
            )

    @property
    def query(self) -> dict[str, str]:
        """What a URI says in its query, as pyarrow understands it."""
        found: dict[str, str] = {}
        if self.url is not None:
            parts = urlsplit(self.url)
            found |= {"endpoint_override": parts.netloc, "scheme": parts.scheme}
        if self.region is not None:
            found["region"] = self.region
        return found

    def complete(self, *locations: str) -> tuple[str, ...]:
        """The locations, those in buckets with what is said here in their URI.

        Raises:
            ConfigurationError: it is for none of them, or one says the same already.
        """
        if self.query and not any(_is_of(each, _S3) for each in locations):
            raise ConfigurationError(
                "an endpoint is given, and nothing that lies there",
                where=", ".join(locations),
                why="--endpoint-url and --region are for s3:// URIs",
                remedy="give a URI like s3://bucket/run, or leave them out",
            )
        if self.anonymous and not any(_is_of(each, _BY_USER + _BY_QUERY) for each in locations):
            raise ConfigurationError(
                "nothing is given that could be read without credentials",
                where=", ".join(locations),
                why="--anonymous is for s3://, gs:// and abfs:// URIs",
                remedy="give a URI like s3://bucket/run, or leave it out",
            )
        return tuple(map(self._completed, locations))

    def _completed(self, uri: str) -> str:
        if self.query and _is_of(uri, _S3):
            uri = _with_query(uri, self.query, "--endpoint-url and --region")
        if self.anonymous and _is_of(uri, _BY_QUERY):
            uri = _with_query(uri, _AZURE_ANONYMOUS, "--anonymous")
        if self.anonymous and _is_of(uri, _BY_USER):
            uri = _with_nobody(uri)
        return uri


def _with_query(uri: str, added: dict[str, str], options: str) -> str:
    path, _, query = uri.partition("?")
    twice = sorted(added.keys() & parse_qs(query).keys())
    if twice:
        raise _twice(path, twice[0], options)
    queries = [each for each in (query, urlencode(added)) if each]
    return "?".join([path, "&".join(queries)])


def _with_nobody(uri: str) -> str:
    scheme, _, rest = uri.partition("://")
    if "@" in rest.partition("/")[0]:
        raise _twice(f"{scheme}://{rest.rpartition('@')[2]}", "who asks", "--anonymous")
    return f"{scheme}://{NOBODY}{rest}"


def _twice(where: str, what: str, options: str) -> ConfigurationError:
    return ConfigurationError(
        f"the URI says {what} already",
        where=where,
        remedy=f"say it there or by {options}, not both",
    )


def _is_of(location: str, schemes: tuple[str, ...]) -> bool:
    return location.partition("://")[0] in schemes and "://" in location
