"""The number of workers changes from life to life: gradients, random streams, streams of data."""

from __future__ import annotations

import itertools
import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ray_accel_ckpt import Checkpointer, ProjectConfiguration
from tests.gloo.workers import spawn, write
from tests.pure.loaders import prepared

# --- gradients -------------------------------------------------------------------------

WHOLE, SAMPLES = 8, 18


def _regression() -> TensorDataset:
    """Whole numbers, and batches of 8 and 2: the gradients are exact, nothing is rounded."""
    x = torch.arange(2.0 * SAMPLES, dtype=torch.float64).reshape(SAMPLES, 2) - SAMPLES
    return TensorDataset(x, x.sum(1, keepdim=True) % 5)


def _model() -> nn.Linear:
    model = nn.Linear(2, 1, dtype=torch.float64)
    nn.init.constant_(model.weight, 3.0)
    nn.init.constant_(model.bias, -1.0)
    return model


def _loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (model(x) - y).square().mean()


def _averaged(rank: int, world_size: int) -> None:
    """DDP's average over ranks is the gradient of one worker that has the whole batch."""
    ckpt = Checkpointer(seed=3)
    data = DataLoader(_regression(), shuffle=True)
    model, loader = ckpt.prepare(_model(), data, global_batch_size=WHOLE)
    whole = prepared(data, seed=3, global_batch_size=WHOLE)
    for by_hand in (False, True):
        padded = 0
        for (x, y), (all_x, all_y) in zip(loader, whole, strict=True):
            model.zero_grad()
            if by_hand:
                (_loss(model, x, y) * ckpt.loss_weight).backward()
            else:
                ckpt.backward(_loss(model, x, y))
            wanted = _model()
            _loss(wanted, all_x, all_y).backward()
            for mine, other in zip(model.parameters(), wanted.parameters(), strict=True):
                assert torch.equal(mine.grad, other.grad)
            padded += loader.padding
        assert padded == (rank == 2)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_gradient_is_that_of_one_worker_with_the_whole_batch(world_size: int) -> None:
    spawn(_averaged, world_size)


def _few_left(rank: int, world_size: int, directory: Path) -> None:
    """Two workers save when 2 of 18 samples are left; three go on."""
    project = ProjectConfiguration(directory / "project", automatic_checkpoint_naming=True)
    ckpt = Checkpointer(project_config=project, seed=3)
    model, loader = ckpt.prepare(_model(), DataLoader(_regression(), batch_size=4, shuffle=True))
    resumed, sizes = ckpt.load_state(), []
    for x, y in loader:
        ckpt.backward(_loss(model, x, y))
        sizes.append(0 if loader.padding else len(x))
        if not resumed and len(sizes) == 2:
            model.zero_grad()
            ckpt.save_state()
            return
    assert resumed
    assert sizes == ([0] if rank == 2 else [1])
    wanted = _model()
    order = [*prepared(DataLoader(_regression(), batch_size=1, shuffle=True), seed=3)][16:]
    _loss(wanted, torch.cat([x for x, _ in order]), torch.cat([y for _, y in order])).backward()
    assert torch.equal(model.module.weight.grad, wanted.weight.grad)
    assert sum(len(x) for x, _ in loader) == 6


def test_more_workers_than_samples_are_left_go_on(tmp_path: Path) -> None:
    """Without padding such a run could never be resumed; with it the gradient is right."""
    for world_size in (2, 3):
        spawn(_few_left, world_size, tmp_path)


# --- random streams, and streams of data -----------------------------------------------


class Queue(IterableDataset[int]):
    """Reads the numbers in its state, which can be dealt out anew."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.left = list(range(60))[rank::world_size]

    def __iter__(self) -> Iterator[int]:
        while self.left:
            yield self.left.pop(0)

    def state_dict(self) -> dict[str, Any]:
        return {"left": self.left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.left = list(state["left"])

    def reshard(self, states: list[dict[str, Any]], num_workers: int) -> list[dict[str, Any]]:
        left = sorted(number for state in states for number in state["left"])
        return [{"left": left[rank::num_workers]} for rank in range(num_workers)]


def _streams() -> list[Any]:
    python, numpy = random.getstate()[1], np.random.get_state(legacy=False)
    words: Any = numpy["state"]
    return [list(python), [words["key"].tolist(), words["pos"]], torch.get_rng_state().tolist()]


def _life(rank: int, world_size: int, directory: Path, life: int) -> None:
    """Load, take two batches, draw, save; note what the random streams were at each end."""
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ray_accel_ckpt").addHandler(handler)
    project = ProjectConfiguration(directory / "project", automatic_checkpoint_naming=True)
    ckpt = Checkpointer(project_config=project, seed=3)
    loader = ckpt.prepare(DataLoader(Queue(rank, world_size), batch_size=2))
    ckpt.load_state()
    loaded, served = _streams(), []
    for batch in loader:
        served += batch.tolist()
        random.random(), np.random.rand(), torch.rand(1)
        if len(served) == 4:
            ckpt.save_state()
            break
    notes = {"loaded": loaded, "saved": _streams(), "served": served, "told": told}
    write(directory / f"{life}-{rank}", json.dumps(notes))


LIVES = (2, 3, 1, 3)


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """Two workers, then three, one, and three again: what each of them noted."""
    directory = tmp_path_factory.mktemp("lives")
    for life, world_size in enumerate(LIVES):
        spawn(_life, world_size, directory, life)
    return [
        [json.loads((directory / f"{life}-{rank}").read_text()) for rank in range(world_size)]
        for life, world_size in enumerate(LIVES)
    ]


def test_the_random_streams_of_ranks_that_stay_go_on(notes: list[list[dict[str, Any]]]) -> None:
    for before, after in itertools.pairwise(notes):
        for old, new in zip(before, after, strict=False):
            assert new["loaded"] == old["saved"]


def test_no_two_workers_ever_share_a_stream(notes: list[list[dict[str, Any]]]) -> None:
    """Rank 2 of the second life and of the fourth are new ones, each with its own."""
    new = [notes[life][rank]["loaded"] for life, rank in ((1, 2), (3, 1), (3, 2))]
    known = [notes[0][rank]["saved"] for rank in range(2)] + [notes[1][2]["saved"]]
    for source in range(3):
        states = [json.dumps(each[source]) for each in (*new, *known)]
        assert len(set(states)) == len(states)


def test_each_new_worker_is_told_once_that_its_streams_are_new(
    notes: list[list[dict[str, Any]]],
) -> None:
    told = [[sum("streams are new" in m for m in n["told"]) for n in life] for life in notes]
    assert told == [[0, 0], [0, 0, 1], [0], [0, 1, 1]]


def test_a_stream_of_data_is_dealt_out_anew_to_all(notes: list[list[dict[str, Any]]]) -> None:
    served = [number for life in notes for each in life for number in each["served"]]
    assert sorted(served) == list(range(len(served)))
    assert len(served) == 4 * sum(LIVES)
