"""A run whose nodes come and go: at each size it goes on, and each sample comes once."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.cluster_utils import Cluster
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ray_accel_ckpt import Checkpointer, EverySteps, run_config
from ray_accel_ckpt.state.orders import Shuffled

SAMPLES, GLOBAL_BATCH, EPOCHS, EVERY = 203, 8, 2, 4
STEPS = 26
"""Of an epoch: 25 full batches and the rest."""
# Where all wait for the cluster to lose a node, and where to be given one.
SHRINK_AT, GROW_AT = 11, 33


class Indices(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index)])


def _loop(config: dict[str, Any]) -> None:
    import ray.train

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    out = Path(config["out"])
    ckpt = Checkpointer(save=EverySteps(EVERY))
    torch.manual_seed(3)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    model, optimizer = ckpt.prepare(model, optimizer)
    loader = ckpt.prepare(
        DataLoader(Indices(), batch_size=1, shuffle=True), global_batch_size=GLOBAL_BATCH
    )
    ckpt.load_state()
    life = torch.tensor(len(list(out.glob("life-*"))))
    torch.distributed.broadcast(life, src=0)
    torch.distributed.barrier()
    name = f"life-{int(life):03d}" if rank == 0 else f"helper-{int(life):03d}-{rank}"
    seen = (out / name).open("w")
    print(
        json.dumps({"resumed": ckpt.global_step, "world_size": world_size}), file=seen, flush=True
    )
    for epoch in ckpt.epochs(EPOCHS):
        for batch in loader:
            ckpt.backward(model(batch).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            ckpt.step()
            # Of the last 3 samples of an epoch, one of 4 workers is handed a copy, as padding.
            indices = [] if loader.padding else [int(i) for i in batch.flatten()]
            record = {"epoch": epoch, "step": ckpt.global_step, "indices": indices}
            print(json.dumps(record), file=seen, flush=True)
            # Until killed, without a word: here the driver changes the cluster.
            if _must_wait(out, ckpt.global_step, world_size):
                threading.Event().wait()


def _wait_at(out: Path, step: int, *, workers: int) -> None:
    """Have groups of no more than so many workers wait at a step, whichever life it is."""
    new = out / "limit.new"
    new.write_text(f"{step} {workers}")
    new.rename(out / "limit")


def _must_wait(out: Path, step: int, world_size: int) -> bool:
    at, workers = map(int, (out / "limit").read_text().split())
    return step == at and world_size <= workers


def _lives(out: Path) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each life of the group: what it began with, and its steps with all ranks' samples."""
    lives = []
    for file in sorted(out.glob("life-*")):
        number = file.name.removeprefix("life-")
        ranks = [file, *sorted(out.glob(f"helper-{number}-*"))]
        lines = [
            [json.loads(line) for line in each.read_text().splitlines() if line.endswith("}")]
            for each in ranks
        ]
        if not all(lines):
            continue
        steps = [
            {**first, "indices": [i for rank in step for i in rank["indices"]]}
            for step in zip(*(each[1:] for each in lines), strict=False)
            for first in step[:1]
        ]
        lives.append((lines[0][0], steps))
    return lives


def _saved(storage: Path, step: int, world_size: int) -> bool:
    """Whether the last save before `step` is whole."""
    name = f"checkpoint_{step // EVERY * EVERY:08d}_*/manifest-*-of-{world_size:05d}.json"
    return len(list((storage / "elastic").glob(name))) == world_size


def _until(condition: Callable[[], bool], fit: threading.Thread) -> None:
    while not condition():
        assert fit.is_alive(), "the run ended before its time"
        time.sleep(0.2)


# Ray's own handling of files and deprecated calls is not what is tested here.
@pytest.mark.filterwarnings("ignore")
# In `make test`, an elastic run loses its node among what strikes at random: tests/chaos.
@pytest.mark.long
def test_a_run_goes_on_with_the_nodes_there_are(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    # Ray may begin with the nodes that it has heard of, and take the other in a moment later.
    _wait_at(out, SHRINK_AT, workers=4)
    # Only these nodes have slots, so no worker is on the head.
    first, second = (cluster.add_node(num_cpus=2, resources={"slot": 2}) for _ in range(2))
    results: list[Any] = []
    trainer = TorchTrainer(
        _loop,
        train_loop_config={"out": str(out)},
        scaling_config=ScalingConfig(
            num_workers=(2, 4),
            resources_per_worker={"CPU": 1, "slot": 1},
            elastic_resize_monitor_interval_s=2,
        ),
        run_config=run_config("elastic", tmp_path),
    )
    fit = threading.Thread(target=lambda: results.append(trainer.fit()))
    fit.start()
    third = None
    try:

        def reached(step: int, world_size: int) -> bool:
            lives = _lives(out)
            return bool(lives) and any(
                begin["world_size"] == world_size and steps and steps[-1]["step"] == step
                for begin, steps in lives[-1:]
            )

        _until(lambda: reached(SHRINK_AT, 4) and _saved(tmp_path, SHRINK_AT, 4), fit)
        cluster.remove_node(second, allow_graceful=False)
        _wait_at(out, GROW_AT, workers=2)
        _until(lambda: reached(GROW_AT, 2) and _saved(tmp_path, GROW_AT, 2), fit)
        third = cluster.add_node(num_cpus=2, resources={"slot": 2})
        fit.join()
    finally:
        for node in filter(None, (first, third)):
            cluster.remove_node(node, allow_graceful=False)
    assert results
    lives = _lives(out)
    whole = next(i for i, (begin, _) in enumerate(lives) if begin["world_size"] == 4)
    lives = lives[whole:]
    assert [begin["world_size"] for begin, _ in lives][:2] == [4, 2]
    assert lives[-1][0]["world_size"] == 4
    _lost_no_more_than_since_the_last_save(lives)
    _each_sample_once_in_the_order_of_one_run(lives)


def _lost_no_more_than_since_the_last_save(lives: list[tuple[Any, list[Any]]]) -> None:
    for (_, steps), (begin, _) in itertools.pairwise(lives):
        assert begin["resumed"] == steps[-1]["step"] // EVERY * EVERY


def _each_sample_once_in_the_order_of_one_run(lives: list[tuple[Any, list[Any]]]) -> None:
    counted: dict[int, dict[str, Any]] = {}
    for begin, steps in lives:
        counted = {step: each for step, each in counted.items() if step <= begin["resumed"]}
        counted |= {each["step"]: each for each in steps}
    assert sorted(counted) == list(range(1, EPOCHS * STEPS + 1))
    for epoch in range(EPOCHS):
        order = [i for each in counted.values() if each["epoch"] == epoch for i in each["indices"]]
        assert order == Shuffled(SAMPLES).draw(3, epoch).tolist()
