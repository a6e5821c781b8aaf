"""How each torch dtype lies in a safetensors file.

The manifest names torch's dtype; the shard's header names the nearest type
that safetensors knows. complex128 is stored as pairs of F64, and 8-bit floats
that safetensors has no name for as raw U8: the bytes are torch's in any case.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A safetensors type, and the dimensions it adds at the end of the shape."""

    name: str
    extra: tuple[int, ...] = ()


_NATIVE = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
STORED: dict[torch.dtype, Stored] = {dtype: Stored(name=name) for dtype, name in _NATIVE.items()}
STORED |= {
    torch.float8_e4m3fnuz: Stored(name="U8"),
    torch.float8_e5m2fnuz: Stored(name="U8"),
    torch.float8_e8m0fnu: Stored(name="U8"),
    torch.complex32: Stored(name="F16", extra=(2,)),
    torch.complex64: Stored(name="F32", extra=(2,)),
    torch.complex128: Stored(name="F64", extra=(2,)),
}

_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in STORED}


def name_of(dtype: torch.dtype) -> str:
    """``"float32"`` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype | None:
    """The inverse of `name_of`, or None for a name this format does not have."""
    return _BY_NAME.get(name)


def is_plain(dtype: torch.dtype) -> bool:
    """Whether any safetensors reader gives the tensor back as one of this dtype."""
    return dtype in _NATIVE
