"""How far two tensors of one shape and dtype are from each other."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_CHUNK = 2**17
"""Elements that are looked at together: what is computed beside the tensors stays small."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Between two tensors that are not the same bits.

    Attributes:
        count: elements that are not the same bits; of complex ones, components.
        numel: elements there are, counted in the same way.
        first: the first that differs, counted in row-major order.
        absolute: the largest ``|a - b|``, in float64; exact for integers below 2**53.
        relative: the largest ``|a - b| / max(|a|, |b|)``.
        nan: how many of `count` are NaN on one side, or on both with different bits. They
            count in neither of the two before.
    """

    count: int
    numel: int
    first: int
    absolute: float
    relative: float
    nan: int


def difference(left: torch.Tensor, right: torch.Tensor) -> Difference | None:
    """None if both are the same bits: then NaNs are equal, and 0.0 and -0.0 are not.

    Args:
        left, right: host tensors of the same shape and dtype. They are not copied.
    """
    left, right = _components(left), _components(right)
    count = nan = 0
    first = -1
    absolute = relative = 0.0
    for at, one, other in _chunks(left, right):
        differs = _bits(one) != _bits(other)
        if not differs.any():
            continue
        if first < 0:
            first = at + int(differs.argmax())
        gaps = _gaps(one, other)
        count += int(differs.sum())
        nan += int((np.isnan(gaps) & differs).sum())
        # These pass NaN over: that of a NaN, and that of equal infinities.
        absolute = float(np.fmax.reduce(gaps, initial=absolute))
        relative = float(np.fmax.reduce(_ratios(gaps, one, other), initial=relative))
    if not count:
        return None
    return Difference(
        count=count,
        numel=left.numel(),
        first=first,
        absolute=absolute,
        relative=math.inf if math.isinf(absolute) else relative,
        nan=nan,
    )


def _components(tensor: torch.Tensor) -> torch.Tensor:
    """One dimension; complex numbers as two."""
    flat = tensor.contiguous().reshape(-1)
    return torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat


def _chunks(
    left: torch.Tensor, right: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    for at in range(0, left.numel(), _CHUNK):
        yield at, left[at : at + _CHUNK], right[at : at + _CHUNK]


def _bits(tensor: torch.Tensor) -> Any:
    """Each element's bits as an integer."""
    return tensor.view(torch.uint8).numpy().view(f"u{tensor.dtype.itemsize}")


def _numbers(tensor: torch.Tensor) -> Any:
    """As float64, which holds every value of a narrower dtype."""
    # Not by torch: for so little work its threads wait for each other longer than they work.
    if tensor.dtype.itemsize <= 2:
        return _values(tensor.dtype)[_bits(tensor)]
    return tensor.numpy().astype(np.float64)


@functools.cache
def _values(dtype: torch.dtype) -> Any:
    """What each pattern of bits stands for, of a dtype of one or two bytes."""
    patterns = np.arange(256**dtype.itemsize, dtype=f"u{dtype.itemsize}")
    if dtype == torch.bool:
        return patterns.astype(np.float64)
    return torch.from_numpy(patterns).view(dtype).to(torch.float64).numpy()


def _gaps(left: torch.Tensor, right: torch.Tensor) -> Any:
    """``|a - b|``; NaN if one of them is."""
    if left.dtype.is_floating_point:
        with np.errstate(invalid="ignore"):
            return np.abs(_numbers(left) - _numbers(right))
    # Subtracted as integers: large ones that are neighbours are one number as floats.
    kind = np.uint64 if left.dtype == torch.uint64 else np.int64
    a, b = (tensor.numpy().astype(kind) for tensor in (left, right))
    return (np.maximum(a, b).view(np.uint64) - np.minimum(a, b).view(np.uint64)).astype(np.float64)


def _ratios(gaps: Any, left: torch.Tensor, right: torch.Tensor) -> Any:
    """``gaps / max(|a|, |b|)``; NaN between zeros, and wherever there is no finite gap."""
    sizes = np.maximum(np.abs(_numbers(left)), np.abs(_numbers(right)))
    with np.errstate(invalid="ignore"):
        return gaps / sizes
