"""Tagged values with the right checksum that are not what `state.tree` writes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.attacks.conftest import Victim


def _nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


_MOMENTS = "shared/moments"
VALUES: dict[str, Any] = {
    "tag unknown": {"!": "pickle", "data": "gASVCw=="},
    "tag null": {"!": None},
    "tag a list": {"!": ["tensor"]},
    "tag a dict": {"!": {"!": "tensor"}},
    "tensor without a name": {"!": "tensor"},
    "tensor of another type": {"!": "tensor", "name": [_MOMENTS], "device": "cpu"},
    "tensor not there": {"!": "tensor", "name": "shared/none", "device": "cpu"},
    "ndarray of objects": {"!": "ndarray", "name": _MOMENTS, "dtype": "|O", "shape": [1]},
    "ndarray of object": {"!": "ndarray", "name": _MOMENTS, "dtype": "object", "shape": [1]},
    "ndarray of a struct": {
        "!": "ndarray",
        "name": _MOMENTS,
        "dtype": [["a", "O"]],
        "shape": [1],
    },
    "ndarray of text": {"!": "ndarray", "name": _MOMENTS, "dtype": "f4,O", "shape": [1]},
    "ndarray of no dtype": {"!": "ndarray", "name": _MOMENTS, "dtype": "no", "shape": [1]},
    "ndarray of dtype null": {"!": "ndarray", "name": _MOMENTS, "dtype": None, "shape": [1]},
    "ndarray too large": {"!": "ndarray", "name": _MOMENTS, "dtype": "<f4", "shape": [2**60]},
    "ndarray negative": {"!": "ndarray", "name": _MOMENTS, "dtype": "<f4", "shape": [-3, -9]},
    "ndarray huge item": {
        "!": "ndarray",
        "name": _MOMENTS,
        "dtype": "V2147483647",
        "shape": [1],
    },
    "ndarray without a shape": {"!": "ndarray", "name": _MOMENTS, "dtype": "<f4"},
    "numpy of objects": {"!": "numpy", "dtype": "|O", "data": "AAAAAAAAAAA="},
    "numpy of nothing": {"!": "numpy", "dtype": "<f8", "data": ""},
    "numpy too short": {"!": "numpy", "dtype": "<f8", "data": "AA=="},
    "numpy no base64": {"!": "numpy", "dtype": "<f8", "data": "%%%%"},
    "int no hex": {"!": "int", "hex": "zz"},
    "int a number": {"!": "int", "hex": 7},
    "float too short": {"!": "float", "bits": "00"},
    "float too long": {"!": "float", "bits": "00" * 9},
    "float no hex": {"!": "float", "bits": "zz" * 8},
    "float null": {"!": "float", "bits": None},
    "complex of nothing": {"!": "complex", "bits": []},
    "complex of one": {"!": "complex", "bits": ["00" * 8]},
    "bytes no base64": {"!": "bytes", "data": "%"},
    "bytes a number": {"!": "bytes", "data": 7},
    "bytearray null": {"!": "bytearray", "data": None},
    "tuple of nothing": {"!": "tuple"},
    "tuple of a number": {"!": "tuple", "items": 7},
    "set of lists": {"!": "set", "items": [[1]]},
    "frozenset of dicts": {"!": "frozenset", "items": [{}]},
    "deque negative": {"!": "deque", "maxlen": -1, "items": []},
    "deque of text": {"!": "deque", "maxlen": "1", "items": []},
    "dict of a number": {"!": "dict", "pairs": 7},
    "dict of singles": {"!": "dict", "pairs": [[1]]},
    "dict with list keys": {"!": "dict", "pairs": [[[1], 2]]},
    "OrderedDict of null": {"!": "OrderedDict", "pairs": None},
    "dtype a function": {"!": "torch.dtype", "value": "load"},
    "dtype a module": {"!": "torch.dtype", "value": "nn"},
    "dtype unknown": {"!": "torch.dtype", "value": "float31"},
    "dtype a number": {"!": "torch.dtype", "value": 7},
    "device unknown": {"!": "torch.device", "value": "toaster:0"},
    "device a list": {"!": "torch.device", "value": []},
    "device without number": {"!": "torch.device", "value": "cpu:-7"},
    "size of text": {"!": "torch.Size", "items": ["1"]},
    "size of nothing": {"!": "torch.Size"},
    "nested 900 deep": _nested(900),
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
def test_a_value_that_is_not_of_this_format(victim: Victim, value: Any) -> None:
    victim.edit(lambda body: body["parts"]["shared"]["value"].update(number=value))
    victim.refuses()
