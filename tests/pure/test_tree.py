"""What goes through the tree comes back equal, and of the same type."""

from __future__ import annotations

import collections
import enum
import functools
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_accel_ckpt.errors import CorruptCheckpointError, UnsupportedStateError
from ray_accel_ckpt.image.dtypes import STORED
from ray_accel_ckpt.state.tree import Flattened, flatten, tensor_refs, unflatten
from tests.pure.helpers import tensor_bytes


def through(value: Any) -> Any:
    """`value` taken apart, its JSON written and read, and put together again."""
    flat = flatten(value, "part")
    text = json.dumps(flat.value, allow_nan=False)
    return unflatten(json.loads(text), flat.tensors)


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit and of the same types, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, complex):
        return same([a.real, a.imag], [b.real, b.imag])
    if isinstance(a, torch.Tensor):
        alike = (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
        return alike and tensor_bytes(a) == tensor_bytes(b)
    if isinstance(a, (np.ndarray, np.generic)):
        return (a.dtype.str, a.shape) == (b.dtype.str, b.shape) and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, collections.deque):
        return a.maxlen == b.maxlen and same(list(a), list(b))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


# --- plain values ----------------------------------------------------------------------

PLAIN = [
    None,
    True,
    False,
    "",
    "naïve ✓ 🤗 \x00",
    "lone \ud800 surrogate",
    "\ud800\udc00",
    {"\ud800": 1, "a": 2},
    0,
    -7,
    2**53 - 1,
    2**53,
    -(2**53),
    2**200,
    -(2**200),
    1.5,
    -0.0,
    5e-324,
    math.nan,
    -math.nan,
    struct.unpack("d", b"\x01\x00\x00\x00\x00\x00\xf8\x7f")[0],
    math.inf,
    -math.inf,
    complex(1, -0.0),
    complex(math.nan, -math.inf),
    b"",
    b"\x00\xff",
    bytearray(b"abc"),
    [],
    [1, [2, [3]]],
    (),
    (1, (2, [3, ()])),
    pytest.param({1, 2, "three"}, id="set"),
    set(),
    pytest.param(frozenset({(1, 2), b"x"}), id="frozenset"),
    collections.deque([1, 2], maxlen=5),
    collections.deque([1, (2,)]),
    collections.deque(maxlen=0),
    {},
    {"a": 1, "b": {"c": [None]}},
    {1: "int", "1": "str", 2.5: "float", (1, 2): "tuple", None: "none", False: "bool"},
    {"!": "tensor", "name": "not one"},
    {"": {"!": 1}},
    collections.OrderedDict([("b", 1), ("a", 2)]),
    collections.OrderedDict([("!", 1)]),
    collections.Counter({30: 1, 80: 2}),
    collections.Counter(),
    torch.float32,
    torch.float8_e4m3fn,
    torch.device("cpu"),
    torch.device("cuda", 1),
    torch.Size([2, 0, 3]),
    torch.Size([]),
]


@pytest.mark.parametrize("value", PLAIN, ids=lambda v: ascii(v)[:30])
def test_plain_values_come_back(value: Any) -> None:
    assert same(through(value), value)


def test_the_order_of_keys_comes_back() -> None:
    value = collections.OrderedDict((key, 0) for key in ("z", "a", "m"))
    assert list(through(value)) == ["z", "a", "m"]
    assert list(through({"z": 0, "a": 1})) == ["z", "a"]


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters())
    | st.text(st.characters(categories=["Cs"]), max_size=3)
    | st.binary()
    | st.binary().map(bytearray)
    | st.sampled_from(list(STORED))
    | st.builds(np.float32, st.floats(width=32))
    | st.builds(np.int16, st.integers(-(2**15), 2**15 - 1))
    | st.lists(st.integers(0, 255), max_size=5).map(lambda v: torch.tensor(v, dtype=torch.uint8))
)
KEYS = st.text(max_size=3) | st.just("!") | st.integers() | st.tuples(st.integers(), st.text())
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.lists(inner, max_size=4).map(lambda v: collections.deque(v, maxlen=9))
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=4).map(collections.OrderedDict)
        | st.dictionaries(st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(TREES)
def test_any_nesting_comes_back(value: Any) -> None:
    assert same(through(value), value)


# --- numpy -----------------------------------------------------------------------------

SCALARS = [
    np.bool_(True),
    np.int8(-1),
    np.uint64(2**64 - 1),
    np.float16(0.1),
    np.float32(0.1),
    np.float64(0.1),
    np.float64("nan"),
    np.longdouble(1) / 3,
    np.complex64(1 + 2j),
    np.complex128(complex(np.nan, -0.0)),
    np.datetime64("2026-01-02T03:04:05", "ns"),
    np.datetime64("NaT"),
    np.timedelta64(5, "m"),
    np.str_("ü\x00x"),
    np.str_("zeros at the end\x00\x00"),
    np.str_("\ud800"),
    np.bytes_(b"a\x00"),
    np.str_(""),
    np.bytes_(b"a\x00b"),
    np.bytes_(b""),
]


@pytest.mark.parametrize("value", SCALARS, ids=lambda v: f"{v.dtype}-{v!r}"[:40])
def test_numpy_scalars_come_back(value: Any) -> None:
    assert same(through(value), value)


ARRAYS = [
    np.array(3.5),
    np.array("text"),
    np.zeros((0, 3)),
    np.zeros((2, 0), dtype="U0"),
    np.arange(12).reshape(3, 4)[:, ::2],
    np.arange(6.0).reshape(2, 3).T,
    np.arange(5, dtype=">i4"),
    np.array([1.5, np.nan], dtype=">f8"),
    np.array(["2026-01-02", "NaT"], dtype="datetime64[D]"),
    np.array(["a", "längere"]),
    np.array([b"a", b"bc"]),
    np.array([True, False]),
    np.array([1 + 2j]),
    np.array([0.1], dtype=np.longdouble),
    np.broadcast_to(np.int64(4), (2, 2)),
]


@pytest.mark.parametrize("value", ARRAYS, ids=lambda v: f"{v.dtype}-{v.shape}")
def test_numpy_arrays_come_back(value: Any) -> None:
    assert same(through(value), value)


def test_a_numpy_array_comes_back_writable() -> None:
    assert through(np.arange(3)).flags.writeable


def test_a_numpy_array_is_copied_when_captured() -> None:
    array = np.arange(3)
    flat = flatten(array, "part")
    array[0] = 9
    assert unflatten(flat.value, flat.tensors).tolist() == [0, 1, 2]


# --- tensors ---------------------------------------------------------------------------


def filled(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any bits, as `dtype`."""
    count = math.prod(shape) * dtype.itemsize
    bits = (
        torch.arange(count, dtype=torch.int64).mul(37).remainder(2 if dtype is torch.bool else 251)
    )
    return bits.to(torch.uint8).view(dtype).view(shape)


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (2, 0, 3)], ids=str)
def test_tensors_of_every_dtype_come_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = filled(dtype, *shape)
    assert same(through(value), value)


VIEWS = {
    "strided": torch.arange(12.0)[::3],
    "transposed": torch.arange(6.0).view(2, 3).T,
    "expanded": torch.tensor([1.0]).expand(4),
    "channels_last": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "conjugated": torch.tensor([1 + 2j]).conj(),
    "negated": torch.tensor([1 + 2j]).conj().imag,
    "leaf": torch.ones(2, requires_grad=True),
    "computed": torch.ones(2, requires_grad=True) * 2,
}


@pytest.mark.parametrize("kind", VIEWS)
def test_views_come_back(kind: str) -> None:
    value = VIEWS[kind]
    assert torch.equal(through(value), value.detach())


def test_tensors_are_referenced_and_not_copied() -> None:
    value = torch.ones(2)
    (held,) = flatten([value], "part").tensors.values()
    assert held.data_ptr() == value.data_ptr()


def test_tensors_are_named_by_their_place() -> None:
    flat = flatten({"a": torch.ones(1), "b": [torch.ones(2), {3: torch.ones(3)}]}, "part")
    assert list(flat.tensors) == ["part/a", "part/b/0", "part/b/1/3"]


def test_places_that_would_have_one_name_are_told_apart() -> None:
    value = {1: torch.tensor(1), "1": torch.tensor(2), "a": {"b": torch.tensor(3)}}
    value["a/b"] = torch.tensor(4)  # type: ignore[index]
    assert same(through(value), value)


def test_tied_tensors_are_stored_once_and_come_back_tied() -> None:
    tied = torch.ones(3)
    value = {"a": tied, "b": [tied, tied.view(3)]}
    assert len(flatten(value, "part").tensors) == 1
    back = through(value)
    assert back["a"] is back["b"][0]


def test_different_views_of_one_memory_are_stored_each() -> None:
    base = torch.arange(6.0)
    value = [base, base[:3], base[3:], base.view(2, 3), base.view(torch.int32), base[:0], base[:0]]
    assert len(flatten(value, "part").tensors) == 7
    assert same(through(value), value)


def test_a_parameter_is_a_tensor() -> None:
    back = through(torch.nn.Parameter(torch.ones(2)))
    assert type(back) is torch.Tensor
    assert torch.equal(back, torch.ones(2))


def test_refs_name_every_tensor_and_where_it_lived() -> None:
    flat = flatten({"a": torch.ones(1), "b": (np.ones(2), {4: torch.ones(2)}), "c": 1}, "part")
    assert tensor_refs(flat.value) == {"part/a": "cpu", "part/b/0": "cpu", "part/b/1/4": "cpu"}


# --- what is refused -------------------------------------------------------------------


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Point(collections.namedtuple("Point", "x y")):
    __slots__ = ()


class Text(str):
    __slots__ = ()


class Rows(np.ndarray[Any, Any]):
    pass


class Marked(torch.Tensor):
    pass


def contains_itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


REFUSED = {
    "function": lambda: None,
    "partial": functools.partial(print),
    "class": Path,
    "path": Path("x"),
    "range": range(3),
    "enum": Colour.RED,
    "int enum": Level.LOW,
    "namedtuple": Point(1, 2),
    "str subclass": Text("a"),
    "defaultdict": collections.defaultdict(list),
    "object array": np.array([object()]),
    "structured array": np.zeros(2, dtype=[("a", "i4")]),
    "array subclass": np.zeros(2).view(Rows),
    "structured scalar": np.zeros(2, dtype=[("a", "i4")])[0],
    "generator": torch.Generator(),
    "module": torch.nn.Linear(1, 1),
    "sparse tensor": torch.eye(2).to_sparse(),
    "meta tensor": torch.ones(2, device="meta"),
    "tensor subclass": torch.ones(2).as_subclass(Marked),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_saved_exactly_is_refused_by_place(kind: str) -> None:
    with pytest.raises(UnsupportedStateError, match="where: part/outer/1"):
        flatten({"outer": [0, REFUSED[kind]]}, "part")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("function", "builtins.function"),
        ("enum", f"{__name__}.Colour"),
        ("namedtuple", f"{__name__}.Point"),
        ("defaultdict", "collections.defaultdict"),
        ("array subclass", f"{__name__}.Rows"),
        ("tensor subclass", f"{__name__}.Marked"),
        ("object array", "numpy array of dtype object"),
        ("sparse tensor", r"torch\.sparse_coo"),
        ("meta tensor", "meta"),
    ],
)
def test_what_is_refused_is_named_by_its_full_type(kind: str, name: str) -> None:
    with pytest.raises(UnsupportedStateError, match=name):
        flatten(REFUSED[kind], "part")


# torch warns of both when they are made.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: torch.eye(2).to_sparse(), "to_dense()"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "dequantize()"),
        (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "unbind()"),
        (
            lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged),
            "unbind()",
        ),
        (lambda: torch.ones(2, device="meta"), "prepare()"),
        (lambda: torch.nn.LazyLinear(2).weight, "call the model with a batch"),
    ],
)
def test_a_tensor_of_another_kind_is_refused_with_what_to_do(make: Any, remedy: str) -> None:
    with pytest.raises(UnsupportedStateError) as caught:
        flatten([make()], "part")
    assert caught.value.where == "part/0"
    assert remedy in caught.value.remedy


def test_an_open_file_is_refused(tmp_path: Path) -> None:
    with (
        (tmp_path / "log").open("w") as file,
        pytest.raises(UnsupportedStateError, match=r"_io\.TextIOWrapper"),
    ):
        flatten({"log": file}, "part")


def test_a_refused_key_is_named_too() -> None:
    with pytest.raises(UnsupportedStateError, match="Colour"):
        flatten({Colour.RED: 1}, "part")


def test_a_list_that_contains_itself_is_refused() -> None:
    with pytest.raises(UnsupportedStateError, match="contains itself"):
        flatten(contains_itself(), "part")


@pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: {"a": v}, lambda v: {1: v}])
def test_everything_that_is_accepted_is_shallow_enough_to_read(wrap: Any) -> None:
    value: Any = None
    for _ in range(100):
        value = wrap(value)
    assert same(through(value), value)


# --- what is read ----------------------------------------------------------------------

TENSORS = {"part/t": torch.arange(8, dtype=torch.uint8), "part/f": torch.ones(2)}

GARBAGE: list[Any] = [
    {"!": "pickle", "data": ""},
    {"!": None},
    {"!": 3},
    {"!": ["tensor"]},
    {"!": {"a": 1}},
    {"!": "tensor"},
    {"!": "tensor", "name": "part/absent"},
    {"!": "tensor", "name": ["part/t"]},
    {"!": "tensor", "name": None},
    {"!": "ndarray", "name": "part/t", "dtype": "<f8", "shape": [2]},
    {"!": "ndarray", "name": "part/t", "dtype": "<f8", "shape": [-2]},
    {"!": "ndarray", "name": "part/t", "dtype": "<f8", "shape": "1"},
    {"!": "ndarray", "name": "part/t", "dtype": "<f8", "shape": None},
    {"!": "ndarray", "name": "part/t", "dtype": "<f8"},
    {"!": "ndarray", "name": "part/t", "dtype": "|O", "shape": [1]},
    {"!": "ndarray", "name": "part/t", "dtype": "no such", "shape": [1]},
    {"!": "ndarray", "name": "part/t", "dtype": "O,O", "shape": [1]},
    {"!": "ndarray", "name": "part/t", "dtype": [["a", "O"]], "shape": [1]},
    {"!": "ndarray", "name": "part/t", "dtype": "(2,", "shape": [1]},
    {"!": "ndarray", "name": "part/t", "dtype": "<U0", "shape": [1]},
    {"!": "ndarray", "name": "part/t", "dtype": "<f8", "shape": [2**70]},
    {"!": "numpy", "dtype": "|O", "data": "AAAAAAAAAAA="},
    {"!": "numpy", "dtype": "<f8", "data": ""},
    {"!": "numpy", "dtype": "<f8", "data": "AAA="},
    {"!": "numpy", "dtype": "<f8", "data": "AAAAAAAAAAAAAAAAAAAAAA=="},
    {"!": "numpy", "dtype": None, "data": "AAAAAAAAAAA="},
    {"!": "numpy", "dtype": "<f8,<f8", "data": "AAAAAAAAAAAAAAAAAAAAAA=="},
    {"!": "int", "hex": "0xzz"},
    {"!": "int", "hex": 7},
    {"!": "int"},
    {"!": "float", "bits": "00"},
    {"!": "float", "bits": "zz"},
    {"!": "float", "bits": 1.0},
    {"!": "complex", "bits": []},
    {"!": "complex", "bits": ["7ff0000000000000"]},
    {"!": "bytes", "data": "!!"},
    {"!": "bytes", "data": "ü"},
    {"!": "bytes", "data": 5},
    {"!": "tuple"},
    {"!": "tuple", "items": 3},
    {"!": "tuple", "items": "abc"},
    {"!": "tuple", "items": {"a": 1}},
    {"!": "set", "items": [[1]]},
    {"!": "frozenset", "items": [{"a": 1}]},
    {"!": "deque", "items": []},
    {"!": "deque", "items": [], "maxlen": -1},
    {"!": "deque", "items": [], "maxlen": "2"},
    {"!": "dict", "pairs": [[1]]},
    {"!": "dict", "pairs": [[[1], 2]]},
    {"!": "dict", "pairs": ["ab"]},
    {"!": "dict", "pairs": {"ab": 1}},
    {"!": "dict", "pairs": 3},
    {"!": "OrderedDict"},
    {"!": "torch.dtype", "value": "nn"},
    {"!": "torch.dtype", "value": "absent"},
    {"!": "torch.dtype", "value": 3},
    {"!": "torch.device", "value": "no such device"},
    {"!": "torch.device", "value": None},
    {"!": "torch.device", "value": ["cpu"]},
    {"!": "torch.Size", "items": ["a"]},
    {"!": "torch.Size", "items": 3},
    {"!": "torch.Size", "items": [2**70]},
]


@pytest.mark.parametrize("value", GARBAGE, ids=lambda v: ascii(v)[:60])
def test_what_this_library_does_not_write_is_corrupt(value: Any) -> None:
    with pytest.raises(CorruptCheckpointError):
        unflatten({"deep": [value]}, TENSORS)


def test_json_that_nests_too_deep_is_corrupt() -> None:
    value: Any = None
    for _ in range(100_000):
        value = [value]
    with pytest.raises(CorruptCheckpointError):
        unflatten(value, {})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
FIELDS = ["name", "dtype", "shape", "data", "hex", "bits", "items", "maxlen", "pairs", "value"]
KNOWN = [
    "tensor",
    "ndarray",
    "numpy",
    "str",
    "int",
    "float",
    "complex",
    "bytes",
    "bytearray",
    "tuple",
]
KNOWN += ["set", "frozenset", "deque", "dict", "OrderedDict", "Counter"]
KNOWN += ["torch.dtype", "torch.device", "torch.Size"]
WORDS = st.sampled_from(["part/t", "part/f", "<f8", "|O", "<U1", "AAAA", "7ff0", "cpu", "float32"])


@given(st.sampled_from(KNOWN), st.dictionaries(st.sampled_from(FIELDS), JSON | WORDS))
def test_any_tagged_garbage_is_corrupt_or_a_value(tag: str, fields: dict[str, Any]) -> None:
    try:
        unflatten({"!": tag, **fields}, TENSORS)
    except CorruptCheckpointError as e:
        assert e.what


def test_flattened_is_what_is_stored() -> None:
    flat = flatten(5, "part")
    assert flat == Flattened(tensors={}, value=5)
