"""Nested state dict <-> flat tensors + tagged JSON, exactly and without pickle.

Plain JSON carries None, bool, str, small ints, finite floats, lists and
dicts with str keys. Whatever JSON would bend is an object with the key "!"
naming what it is: see `_ENCODERS`. Tensors leave the tree: the tag holds the name
under which a shard stores the bytes and whether it lived on the host.
"""

from __future__ import annotations

import base64
import collections
import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from ray_accel_ckpt.errors import CorruptCheckpointError, UnsupportedStateError
from ray_accel_ckpt.state.sharding import is_sharded, local

Json: TypeAlias = Any
TAG = "!"
_DEPTH = 100
_SAFE_INT = 2**53
# numpy kinds whose bytes are their value: bool, ints, floats, complex, text, dates
_NUMPY_KINDS = "biufcSUMm"
_NUMPY_DTYPE = re.compile(rf"[<>|][{_NUMPY_KINDS}]\d+(\[\w+\])?")
_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if type(d) is torch.dtype}


@dataclass(frozen=True, kw_only=True)
class Flattened:
    """A tree taken apart: references to its tensors by name, and the rest as JSON."""

    tensors: dict[str, torch.Tensor]
    value: Json


def flatten(value: Any, prefix: str) -> Flattened:
    """Take `value` apart. Tensors are referenced, not copied.

    Args:
        value: nested dicts, lists, tuples, sets and deques of tensors, numpy
            arrays and plain Python values.
        prefix: what every tensor's name begins with, e.g. ``"optimizer"``.

    Raises:
        UnsupportedStateError: naming the place and the full type of a value
            that cannot be represented exactly.
    """
    flattener = _Flattener()
    json_value = flattener.encode(value, prefix, 0)
    return Flattened(tensors=flattener.tensors, value=json_value)


def unflatten(value: Json, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `flatten`, given the tensors by name.

    Raises:
        CorruptCheckpointError: if `value` is not something `flatten` writes.
    """
    try:
        return _decode(value, tensors)
    except CorruptCheckpointError:
        raise
    except (LookupError, TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as e:
        raise CorruptCheckpointError(
            "a value in the manifest is not tagged JSON of this format",
            why=f"{type(e).__name__}: {e}",
            remedy="use another checkpoint; this one was not written by this library",
        ) from e


def tensor_refs(value: Json) -> dict[str, str]:
    """Names of all tensors in an encoded tree, each with ``"cpu"`` or ``"accelerator"``."""
    found: dict[str, str] = {}
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack.extend(item)
        elif isinstance(item, dict):
            if item.get(TAG) in ("tensor", "ndarray") and isinstance(item.get("name"), str):
                found[item["name"]] = str(item.get("device", "cpu"))
            stack.extend(item.values())
    return found


def encoded_items(value: Json) -> dict[str, Json]:
    """The members of an encoded dict, values still encoded; nothing if it is no such thing."""
    if not isinstance(value, dict):
        return {}
    if TAG not in value:
        return value
    pairs = value.get("pairs")
    pairs = pairs if isinstance(pairs, list) else []
    sound = [pair for pair in pairs if isinstance(pair, list) and len(pair) == 2]
    return {key: member for key, member in sound if isinstance(key, str)}


def tensor_ref(value: Json) -> str:
    """The name of the tensor that an encoded value stands for, "" if it is none."""
    is_tensor = isinstance(value, dict) and value.get(TAG) == "tensor"
    return str(value.get("name", "")) if is_tensor else ""


def same_view(tensor: torch.Tensor) -> tuple[Any, ...]:
    """A key that two tensors share exactly if they are the same view of the same memory."""
    sharded = is_sharded(tensor)
    here = local(tensor) if sharded else tensor
    return (
        here.device,
        # Empty shards have no address: those of different tensors would seem to be one.
        here.data_ptr() or here.untyped_storage()._cdata,
        here.dtype,
        tuple(tensor.shape),
        tensor.stride(),
        sharded,
    )


class _Flattener:
    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._seen: dict[tuple[Any, ...], str] = {}

    def encode(self, value: Any, path: str, depth: int) -> Json:
        if depth > _DEPTH:
            raise UnsupportedStateError(
                f"a state nests deeper than {_DEPTH} levels",
                where=path[:200],
                why="it probably contains itself",
                remedy="return a flat dict from state_dict()",
            )
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        encoder = _ENCODERS.get(type(value))
        if encoder is not None:
            return encoder(self, value, path, depth)
        if isinstance(value, np.ndarray) and type(value) is np.ndarray:
            return self._ndarray(value, path)
        if isinstance(value, np.generic) and value.dtype.kind in _NUMPY_KINDS:
            data = value.tobytes()[: value.dtype.itemsize]  # an empty text has four bytes of zeros
            return {TAG: "numpy", "dtype": value.dtype.str, "data": _b64(data)}
        kind = type(value)
        raise UnsupportedStateError(
            f"cannot save a {kind.__module__}.{kind.__qualname__}",
            where=path,
            why="only tensors, numpy arrays and plain Python values are saved; "
            "nothing is pickled, so that loading can never run code",
            remedy="leave it out of state_dict(), or return the plain values it is made of",
        )

    def _tensor(self, tensor: torch.Tensor, path: str) -> Json:
        if is_lazy(tensor):
            raise UnsupportedStateError(
                "a parameter has no shape and no values yet",
                where=path,
                why="it is a lazy module's, and no forward has gone through it",
                remedy="call the model with a batch before anything is saved or loaded",
            )
        plain = tensor.detach()
        if plain.is_nested or plain.layout != torch.strided or plain.is_quantized or plain.is_meta:
            raise UnsupportedStateError(
                f"cannot save a tensor of this kind ({_kind(plain)}, {plain.dtype})",
                where=path,
                remedy=_dense(plain),
            )
        if plain.is_conj() or plain.is_neg():
            # What is copied later must be the values, not how to come by them.
            plain = plain.resolve_conj().resolve_neg()
        if type(plain) not in (torch.Tensor, torch.nn.Parameter) and not is_sharded(plain):
            raise UnsupportedStateError(
                f"cannot save a {type(plain).__module__}.{type(plain).__qualname__}",
                where=path,
                why="tensor subclasses other than DTensor hold more than their bytes",
                remedy="save the plain tensors it is made of",
            )
        key = same_view(plain)
        name = self._seen.get(key) if plain.numel() else None
        if name is None:
            name = self._unique(path)
            self.tensors[name] = plain
            self._seen[key] = name
        device = "cpu" if plain.device.type == "cpu" else "accelerator"
        return {TAG: "tensor", "name": name, "device": device}

    def _ndarray(self, array: np.ndarray[Any, Any], path: str) -> Json:
        if array.dtype.kind not in _NUMPY_KINDS or array.dtype.hasobject:
            raise UnsupportedStateError(
                f"cannot save a numpy array of dtype {array.dtype}",
                where=path,
                why="its items are Python objects, which only pickle could hold",
                remedy="convert it to a numeric array or a list",
            )
        data = np.frombuffer(array.tobytes(), dtype=np.uint8)
        name = self._unique(path)
        self.tensors[name] = torch.from_numpy(data.copy())
        return {TAG: "ndarray", "name": name, "dtype": array.dtype.str, "shape": list(array.shape)}

    def _unique(self, path: str) -> str:
        name, n = path, 0
        while name in self.tensors:
            n += 1
            name = f"{path}~{n}"
        return name

    def _none_bool(self, value: Any, path: str, depth: int) -> Json:
        return value

    def _str(self, value: str, path: str, depth: int) -> Json:
        if _is_text(value):
            return value
        # JSON would join two surrogates to one character.
        return {TAG: "str", "data": _b64(value.encode("utf-8", "surrogatepass"))}

    def _int(self, value: int, path: str, depth: int) -> Json:
        return value if abs(value) < _SAFE_INT else {TAG: "int", "hex": hex(value)}

    def _float(self, value: float, path: str, depth: int) -> Json:
        return value if math.isfinite(value) else {TAG: "float", "bits": _float_bits(value)}

    def _complex(self, value: complex, path: str, depth: int) -> Json:
        return {TAG: "complex", "bits": [_float_bits(value.real), _float_bits(value.imag)]}

    def _bytes(self, value: bytes | bytearray, path: str, depth: int) -> Json:
        return {TAG: type(value).__name__, "data": _b64(bytes(value))}

    def _items(self, value: Any, path: str, depth: int) -> list[Json]:
        return [self.encode(v, f"{path}/{i}", depth + 1) for i, v in enumerate(value)]

    def _sequence(self, value: Any, path: str, depth: int) -> Json:
        return {TAG: type(value).__name__, "items": self._items(value, path, depth)}

    def _deque(self, value: Any, path: str, depth: int) -> Json:
        return {TAG: "deque", "maxlen": value.maxlen, "items": self._items(value, path, depth)}

    def _dict(self, value: dict[Any, Any], path: str, depth: int) -> Json:
        texts = all(type(k) is str and _is_text(k) for k in value)
        plain = type(value) is dict and texts and TAG not in value
        if plain:
            return {k: self.encode(v, f"{path}/{k}", depth + 1) for k, v in value.items()}
        pairs = [
            [self.encode(k, f"{path}/key", depth + 1), self.encode(v, f"{path}/{k}", depth + 1)]
            for k, v in value.items()
        ]
        return {TAG: type(value).__name__, "pairs": pairs}

    def _dtype(self, value: torch.dtype, path: str, depth: int) -> Json:
        return {TAG: "torch.dtype", "value": str(value).removeprefix("torch.")}

    def _device(self, value: torch.device, path: str, depth: int) -> Json:
        return {TAG: "torch.device", "value": str(value)}

    def _size(self, value: torch.Size, path: str, depth: int) -> Json:
        return {TAG: "torch.Size", "items": list(value)}


_Encoder = Callable[[_Flattener, Any, str, int], Json]
_ENCODERS: dict[type, _Encoder] = {
    type(None): _Flattener._none_bool,
    bool: _Flattener._none_bool,
    str: _Flattener._str,
    int: _Flattener._int,
    float: _Flattener._float,
    complex: _Flattener._complex,
    bytes: _Flattener._bytes,
    bytearray: _Flattener._bytes,
    list: _Flattener._items,
    tuple: _Flattener._sequence,
    set: _Flattener._sequence,
    frozenset: _Flattener._sequence,
    collections.deque: _Flattener._deque,
    dict: _Flattener._dict,
    collections.OrderedDict: _Flattener._dict,
    collections.Counter: _Flattener._dict,
    torch.dtype: _Flattener._dtype,
    torch.device: _Flattener._device,
    torch.Size: _Flattener._size,
}


def _decode(value: Json, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if TAG not in value:
        return {k: _decode(v, tensors) for k, v in value.items()}
    decoder = _DECODERS.get(value[TAG])
    if decoder is None:
        raise CorruptCheckpointError(
            f"the manifest holds a value tagged {value[TAG]!r}, which this format does not have",
            remedy="read it with the version that wrote it",
        )
    return decoder(value, tensors)


def _decode_items(value: Json, tensors: Mapping[str, torch.Tensor]) -> list[Any]:
    return [_decode(v, tensors) for v in _list(value["items"])]


def _decode_pairs(value: Json, tensors: Mapping[str, torch.Tensor]) -> list[tuple[Any, Any]]:
    pairs = [_list(pair) for pair in _list(value["pairs"])]
    return [(_decode(k, tensors), _decode(v, tensors)) for k, v in pairs]


def _decode_ndarray(value: Json, tensors: Mapping[str, torch.Tensor]) -> np.ndarray[Any, Any]:
    raw = tensors[value["name"]].cpu().numpy().tobytes()
    return _array(raw, value["dtype"], _lengths(value["shape"]))


def _array(raw: bytes, dtype: str, shape: list[int]) -> np.ndarray[Any, Any]:
    # numpy reads much more out of a text than `dtype.str` puts into one, objects among it.
    if not _NUMPY_DTYPE.fullmatch(dtype):
        raise ValueError(f"{dtype!r} is no numpy dtype of this format")
    kind = np.dtype(dtype)
    if len(raw) != kind.itemsize * math.prod(shape):
        raise ValueError(f"{len(raw)} bytes for {dtype} {shape}")
    return np.ndarray(shape, kind, buffer=bytearray(raw))


def _scalar(raw: bytes, dtype: str) -> Any:
    array = _array(raw, dtype, [])
    # Zeros at the end of a text are lost in an array, and kept in a scalar.
    if array.dtype.kind == "S":
        return np.bytes_(raw)
    if array.dtype.kind == "U":
        order = "utf-32-be" if dtype[0] == ">" else "utf-32-le"
        return np.str_(raw.decode(order, "surrogatepass"))
    return array[()]


def _list(value: Json) -> list[Json]:
    if not isinstance(value, list):
        raise TypeError(f"a list is expected, not a {type(value).__name__}")
    return value


def _lengths(value: Json) -> list[int]:
    if not all(type(n) is int and 0 <= n < 2**63 for n in _list(value)):
        raise ValueError(f"{value!r} is no shape")
    return list(value)


_Decoder = Callable[[Json, Mapping[str, torch.Tensor]], Any]
_DECODERS: dict[str, _Decoder] = {
    "tensor": lambda v, t: t[v["name"]],
    "ndarray": _decode_ndarray,
    "numpy": lambda v, t: _scalar(_unb64(v["data"]), v["dtype"]),
    "str": lambda v, t: _unb64(v["data"]).decode("utf-8", "surrogatepass"),
    "int": lambda v, t: int(v["hex"], 16),
    "float": lambda v, t: _from_bits(v["bits"]),
    "complex": lambda v, t: complex(_from_bits(v["bits"][0]), _from_bits(v["bits"][1])),
    "bytes": lambda v, t: _unb64(v["data"]),
    "bytearray": lambda v, t: bytearray(_unb64(v["data"])),
    "tuple": lambda v, t: tuple(_decode_items(v, t)),
    "set": lambda v, t: set(_decode_items(v, t)),
    "frozenset": lambda v, t: frozenset(_decode_items(v, t)),
    "deque": lambda v, t: collections.deque(_decode_items(v, t), maxlen=v["maxlen"]),
    "dict": lambda v, t: dict(_decode_pairs(v, t)),
    "OrderedDict": lambda v, t: collections.OrderedDict(_decode_pairs(v, t)),
    "Counter": lambda v, t: collections.Counter(dict(_decode_pairs(v, t))),
    "torch.dtype": lambda v, t: _DTYPES[v["value"]],
    "torch.device": lambda v, t: torch.device(v["value"]),
    "torch.Size": lambda v, t: torch.Size(_lengths(v["items"])),
}


def _kind(tensor: torch.Tensor) -> str:
    if tensor.is_nested:
        return "nested"
    return "meta" if tensor.is_meta else str(tensor.layout)


def _dense(tensor: torch.Tensor) -> str:
    """What to do with a tensor that is none of dense numbers."""
    if tensor.is_meta:
        return "give it memory and values first: prepare() does that for a model"
    instead = "tensor.dequantize()" if tensor.is_quantized else "tensor.to_dense()"
    if tensor.is_nested:
        instead = "list(tensor.unbind())"
    return f"save dense tensors: state_dict() may return {instead}"


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _unb64(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _float_bits(value: float) -> str:
    return struct.pack(">d", value).hex()


def _from_bits(text: str) -> float:
    raw = bytes.fromhex(text)
    if len(raw) != 8:
        raise ValueError(f"{text!r} is no float")
    return float(struct.unpack(">d", raw)[0])
