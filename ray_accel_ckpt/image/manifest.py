"""The manifest: what one rank wrote, how to prove it, and all that is no tensor.

The file is one line of JSON whose first member proves the rest:

    {"checksum":"<xxh3-128 of BODY>","body":BODY}

BODY's bytes are hashed as they stand, so nothing depends on how JSON is spaced.
What is read is validated strictly before any of it is believed: a manifest may
come from anyone. See docs/format.md and docs/manifest.schema.json.
"""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from typing import Annotated, Any, Final, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from ray_accel_ckpt import errors
from ray_accel_ckpt.image.dtypes import dtype_named
from ray_accel_ckpt.state.box import Box
from ray_accel_ckpt.state.part import Scope

FORMAT: Final = "ray_accel_ckpt"
VERSION: Final = 3
"""The newest. What needs nothing of it is written as version 2, which more readers read."""
BLOCK = 2**20
"""Bytes that one checksum covers, in what is written: who wants some rows reads little more."""
_BLOCK_OF_VERSION_1 = 16 * 2**20
MAX_NBYTES = 128 * 2**20
"""Longest manifest that is written, or read at all."""
MAX_HEADER_NBYTES = 8 + 100_000_000
"""Longest header of a shard: safetensors reads none that is longer."""
MAX_DIMENSIONS = 64
MAX_NAME = 4096

_PREFIX, _MIDDLE, _SUFFIX = b'{"checksum":"', b'","body":', b"}\n"
_FILE = re.compile(r"(shard|frozen|manifest)-([0-9]{5})-of-([0-9]{5})\.(safetensors|json)")

Count = Annotated[int, Field(ge=0, lt=2**62)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SliceInfo(_Strict):
    """A box of one tensor and the bytes [begin, end) of the shard that hold it."""

    name: Name
    scope: Literal["replicated", "rank_zero", "per_rank", "sharded"]
    dtype: str
    shape: Annotated[list[Count], Field(max_length=MAX_DIMENSIONS)]
    offsets: Annotated[list[Count], Field(max_length=MAX_DIMENSIONS)]
    sizes: Annotated[list[Count], Field(max_length=MAX_DIMENSIONS)]
    begin: Count
    end: Count
    blocks: Annotated[list[Digest], FailFast()]

    @property
    def box(self) -> Box:
        return Box(start=tuple(self.offsets), size=tuple(self.sizes))


class ShardInfo(_Strict):
    """A file of tensors beside this manifest."""

    file: str
    nbytes: Count
    block: Annotated[int, Field(ge=64, le=2**30, multiple_of=64)]
    header_nbytes: Count
    header_checksum: Digest


class FrozenInfo(_Strict):
    """What of this rank's share did not change, in a file of its own that many checkpoints have."""

    shard: ShardInfo
    slices: Annotated[list[SliceInfo], FailFast()]


class PartInfo(_Strict):
    """One part's values: tagged JSON, see `state.tree`."""

    kind: Name
    per_rank: bool
    omitted: Annotated[list[str], FailFast()]
    value: Any


class Manifest(_Strict):
    """One rank's record of one save."""

    format: Literal["ray_accel_ckpt"]
    version: Literal[2, 3]
    library: str
    run: str
    attempt: Annotated[str, Field(pattern=r"^[0-9a-f]{6,32}$")]
    step: Count
    epoch: Count
    saved_at: float
    world_size: Annotated[int, Field(ge=1, le=99_999)]
    rank: Count
    plan: Digest
    shard: ShardInfo
    # A list of a million faults would be a bomb of its own: the first is enough.
    slices: Annotated[list[SliceInfo], FailFast()]
    parts: Annotated[dict[Name, PartInfo], Field(max_length=10_000)]
    frozen: FrozenInfo | None = None

    @property
    def files(self) -> list[tuple[ShardInfo, list[SliceInfo]]]:
        """Each file of tensors and what lies in it; the shard comes first."""
        more = [] if self.frozen is None else [(self.frozen.shard, self.frozen.slices)]
        return [(self.shard, self.slices), *more]


def shard_name(rank: int, world_size: int) -> str:
    return f"shard-{rank:05d}-of-{world_size:05d}.safetensors"


def frozen_name(rank: int, world_size: int) -> str:
    return f"frozen-{rank:05d}-of-{world_size:05d}.safetensors"


def manifest_name(rank: int, world_size: int) -> str:
    return f"manifest-{rank:05d}-of-{world_size:05d}.json"


def parse_name(file: str) -> tuple[str, int, int] | None:
    """(kind, rank, world size) of a file name of ours, else None.

    The kind is ``"shard"``, ``"frozen"`` or ``"manifest"``.
    """
    match = _FILE.fullmatch(file)
    if match is None or (match[1] == "manifest") != (match[4] == "json"):
        return None
    rank, world_size = int(match[2]), int(match[3])
    return (match[1], rank, world_size) if rank < world_size else None


def encode(manifest: Manifest) -> bytes:
    """The bytes of the file.

    Raises:
        UnsupportedStateError: it would be too long to be read again.
    """
    content = dict(vars(manifest))
    if manifest.version == 2:
        del content["frozen"]
    # Not by pydantic's own dump, which looks at each value of all parts.
    text = json.dumps(content, separators=(",", ":"), allow_nan=False, default=_members)
    body = text.encode("ascii")
    if len(body) > MAX_NBYTES - 64:
        largest = max(manifest.parts, key=lambda name: len(json.dumps(manifest.parts[name].value)))
        raise errors.UnsupportedStateError(
            f"a manifest of {len(body)} bytes is too long",
            where=largest,
            why=f"the limit is {MAX_NBYTES}; this part has the most values that are no tensors",
            remedy="return tensors or numpy arrays from its state_dict(), not long lists",
        )
    return _PREFIX + _digest(body).encode() + _MIDDLE + body + _SUFFIX


def _members(model: object) -> dict[str, Any]:
    if not isinstance(model, _Strict):
        raise TypeError(f"a manifest cannot hold a {type(model).__qualname__}")
    return vars(model)


def decode(data: bytes, where: str) -> Manifest:
    """Check and read a manifest.

    Args:
        data: the bytes of the file.
        where: its path, for errors.

    Raises:
        CorruptCheckpointError: any byte differs from what was written, or the
            content is not a valid manifest.
        FormatVersionError: it is of a newer format.
    """
    start = len(_PREFIX) + 32
    body = data[start + len(_MIDDLE) : -len(_SUFFIX)]
    framed = (
        data.startswith(_PREFIX)
        and data[start : start + len(_MIDDLE)] == _MIDDLE
        and data.endswith(_SUFFIX)
    )
    if not framed:
        raise _corrupt(where, "it does not begin and end as one: cut off, or not of this library")
    if data[len(_PREFIX) : start] != _digest(body).encode():
        raise _corrupt(where, "its checksum does not match its content")
    try:
        raw = json.loads(body, parse_constant=_no_constant)
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise _corrupt(where, "its content is not a manifest of this library")
        version = raw.get("version")
        if type(version) is not int:
            raise _corrupt(where, "its format version is no number")
        if version > VERSION:
            raise errors.FormatVersionError(
                f"the checkpoint has format version {version}; this library reads up to {VERSION}",
                where=where,
                remedy="upgrade ray_accel_ckpt to read it",
            )
        if version < 3 and "frozen" in raw:
            raise ValueError("a member of version 3")
        manifest = Manifest.model_validate(_from_version_1(raw) if version == 1 else raw)
    except (
        *(ValidationError, ValueError, RecursionError, MemoryError),
        *(KeyError, TypeError, AttributeError),
    ) as e:
        raise _corrupt(where, f"{type(e).__name__}: {str(e)[:500]}") from e
    _check(manifest, where)
    return manifest


def _from_version_1(raw: dict[str, Any]) -> dict[str, Any]:
    """The same manifest as version 2 writes it: slices were rows, blocks were longer."""

    def boxed(info: dict[str, Any]) -> dict[str, Any]:
        if {"offsets", "sizes"} & set(info):
            raise ValueError("a slice of version 1 has the members of version 2")
        rest = {k: v for k, v in info.items() if k not in ("offset", "length")}
        inner = info["shape"][1:]
        offset, length = [info["offset"]], [info["length"]]
        if not info["shape"]:
            # A scalar was row 0 of 1.
            offset, length = offset[info["offset"] == 0 :], length[info["length"] == 1 :]
        return {**rest, "offsets": [*offset, *(0 for _ in inner)], "sizes": [*length, *inner]}

    if "block" in raw["shard"]:
        raise ValueError("a shard of version 1 has the members of version 2")
    shard = {**raw["shard"], "block": _BLOCK_OF_VERSION_1}
    return {**raw, "version": 2, "shard": shard, "slices": list(map(boxed, raw["slices"]))}


def _check(manifest: Manifest, where: str) -> None:
    """What a schema cannot say: that all byte ranges are true to each other."""
    if manifest.rank >= manifest.world_size:
        raise _corrupt(where, f"rank {manifest.rank} of {manifest.world_size} ranks")
    if (manifest.version == 3) != (manifest.frozen is not None):
        raise _corrupt(where, "a file of frozen tensors and version 3 go together")
    named = (shard_name, frozen_name)
    for (shard, slices), name in zip(manifest.files, named, strict=False):
        if shard.file != name(manifest.rank, manifest.world_size):
            raise _corrupt(where, f"it names the shard {shard.file[:100]!r}")
        _check_file(shard, slices, where)
    names = [info.name for _, slices in manifest.files for info in slices]
    if len(set(names)) != len(names):
        raise _corrupt(where, "a tensor is named twice")


def _check_file(shard: ShardInfo, slices: list[SliceInfo], where: str) -> None:
    if not 8 <= shard.header_nbytes <= shard.nbytes:
        raise _corrupt(where, "the shard's header is longer than the shard")
    if shard.header_nbytes > MAX_HEADER_NBYTES:
        raise _corrupt(where, "the shard's header is longer than any")
    for info in slices:
        _check_slice(info, shard.block, where)
    ranges = sorted((info.begin, info.end) for info in slices if info.begin < info.end)
    ends = [(0, shard.header_nbytes), *ranges, (shard.nbytes,) * 2]
    if any(end != begin for (_, end), (begin, _) in pairwise(ends)):
        raise _corrupt(where, "slices overlap, leave gaps, or reach beyond the shard")


def _check_slice(info: SliceInfo, block: int, where: str) -> None:
    name = info.name[:200]
    dtype = dtype_named(info.dtype)
    if dtype is None:
        raise _corrupt(where, f"tensor {name!r} has no dtype that is known: {info.dtype[:50]!r}")
    if not len(info.shape) == len(info.offsets) == len(info.sizes):
        raise _corrupt(where, f"tensor {name!r} has a slice of other dimensions than its own")
    ends = [offset + size for offset, size in zip(info.offsets, info.sizes, strict=True)]
    nbytes = math.prod(info.sizes) * dtype.itemsize
    outside = any(end > n for end, n in zip(ends, info.shape, strict=True))
    if outside or info.begin + nbytes != info.end:
        raise _corrupt(where, f"tensor {name!r} does not have the bytes of its shape")
    if math.prod(max(n, 1) for n in info.shape) * dtype.itemsize >= 2**62:
        raise _corrupt(where, f"tensor {name!r} has a shape beyond any memory")
    if info.begin % dtype.itemsize:
        raise _corrupt(where, f"tensor {name!r} is not aligned to its dtype")
    shared = info.scope in (Scope.REPLICATED, Scope.SHARDED)
    if not shared and info.sizes != info.shape:
        raise _corrupt(where, f"tensor {name!r} is cut, but not shared")
    if len(info.blocks) != -(-nbytes // block):
        raise _corrupt(where, f"tensor {name!r} has {len(info.blocks)} checksums")


def _corrupt(where: str, why: str) -> errors.CorruptCheckpointError:
    return errors.CorruptCheckpointError(
        "a manifest cannot be believed",
        where=where,
        why=why,
        remedy="load_state() without a directory passes it over; delete it if it is of no use",
    )


def _digest(body: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(body)


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")
