"""HTTP to a metadata service: never through a proxy, never for long."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import requests

from ray_accel_ckpt.errors import MetadataError

DEFAULT_URL = "http://169.254.169.254"
"""Where AWS, GCP and Azure have theirs."""

CONNECT_TIMEOUT, READ_TIMEOUT = 1.0, 2.0
LARGEST_ANSWER = 256 * 1024

UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What taking garbage for a document of JSON raises."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    status: int
    text: str
    headers: Mapping[str, str]
    path: str

    def found(self) -> str | None:
        """The text, or None if there is nothing (404).

        Raises:
            MetadataError: any other answer.
        """
        if self.status == 404:
            return None
        if self.status == 200:
            return self.text
        raise MetadataError(f"the metadata service answered {self.status}", where=self.path)


class Metadata:
    """The service at one base URL."""

    def __init__(self, base_url: str = DEFAULT_URL) -> None:
        self._base_url = base_url.rstrip("/")
        self._session = requests.Session()
        # Proxies and .netrc of the environment are for the outer world.
        self._session.trust_env = False

    @property
    def base_url(self) -> str:
        return self._base_url

    def get(self, path: str, headers: Mapping[str, str]) -> Reply:
        """Raises MetadataError if there is no answer within about three seconds."""
        return self._ask("GET", path, headers)

    def put(self, path: str, headers: Mapping[str, str]) -> Reply:
        """Raises MetadataError if there is no answer within about three seconds."""
        return self._ask("PUT", path, headers)

    def _ask(self, method: str, path: str, headers: Mapping[str, str]) -> Reply:
        url = self._base_url + path
        try:
            with self._session.request(
                method,
                url,
                headers=dict(headers),
                timeout=(CONNECT_TIMEOUT, READ_TIMEOUT),
                allow_redirects=False,
                stream=True,
            ) as response:
                return Reply(
                    status=response.status_code,
                    text=_body(response).decode(errors="replace"),
                    headers=response.headers,
                    path=path,
                )
        except (requests.RequestException, OSError) as error:
            raise MetadataError(
                "the metadata service does not answer", where=url, why=str(error)
            ) from error


def _body(response: requests.Response) -> bytes:
    """All of the body, in bounded time: a read timeout alone starts anew with each byte."""
    end = time.monotonic() + READ_TIMEOUT
    body = bytearray()
    for byte in response.iter_content(chunk_size=1):
        body += byte
        if time.monotonic() > end:
            raise requests.ReadTimeout(f"the body was not whole after {READ_TIMEOUT} s")
        if len(body) > LARGEST_ANSWER:
            raise requests.RequestException(f"the body has more than {LARGEST_ANSWER} bytes")
    return bytes(body)
