"""A saved state as it is nested, seen without reading its tensors.

What is a mapping or a sequence opens into members. A sequence of single values
(``betas``, the names of a group's parameters, a stream of 625 numbers) is one value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ray_accel_ckpt.errors import CorruptCheckpointError
from ray_accel_ckpt.state.part import SavedPart
from ray_accel_ckpt.state.tree import TAG, Json, unflatten

_SEQUENCES = ("tuple", "set", "frozenset", "deque")
_MAPPINGS = ("dict", "OrderedDict", "Counter")
_STORED = ("tensor", "ndarray")


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One value of a state, or one tensor.

    Attributes:
        path: where it is, ``optimizer/groups/0/lr``.
        value: as it is encoded.
    """

    path: str
    value: Json

    @property
    def stored(self) -> str:
        """The name under which the bytes of a tensor or numpy array are stored; "" for others."""
        is_stored = isinstance(self.value, dict) and self.value.get(TAG) in _STORED
        return str(self.value.get("name", "")) if is_stored else ""


def leaves(value: Json, path: str) -> Iterator[Leaf]:
    """All leaves of an encoded state, in their order.

    Raises:
        CorruptCheckpointError: it is not what `state.tree` writes.
    """
    stack = [Leaf(path=path, value=value)]
    while stack:
        leaf = stack.pop()
        opened = members(leaf.value)
        if opened is None:
            yield leaf
        else:
            below = [Leaf(path=f"{leaf.path}/{n}", value=member) for n, member in opened.items()]
            stack.extend(reversed(below))


def members(value: Json) -> dict[str, Json] | None:
    """What a mapping or sequence is made of, by name; None for a leaf.

    Keys that are no text are written as Python writes them, in brackets. An empty one is a leaf.

    Raises:
        CorruptCheckpointError: it is not what `state.tree` writes.
    """
    with _of_this_format():
        return _members(value)


def kind_of(value: Json) -> str:
    """What kind of value it is: that of a `deque` with its length, and so on."""
    if not isinstance(value, dict):
        return type(value).__name__
    tag = str(value.get(TAG, "dict"))
    return f"deque(maxlen={value.get('maxlen')})" if tag == "deque" else tag


def same(left: Json, right: Json) -> bool:
    """Whether two leaves that are no tensors are equal to the bit. The order of a set is none."""
    with _of_this_format():
        return _canonical(left) == _canonical(right)


def text_of(value: Json, limit: int = 60) -> str:
    """A leaf that is no tensor as Python writes it, or how long it is if that is long.

    Raises:
        CorruptCheckpointError: it is not what `state.tree` writes.
    """
    decoded = unflatten(value, {})
    text = repr(decoded.tolist() if isinstance(decoded, np.generic) else decoded)
    if len(text) <= limit:
        return text
    if isinstance(decoded, str):
        return f"{text[: limit - 2]}…'"
    kind = type(decoded).__name__
    return f"{kind} of {len(decoded)}" if hasattr(decoded, "__len__") else f"{text[: limit - 1]}…"


def texts_of_both(left: Json, right: Json) -> tuple[str, str]:
    """Two long values whose texts are the same, by the first of their members that differs."""
    ours, theirs = unflatten(left, {}), unflatten(right, {})
    try:
        pairs = zip(ours, theirs, strict=True)
        at, mine, other = next((i, a, b) for i, (a, b) in enumerate(pairs) if repr(a) != repr(b))
    except (TypeError, ValueError, StopIteration):
        # They have no members, or none that says it.
        return repr(ours), repr(theirs)
    return f"{text_of(left)}: [{at}] is {mine!r}", f"{text_of(right)}: [{at}] is {other!r}"


@dataclass(frozen=True, kw_only=True)
class Form:
    """A tensor's dtype and shape; of a numpy array those of the array (``numpy float64``)."""

    dtype: str
    shape: tuple[int, ...]


def form_of(leaf: Leaf, part: SavedPart) -> Form:
    """What a leaf that is stored looks like.

    Raises:
        CorruptCheckpointError: it is not what `state.tree` writes.
    """
    with _of_this_format():
        tensor = part.tensors[leaf.stored]
        if leaf.value[TAG] == "tensor":
            return Form(dtype=str(tensor.dtype).removeprefix("torch."), shape=tensor.shape)
        dtype = np.dtype(str(leaf.value["dtype"]))
        return Form(dtype=f"numpy {dtype}", shape=tuple(map(int, leaf.value["shape"])))


def nbytes_of(leaf: Leaf, part: SavedPart) -> int:
    """How many bytes are stored of it."""
    tensor = part.tensors[leaf.stored]
    return math.prod(tensor.shape) * tensor.dtype.itemsize


@contextmanager
def _of_this_format() -> Iterator[None]:
    try:
        yield
    except (LookupError, TypeError, ValueError, RecursionError) as e:
        raise CorruptCheckpointError(
            "a value in the manifest is not tagged JSON of this format",
            why=f"{type(e).__name__}: {e}",
            remedy="use another checkpoint; this one was not written by this library",
        ) from e


def _members(value: Json) -> dict[str, Json] | None:
    if isinstance(value, list):
        return _numbered(value)
    if not isinstance(value, dict):
        return None
    if TAG not in value:
        return value or None
    if value[TAG] in _SEQUENCES:
        return _numbered(list(value["items"]))
    if value[TAG] in _MAPPINGS:
        pairs = [(_key(key), member) for key, member in value["pairs"]]
        return dict(pairs) or None
    return None


def _numbered(items: list[Json]) -> dict[str, Json] | None:
    if any(_is_more(item) for item in items):
        return {str(i): item for i, item in enumerate(items)}
    return None


def _is_more(item: Json) -> bool:
    """Whether a member of a sequence is a mapping, a sequence or a tensor."""
    if not isinstance(item, dict):
        return isinstance(item, list)
    return TAG not in item or item[TAG] in (*_SEQUENCES, *_MAPPINGS, *_STORED)


def _key(key: Json) -> str:
    """Not two keys with one name: neither 1 and "1", nor 1 and "[1]"."""
    if isinstance(key, str) and not key.startswith("["):
        return key
    return f"[{unflatten(key, {})!r}]"


def _canonical(value: Json) -> str:
    if isinstance(value, dict) and value.get(TAG) in ("set", "frozenset"):
        value = {**value, "items": sorted(map(_canonical, value["items"]))}
    return json.dumps(value, sort_keys=True)
