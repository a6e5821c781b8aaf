"""Servers that speak S3 and are not Amazon's, said beside a URI instead of in it."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qs, urlencode, urlsplit

from ray_accel_ckpt.errors import ConfigurationError

_SCHEMES = ("s3", "s3a")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where ``s3://`` URIs lead. Credentials are those of the environment, as ever.

    Args:
        url: of the server, ``https://host:port``; None for Amazon's, or for that of
            ``AWS_ENDPOINT_URL``.
        region: of the bucket; None to have it found out.

    Raises:
        ConfigurationError: `url` is no URL of a server.
    """

    url: str | None = None
    region: str | None = None

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
        """The locations, those of ``s3://`` with this endpoint in their query.

        Raises:
            ConfigurationError: none of them is of ``s3://``, or one has an endpoint already.
        """
        if self.query and not any(map(_is_s3, locations)):
            raise ConfigurationError(
                "an endpoint is given, and nothing that lies there",
                where=", ".join(locations),
                why="--endpoint-url and --region are for s3:// URIs",
                remedy="give a URI like s3://bucket/run, or leave them out",
            )
        return tuple(self._completed(each) if _is_s3(each) else each for each in locations)

    def _completed(self, uri: str) -> str:
        path, _, query = uri.partition("?")
        twice = sorted(self.query.keys() & parse_qs(query).keys())
        if twice:
            raise ConfigurationError(
                f"the URI says {twice[0]} already",
                where=path,
                remedy="say it there or by --endpoint-url and --region, not both",
            )
        queries = [each for each in (query, urlencode(self.query)) if each]
        return "?".join([path, "&".join(queries)]) if queries else path


def _is_s3(location: str) -> bool:
    return location.partition("://")[0] in _SCHEMES and "://" in location
