"""`diff`: what two checkpoints have and have not in common, to the bit."""

from __future__ import annotations

import collections
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_accel_ckpt.state.part import Scope, captured_tree
from ray_accel_ckpt.storage.filesystem import LocalFilesystem
from ray_accel_ckpt.storage.writer import write_image
from tests.cli import runs
from tests.cli.commands import document, refused, run, told
from tests.helpers_image import edited, image_of

NAN = float("nan")


def _nothing(rank: int) -> Mapping[str, Any]:
    del rank
    return {}


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint of any state: of what all have alike, and of what each rank has for itself."""

    def store(
        shared: Mapping[str, Any],
        own: Callable[[int], Mapping[str, Any]] = _nothing,
        *,
        world_size: int = 1,
        kind: str = "object",
    ) -> Path:
        path = Path(tempfile.mkdtemp(dir=tmp_path))
        for rank in range(world_size):
            captured = {
                name: captured_tree(state, name=name, kind=kind, scope=Scope.REPLICATED)
                for name, state in shared.items()
            }
            for name, state in own(rank).items():
                options = {"scope": Scope.PER_RANK, "per_rank": True}
                captured[name] = captured_tree(state, name=name, kind=kind, **options)
            image = image_of(captured, rank=rank, world_size=world_size)
            write_image(LocalFilesystem(), str(path), image, timeout=1.0)
        return path

    return store


def _tensor(left: torch.Tensor, right: torch.Tensor, stored: Callable[..., Path]) -> Any:
    """The difference of two tensors that differ."""
    places = stored({"a": {"x": left}}), stored({"a": {"x": right}})
    [changed] = document("diff", *places, status=1)["changed"]
    assert changed["path"] == "a/x"
    return changed["difference"]


# --- the same ------------------------------------------------------------------------------


def test_the_same_state_saved_by_any_number_of_workers(stored: Callable[..., Path]) -> None:
    state = {"a": {"x": torch.arange(1000.0), "n": 3}, "b": [1.5, None, "text"]}
    one, three = stored(state), stored(state, world_size=3)
    assert len(list(three.iterdir())) == 6
    found = document("diff", one, three)
    assert (found["equal"], found["tensors"]) == (1, 1)
    assert [each for key, each in found.items() if isinstance(each, list) and each] == []
    assert "the same bit for bit: 1 tensor" in told("diff", one, three)


def test_another_time_and_attempt_are_no_difference(tmp_path: Path) -> None:
    first = tmp_path / runs.saved(tmp_path, 20)
    second = tmp_path / runs.saved(tmp_path, 20, attempt="0c1d2e")
    assert told("diff", first, second).splitlines()[-1].startswith("the same bit for bit: ")


def test_nans_of_the_same_bits_are_equal(stored: Callable[..., Path]) -> None:
    state = {"a": {"x": torch.tensor([NAN, math.inf, -0.0]), "y": NAN, "z": np.float32(NAN)}}
    assert document("diff", stored(state), stored(state))["equal"] == 1


def test_sets_have_no_order(stored: Callable[..., Path]) -> None:
    one, other = {0, 8}, {8, 0}
    assert list(one) != list(other)
    assert told("diff", stored({"a": {"x": one}}), stored({"a": {"x": other}}))


def test_the_device_is_no_difference(stored: Callable[..., Path]) -> None:
    here, there = (stored({"a": {"x": torch.zeros(2)}}) for _ in range(2))
    [manifest] = there.glob("manifest-*")

    def moved(body: dict[str, Any]) -> None:
        body["parts"]["a"]["value"]["x"]["device"] = "accelerator"

    manifest.write_bytes(edited(manifest.read_bytes(), moved))
    assert told("diff", here, there)


# --- tensors -------------------------------------------------------------------------------


def test_how_far_tensors_are_apart(stored: Callable[..., Path]) -> None:
    left = torch.arange(12.0).reshape(3, 4)
    right = left.clone()
    right[1, 2], right[2, 3] = 8.0, 11.5
    gap = _tensor(left, right, stored)
    assert gap == {
        "count": 2,
        "numel": 12,
        "first": 6,
        "absolute": 2.0,
        "relative": 0.25,
        "nan": 0,
    }


def test_large_tensors_are_looked_at_to_their_end(stored: Callable[..., Path]) -> None:
    left = torch.zeros(2**21 + 3)
    right = left.clone()
    right[2**20 + 1], right[-1] = 1.0, -3.0
    gap = _tensor(left, right, stored)
    assert (gap["count"], gap["first"], gap["absolute"]) == (2, 2**20 + 1, 3.0)


def test_zeros_of_both_signs_differ(stored: Callable[..., Path]) -> None:
    gap = _tensor(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]), stored)
    assert (gap["count"], gap["absolute"], gap["relative"]) == (1, 0.0, 0.0)


def test_a_nan_for_a_number_counts_apart(stored: Callable[..., Path]) -> None:
    gap = _tensor(torch.tensor([1.0, 2.0, NAN]), torch.tensor([NAN, 4.0, NAN]), stored)
    assert (gap["count"], gap["nan"], gap["absolute"], gap["relative"]) == (2, 1, 2.0, 0.5)


def test_infinity_is_infinitely_far(stored: Callable[..., Path]) -> None:
    gap = _tensor(torch.tensor([1.0]), torch.tensor([math.inf]), stored)
    assert (gap["absolute"], gap["relative"]) == ("inf", "inf")


def test_neighbouring_large_integers(stored: Callable[..., Path]) -> None:
    for dtype in (torch.int64, torch.uint64):
        gap = _tensor(
            torch.tensor([2**62], dtype=dtype), torch.tensor([2**62 + 1], dtype=dtype), stored
        )
        assert (gap["absolute"], gap["count"]) == (1.0, 1)
    ends = torch.tensor([-(2**63)]), torch.tensor([2**63 - 1])
    assert _tensor(*ends, stored)["absolute"] == 2.0**64


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e8m0fnu),
        *(torch.int8, torch.uint16, torch.complex64, torch.complex32),
    ],
    ids=str,
)
def test_all_kinds_of_numbers(stored: Callable[..., Path], dtype: torch.dtype) -> None:
    left, right = torch.tensor([1.0, 2.0]).to(dtype), torch.tensor([1.0, 4.0]).to(dtype)
    gap = _tensor(left, right, stored)
    assert (gap["count"], gap["absolute"], gap["relative"], gap["nan"]) == (1, 2.0, 0.5, 0)
    assert gap["numel"] == (4 if dtype.is_complex else 2)


def test_truth_values(stored: Callable[..., Path]) -> None:
    assert _tensor(torch.tensor([True, False]), torch.tensor([True, True]), stored)["count"] == 1


@pytest.mark.parametrize("dtype", ["<f8", ">f4", "<i2", "?", "<c16"])
def test_arrays_of_numpy(stored: Callable[..., Path], dtype: str) -> None:
    places = [stored({"a": {"x": np.array([0, n], dtype=dtype)}}) for n in (0, 1)]
    [changed] = document("diff", *places, status=1)["changed"]
    assert changed["form"]["shape"] == [2]
    assert changed["form"]["dtype"].startswith("numpy ")
    assert (changed["difference"]["count"], changed["difference"]["absolute"]) == (1, 1.0)


def test_texts_of_numpy_are_no_numbers(stored: Callable[..., Path]) -> None:
    places = [stored({"a": {"x": np.array(["one", text])}}) for text in ("two", "six")]
    assert document("diff", *places, status=1)["changed"][0]["difference"] is None
    assert "a/x" in told("diff", *places, status=1)


def test_another_shape_or_dtype(stored: Callable[..., Path]) -> None:
    left = stored({"a": {"x": torch.zeros(4), "y": torch.zeros(2)}})
    right = stored({"a": {"x": torch.zeros(2, 2), "y": torch.zeros(2, dtype=torch.int32)}})
    found = document("diff", left, right, status=1)
    assert [each["path"] for each in found["reshaped"]] == ["a/x", "a/y"]
    assert found["reshaped"][0]["left"] == {"dtype": "float32", "shape": [4]}
    assert (found["tensors"], found["equal"]) == (0, 0)
    assert "float32 [2, 2]" in told("diff", left, right, status=1)


def test_the_first_to_differ_in_the_order_of_the_state(stored: Callable[..., Path]) -> None:
    names = ["z", "b", "y", "a"]
    left = stored({"m": {n: torch.zeros(1) for n in names}})
    right = stored({"m": {n: torch.ones(1) if n in "by" else torch.zeros(1) for n in names}})
    found = document("diff", left, right, status=1)
    assert [each["path"] for each in found["changed"]] == ["m/b", "m/y"]
    assert (found["equal"], found["tensors"]) == (2, 4)
    screen = told("diff", left, right, status=1)
    assert screen.endswith("2 of 4 tensors are equal bit for bit\nthe first that differs is m/b\n")


def test_tied_weights_count_once(stored: Callable[..., Path]) -> None:
    places = []
    for value in (0.0, 1.0):
        weight = torch.full((3,), value)
        places.append(stored({"m": {"first": weight, "second": weight}}))
    found = document("diff", *places, status=1)
    assert [each["path"] for each in found["changed"]] == ["m/first"]
    assert found["tensors"] == 1


# --- what is no tensor ---------------------------------------------------------------------


def test_values_that_differ_with_both(stored: Callable[..., Path]) -> None:
    left = stored({"a": {"n": 1, "same": [1, 2], "deep": [{"lr": 0.5}]}})
    right = stored({"a": {"n": 1.0, "same": [1, 2], "deep": [{"lr": 0.25}]}})
    found = document("diff", left, right, status=1)
    assert found["values"] == [
        {"path": "a/n", "left": "1", "right": "1.0"},
        {"path": "a/deep/0/lr", "left": "0.5", "right": "0.25"},
    ]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((1, 2), [1, 2]),
        ({1: 2}, {"1": 2}),
        ({1: 2, "[1]": 3}, {1: 4, "[1]": 3}),
        ({(*range(99), 1): 2, (*range(99), 2): 3}, {(*range(99), 1): 4, (*range(99), 2): 3}),
        ({"a": 1}, collections.OrderedDict(a=1)),
        ([], {}),
        (collections.deque([1], maxlen=2), collections.deque([1], maxlen=3)),
        (True, 1),
        (0.0, -0.0),
        (b"a", "a"),
        (np.float32(1), np.float64(1)),
        (torch.float32, torch.float64),
        ([1], [[1]]),
        ({1, 2}, {1, 3}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_values_that_look_alike(stored: Callable[..., Path], left: Any, right: Any) -> None:
    assert run("diff", stored({"a": {"x": left}}), stored({"a": {"x": right}})).exit_code == 1


def test_of_long_values_the_first_place_is_told(stored: Callable[..., Path]) -> None:
    values = list(range(625))
    left = stored({"a": tuple(values)})
    values[17] = -1
    [found] = document("diff", left, stored({"a": tuple(values)}), status=1)["values"]
    assert found["left"] == "tuple of 625: [17] is 17"
    assert found["right"] == "tuple of 625: [17] is -1"


def test_a_tensor_for_a_value(stored: Callable[..., Path]) -> None:
    places = stored({"a": {"x": torch.zeros(2)}}), stored({"a": {"x": 0.0}})
    [found] = document("diff", *places, status=1)["values"]
    assert (found["left"], found["right"]) == ("tensor of float32 [2]", "0.0")


def test_what_only_one_has(stored: Callable[..., Path]) -> None:
    left = stored({"a": {"x": 1, "t": torch.zeros(1)}, "b": 1})
    right = stored({"a": {"x": 1, "new": {"deep": torch.zeros(1)}}, "c": 1})
    found = document("diff", left, right, status=1)
    assert sorted(found["only_left"]) == ["a/t", "b"]
    assert sorted(found["only_right"]) == ["a/new/deep", "c"]
    screen = told("diff", left, right, status=1)
    assert "only in A:\n" in screen
    assert "only in B:\n" in screen


def test_a_part_of_another_kind(stored: Callable[..., Path]) -> None:
    places = stored({"a": {}}, kind="object"), stored({"a": {}}, kind="scheduler")
    [found] = document("diff", *places, status=1)["values"]
    assert found == {"path": "a", "left": "object", "right": "scheduler"}


# --- workers -------------------------------------------------------------------------------


def test_what_each_worker_has_is_compared_for_each(stored: Callable[..., Path]) -> None:
    def own(odd: int) -> Callable[[int], Mapping[str, Any]]:
        return lambda rank: {
            "own": {"t": torch.tensor([rank + (odd if rank == 1 else 0)]), "n": rank}
        }

    shared = {"a": {"x": torch.zeros(7), "n": 1}}
    left = stored(shared, own(0), world_size=3)
    right = stored(shared, own(5), world_size=3)
    found = document("diff", left, right, status=1)
    assert [each["path"] for each in found["changed"]] == ["own/t (rank 1)"]
    assert found["values"] == []
    assert (found["equal"], found["tensors"]) == (3, 4)


def test_another_number_of_workers_has_others_streams(tmp_path: Path) -> None:
    places = [tmp_path / str(n) for n in (1, 2)]
    for n, path in enumerate(places, 1):
        runs.save(LocalFilesystem(), str(path), 20, world_size=n)
    found = document("diff", *places, status=1)
    assert found["only_left"] == []
    own = ["rng (rank 1)", *(f"model/1.{name} (rank 1)" for name in _BUFFERS)]
    assert sorted(found["only_right"]) == sorted(own)
    assert [each["path"] for each in found["values"]] == ["loader/world_size"]
    turned = document("diff", *reversed(places), status=1)
    assert turned["only_left"] == found["only_right"]


_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


# --- the command ---------------------------------------------------------------------------


def test_trouble_is_no_answer(checkpoint: Path, tmp_path: Path) -> None:
    assert "no manifest there" in refused("diff", checkpoint, tmp_path, status=2)
    damaged = tmp_path / "damaged"
    runs.save(LocalFilesystem(), str(damaged), 20)
    runs.damage(damaged / "shard-00000-of-00002.safetensors")
    assert "are not those that were written" in refused("diff", checkpoint, damaged, status=2)
    assert run("diff", checkpoint).exit_code == 2


def test_a_screen_has_twenty_of_a_kind(stored: Callable[..., Path]) -> None:
    left = stored({"a": {f"v{i}": i for i in range(30)}})
    right = stored({"a": {f"v{i}": -i - 1 for i in range(30)}})
    screen = told("diff", left, right, status=1)
    assert "and 10 more: --all shows them" in screen
    assert "a/v20 " not in screen
    assert "a/v29 " in told("diff", left, right, "--all", status=1)
    assert len(document("diff", left, right, status=1)["values"]) == 30


def test_names_and_values_are_printed_as_they_are(stored: Callable[..., Path]) -> None:
    left, right = stored({"a": {"[red]x": "[bold]:smile:[/bold]"}}), stored({"a": {"[red]x": "y"}})
    screen = told("diff", left, right, status=1)
    assert "a/[red]x '[bold]:smile:[/bold]' 'y'" in screen


_MEMORY = r"""
import re, sys
from pathlib import Path
from typer.testing import CliRunner
from ray_accel_ckpt.cli import app

def peak():
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

CliRunner().invoke(app, ["diff", *sys.argv[3:]])  # what is imported late is not what is measured
before = peak()
done = CliRunner().invoke(app, ["diff", *sys.argv[1:3]])
assert done.exit_code == 1, done.output
print(peak() - before)
"""


def test_memory_is_that_of_the_largest_tensors(stored: Callable[..., Path]) -> None:
    size, count = 8 * 2**20, 32
    small = stored({"a": {"x": torch.zeros(1)}})
    places = [
        stored({"a": {f"x{i}": torch.full((size // 4,), float(n)) for i in range(count)}})
        for n in (0, 1)
    ]
    command = [sys.executable, "-c", _MEMORY, *map(str, (*places, small, small))]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    # Two tensors, their elements as float64 chunk by chunk, and what the heap keeps of others;
    # far from the half of one checkpoint.
    assert int(ran.stdout) < size * count / 2
