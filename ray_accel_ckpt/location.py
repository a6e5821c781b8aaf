"""Where something lies, as a path or a URI: what can be neither is refused where it is given."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ray_accel_ckpt.errors import ConfigurationError

_CUT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")
"""How a URI begins that was made a `pathlib.Path`: of two slashes one is left."""
_NO_BUCKET = re.compile(r"(s3a?|gs|gcs|abfss?)://([^/?#]*@)?([/?#]|$)")
"""Clients of object stores take some of these, and ask the network for what cannot be."""
_HOST = re.compile(r"(file|local)://(?![/~.])")
"""Taken for a path under the working directory otherwise."""
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def require_location(location: Any, *, name: str = "the directory") -> str:
    """The text of a location.

    Args:
        name: what it is, for messages.

    Raises:
        ConfigurationError: it is empty, neither text nor a path, or a URI that lost a slash, has no
            bucket, or a host in the place of a local path.
    """
    text = os.fspath(location) if isinstance(location, os.PathLike) else location
    if not isinstance(text, str):
        raise ConfigurationError(
            f"{name} must be a path or a URI, not {location!r}",
            remedy="give a str or a pathlib.Path",
        )
    if not text:
        raise ConfigurationError(
            f"{name} is empty",
            why="checkpoints would lie in the working directory, or at the root",
            remedy="give a directory; '.' is the working directory",
        )
    if _CUT.match(text):
        raise ConfigurationError(
            f"{name} is a URI that has lost a slash: {text!r}",
            why="pathlib.Path makes one slash of two, and a local directory of that name is hardly "
            "meant",
            remedy=f"give it as text: {text.replace(':/', '://', 1)!r}; begin a local path with ./",
        )
    if _NO_BUCKET.match(text):
        raise ConfigurationError(
            f"{name} is a URI without a bucket: {text!r}",
            why="what comes after the two slashes, up to the next one, is the bucket's name",
            remedy=f"give one like {text.partition('://')[0]}://bucket/run",
        )
    if _HOST.match(text):
        scheme, _, rest = text.partition("://")
        raise ConfigurationError(
            f"{name} is a URI of a local path that does not begin with a slash: {text!r}",
            why="what comes after the two slashes, up to the next one, would be a host, and files "
            "are those of this machine",
            remedy=f"give {scheme}:///{rest} if /{rest} is meant, or {rest or '.'!r} without "
            f"{scheme}:// if it is under the working directory",
        )
    return text


def require_local(location: str | os.PathLike[str], *, name: str) -> Path:
    """The location as an absolute path of this machine.

    Raises:
        ConfigurationError: it is a URI.
    """
    if _URI.match(os.fspath(location)):
        raise ConfigurationError(
            f"{name} must be a local path, not {os.fspath(location)!r}",
            why="it is written to the disks of this machine alone",
            remedy="give a path of this machine, and copy what is written there",
        )
    return Path(location).expanduser().absolute()
