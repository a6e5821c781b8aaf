"""A real `TorchTrainer`, real worker processes, really killed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
import ray
import ray.train
import torch
from moto.server import ThreadedMotoServer
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from torch import nn

from ray_accel_ckpt import (
    Checkpointer,
    EverySteps,
    ProjectConfiguration,
    errors,
    heal_run,
    open_checkpoint,
    run_config,
)
from ray_accel_ckpt.storage.catalog import step_of
from tests.ray.faults import POINTS
from tests.ray.runs import EVERY, digests, fit, loop, record, records, until

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    # Ray's own handling of files and deprecated calls is not what is tested here.
    pytest.mark.filterwarnings("ignore"),
]


def test_a_killed_worker_changes_no_bit(tmp_path: Path, untouched: list[str]) -> None:
    """Killed in its first save, so that it starts anew, and then at each point of a life."""
    deaths = [
        (point, number % 2, 4 * number + 1)
        for number, point in enumerate(["after the shard, before the manifest", *POINTS])
    ]
    assert deaths[0][2] < EVERY
    faults = [
        {"point": point, "rank": rank, "after": after, "marker": str(tmp_path / f"killed-{after}")}
        for point, rank, after in deaths
    ]
    result = fit(tmp_path, "run", faults=faults)
    survived = [fault for fault in faults if not Path(fault["marker"]).exists()]
    assert not survived
    assert digests(tmp_path, "run") == untouched
    assert records(tmp_path, "run")[0]["resumed_from"] is not None
    open_checkpoint(result.checkpoint).verify()


def test_killed_in_its_last_save_a_run_has_its_end_as_result(tmp_path: Path) -> None:
    marker = tmp_path / "killed"
    point = "after the manifest, before Ray registers"
    fault = {"point": point, "rank": 0, "after": 23, "marker": str(marker)}
    # 24 steps: only the end is saved after the 20th, and all before it are registered by then.
    run = str(tmp_path / "run")
    result = fit(tmp_path, "run", workers=1, epochs=1, every=5, faults=[fault], run=run)
    assert marker.exists(), "the worker was not killed"
    resumed_from = records(tmp_path, "run", workers=1)[0]["resumed_from"]
    assert step_of(Path(resumed_from).name) == 24
    saved = open_checkpoint(result.checkpoint)
    assert (saved.step, saved.epoch) == (24, 1)
    assert saved.path != resumed_from, "it was registered: nothing is shown"
    # Ray would rank an end without the score best if the order is "min", and delete the others.
    assert set(result.metrics) == {"loss"}


def _back_loop(config: dict[str, Any]) -> None:
    """Three steps, back to the first, and four more."""
    with pytest.raises(errors.ConfigurationError, match="automatic_checkpoint_naming has no place"):
        Checkpointer(project_config=ProjectConfiguration("x", automatic_checkpoint_naming=True))
    ckpt = Checkpointer(save=EverySteps(1))
    ckpt.prepare(nn.Linear(2, 2))
    ckpt.load_state()
    for last in (3, 5):
        for _ in ckpt.epochs(1):
            while ckpt.global_step < last:
                ckpt.step(_metrics)
                until(lambda: record(config["run"]).step == ckpt.global_step)
        (first,) = Path(config["run"]).glob("checkpoint_00000001_*")
        if last == 3:
            assert ckpt.load_state(first)


def _metrics() -> dict[str, Any]:
    import numpy as np

    return {
        "loss": np.float32(1.5),
        "tensor": torch.tensor(2.5),
        "one": np.ones(1),
        "nested": {"count": np.int64(3)},
    }


@pytest.mark.long
def test_a_loop_that_goes_back_saves_in_directories_of_their_own(tmp_path: Path) -> None:
    trainer = TorchTrainer(
        _back_loop,
        train_loop_config={"run": str(tmp_path / "run")},
        scaling_config=ScalingConfig(num_workers=1),
        run_config=run_config("run", tmp_path, num_to_keep=8, max_failures=0),
    )
    result = trainer.fit()
    assert open_checkpoint(result.checkpoint).step == 5
    # The end has the same step as the last one, twice.
    kept = [open_checkpoint(checkpoint) for checkpoint, _ in result.best_checkpoints]
    assert [saved.step for saved in kept] == [2, 3, 3, 2, 3, 4, 5, 5]
    for saved in kept:
        saved.verify()
    # numpy's and torch's scalars reached Ray as numbers: others would have ended the run.
    assert result.metrics == {"loss": 1.5, "tensor": 2.5, "one": 1.0, "nested": {"count": 3}}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[pyarrow.fs.S3FileSystem]:
    """An S3 server over HTTP that the workers reach as they would reach a real one."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    filesystem = pyarrow.fs.S3FileSystem(
        access_key="test",
        secret_key="test",  # noqa: S106 - what the server takes
        region="us-east-1",
        scheme="http",
        endpoint_override=f"{host}:{port}",
        allow_bucket_creation=True,
    )
    filesystem.create_dir("bucket")
    yield filesystem
    server.stop()


def test_a_killed_worker_changes_no_bit_on_s3(
    tmp_path: Path, untouched: list[str], bucket: pyarrow.fs.S3FileSystem
) -> None:
    (tmp_path / "out").mkdir()
    marker = tmp_path / "killed"
    fault = {"point": "mid-epoch", "rank": 1, "after": 18, "marker": str(marker)}
    trainer = TorchTrainer(
        loop,
        # And the copies of a save go on beside training, which must not be seen.
        train_loop_config={"out": str(tmp_path / "out"), "faults": [fault], "overlap": True},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=run_config("run", "bucket/runs", storage_filesystem=bucket),
    )
    result = trainer.fit()
    assert marker.exists(), "the worker was not killed"
    records = [json.loads((tmp_path / "out" / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [record["digest"] for record in records] == untouched
    assert records[0]["resumed_from"] is not None
    saved = open_checkpoint(result.checkpoint)
    saved.verify()
    assert saved.path.startswith("bucket/runs/run/checkpoint_")


def test_a_second_driver_goes_on(tmp_path: Path, untouched: list[str]) -> None:
    fit(tmp_path, "run", epochs=2)
    # What a crash leaves: Ray's record of the run cut in half.
    snapshot = tmp_path / "run" / "checkpoint_manager_snapshot.json"
    snapshot.write_bytes(snapshot.read_bytes()[:100])
    result = fit(tmp_path, "run", epochs=3)
    assert digests(tmp_path, "run") == untouched
    assert (tmp_path / "run" / "checkpoint_manager_snapshot.json.torn").exists()
    open_checkpoint(result.checkpoint).verify()


@pytest.mark.long
def test_a_finished_run_returns_at_once(tmp_path: Path, untouched: list[str]) -> None:
    result = fit(tmp_path, "run")
    assert digests(tmp_path, "run") == untouched
    before = result.checkpoint.path
    again = fit(tmp_path, "run", epochs=3)
    assert again.checkpoint.path == before
    assert again.metrics == result.metrics
    assert set(again.metrics) == {"loss"}
    # Rank 1 now has rank 0's BatchNorm buffers: no forward has followed to make them its own.
    assert digests(tmp_path, "run")[0] == untouched[0]

    shutil.rmtree(result.checkpoint.path)
    (mended,) = heal_run(tmp_path, "run")
    assert Path(result.checkpoint.path).name in mended
    assert heal_run(tmp_path, "run") == ()
    result = fit(tmp_path, "run", epochs=3)
    assert result.checkpoint.path != before
    assert digests(tmp_path, "run")[0] == untouched[0]


def _local_loop(config: dict[str, Any]) -> None:
    ckpt = Checkpointer(save=EverySteps(1))
    model = ckpt.prepare(nn.Linear(2, 2))
    assert ckpt.load_state() is False
    for _ in ckpt.epochs(1):
        ckpt.step()
    path = ckpt.save_state(Path(config["directory"], "explicit"))
    with torch.no_grad():
        model.weight.zero_()
    assert ckpt.load_state(path)
    assert model.weight.count_nonzero() > 0


def test_local_mode_saves_and_loads_in_an_explicit_directory(tmp_path: Path) -> None:
    TorchTrainer(
        _local_loop,
        train_loop_config={"directory": str(tmp_path)},
        scaling_config=ScalingConfig(num_workers=0),
        run_config=run_config("local", tmp_path),
    ).fit()
    assert open_checkpoint(tmp_path / "explicit").step == 1


def test_run_config_passes_through_and_checks(tmp_path: Path) -> None:
    config = run_config("a", tmp_path, worker_runtime_env={"env_vars": {"A": "1"}})
    assert config.failure_config.max_failures == 1000
    assert config.failure_config.max_preemption_failures == -1
    assert config.checkpoint_config.num_to_keep == 3
    assert config.worker_runtime_env == {"env_vars": {"A": "1"}}
    own = ray.train.FailureConfig(max_failures=3)
    assert run_config("a", tmp_path, failure_config=own).failure_config is own
    assert list((tmp_path / "a").iterdir()) == []
    with pytest.raises(errors.ConfigurationError, match="fixed name"):
        run_config("", tmp_path)
    with pytest.raises(errors.ConfigurationError, match="not both"):
        run_config("a", tmp_path, failure_config=own, max_failures=2)
    relaxed = ray.train.FailureConfig(max_failures=3, relax_collectives_on_preemption=True)
    with pytest.raises(errors.ConfigurationError, match="relax_collectives_on_preemption"):
        run_config("a", tmp_path, failure_config=relaxed)
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.StorageError, match="could not write to the storage"):
        run_config("a", tmp_path / "file")
