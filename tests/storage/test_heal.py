"""Ray's record of a run, mended; and read by Ray's own checkpoint manager."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.train import Checkpoint, CheckpointConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2._internal.execution.training_report import _TrainingReport

from ray_accel_ckpt import heal_run
from ray_accel_ckpt.runtime import heal
from ray_accel_ckpt.runtime.record import SNAPSHOT
from ray_accel_ckpt.storage.catalog import checkpoint_name
from ray_accel_ckpt.storage.fakes import MemoryFilesystem, RecordingFilesystem, replay
from ray_accel_ckpt.storage.filesystem import LocalFilesystem
from ray_accel_ckpt.storage.writer import write_image
from tests.helpers_image import small_image

pytestmark = pytest.mark.filterwarnings("ignore")

ADOPTED = "is whole and was not registered: adopted"


def _saved(run: Path, step: int, *, ranks: int = 2) -> str:
    """A checkpoint of two ranks of which so many came to their end; its name."""
    name = checkpoint_name(step, "aaaaaa")
    for rank in range(ranks):
        image = small_image(step, rank=rank, world_size=2)
        write_image(LocalFilesystem(), str(run / name), image, timeout=1.0)
    return name


class Ray:
    """A driver of the run as far as checkpoints go."""

    def __init__(self, run: Path, config: CheckpointConfig) -> None:
        self._storage = StorageContext(run.parent, run.name)
        self._manager = CheckpointManager(config, self._storage)

    def register(self, name: str, **metrics: Any) -> None:
        path = self._storage.build_checkpoint_path_from_name(name)
        checkpoint = Checkpoint(path, self._storage.storage_filesystem)
        report = _TrainingReport(checkpoint=checkpoint, metrics=metrics, validation=False)

        async def register() -> None:
            self._manager.register_checkpoint(report)

        asyncio.run(register())

    @property
    def latest(self) -> Any:
        return self._manager.latest_checkpoint_result

    @property
    def names(self) -> list[str]:
        """Of all it knows, the best last."""
        return [Path(r.checkpoint.path).name for r in self._manager._checkpoint_results]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


def _heal(run: Path, config: CheckpointConfig | None = None) -> tuple[str, ...]:
    return heal_run(run.parent, run.name, checkpoint_config=config)


def _written(path: Path) -> tuple[int, int]:
    """What changes when a file is written or replaced, and not when it is read."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def test_newer_whole_checkpoints_are_adopted_in_their_order(run: Path) -> None:
    config = CheckpointConfig(num_to_keep=2)
    older, latest = _saved(run, 4), _saved(run, 8)
    _saved(run, 6)
    ray = Ray(run, config)
    ray.register(older, loss=2.0)
    ray.register(latest, loss=1.0)
    first, second, _ = _saved(run, 12), _saved(run, 16), _saved(run, 20, ranks=1)
    assert _heal(run, config) == tuple(f"checkpoint {name} {ADOPTED}" for name in (first, second))
    assert _heal(run, config) == ()
    ray = Ray(run, config)
    assert ray.names == [older, latest, first, second]
    assert ray.latest.metrics == {}
    state = json.loads((run / SNAPSHOT).read_text())
    assert (state["checkpoint_report_indices"], state["current_report_index"]) == ([0, 1, 2, 3], 4)
    assert Path(ray.latest.checkpoint.path).name == second
    ray.register(_saved(run, 24))
    assert ray.names == [second, checkpoint_name(24, "aaaaaa")]
    assert not (run / first).exists()
    assert not (run / latest).exists()
    assert Ray(run, config).names == ray.names


def test_nothing_newer_means_nothing_is_written(run: Path) -> None:
    Ray(run, CheckpointConfig()).register(_saved(run, 8), loss=1.0)
    _saved(run, 4)
    _saved(run, 12, ranks=1)
    before = _written(run / SNAPSHOT)
    assert _heal(run) == ()
    assert _written(run / SNAPSHOT) == before


def test_a_first_save_that_was_never_registered(run: Path) -> None:
    _saved(run, 4, ranks=1)
    assert _heal(run) == ()
    assert not (run / SNAPSHOT).exists()
    name = _saved(run, 8)
    assert _heal(run) == (f"checkpoint {name} {ADOPTED}",)
    assert Ray(run, CheckpointConfig()).names == [name]


def test_a_latest_that_is_gone_and_a_newer_one(run: Path) -> None:
    ray = Ray(run, CheckpointConfig())
    kept, gone = _saved(run, 4), checkpoint_name(8, "aaaaaa")
    ray.register(kept, loss=2.0)
    ray.register(gone, loss=1.0)
    adopted = _saved(run, 6)
    assert _heal(run) == (
        f"checkpoint {gone} is gone: taken out",
        f"checkpoint {adopted} {ADOPTED}",
    )
    assert Ray(run, CheckpointConfig()).names == [kept, adopted]


@pytest.mark.parametrize("order", ["min", "max"])
@pytest.mark.parametrize("torn", [False, True])
def test_with_a_score_those_whose_metrics_are_lost_rank_last(
    run: Path, order: str, torn: bool
) -> None:
    config = CheckpointConfig(
        num_to_keep=2, checkpoint_score_attribute="score", checkpoint_score_order=order
    )
    best = 1.0 if order == "min" else 3.0
    known = _saved(run, 4)
    Ray(run, config).register(known, score=2.0)
    adopted = _saved(run, 8)
    if torn:
        (run / SNAPSHOT).write_text('{"ray_version"')
    assert _heal(run, config)[-1] == f"checkpoint {adopted} {ADOPTED}"
    if not torn:
        assert Ray(run, config).names == [adopted, known]
    # With a record that was torn the known one's are lost too.
    registered = json.loads((run / SNAPSHOT).read_text())["checkpoint_results"]
    metrics = [heal.without_placeholders(each["metrics"]) for each in registered]
    assert metrics == [{}, {} if torn else {"score": 2.0}]
    # Metrics are anything, where they do not come from a record.
    odd = {"nested": {"score": -sys.float_info.max, "loss": 1.0}, "array": np.zeros(2)}
    assert heal.without_placeholders(odd) == {"nested": {"loss": 1.0}, "array": odd["array"]}
    for step, score in ((12, 2.0), (16, best), (20, 2.0)):
        # A driver for each: what is adopted must come through Ray's own writing.
        ray = Ray(run, config)
        ray.register(_saved(run, step), score=score)
        assert adopted not in ray.names[1:]
    assert ray.names[-1] == checkpoint_name(16, "aaaaaa")
    assert len(ray.names) == 2
    assert not (run / adopted).exists()


@pytest.mark.parametrize("order", ["min", "max"])
@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("attribute", ["loss", "eval/loss"])
def test_a_score_that_ray_writes_as_null_ranks_last(
    run: Path, attribute: str, score: float, order: str
) -> None:
    """Without it, the next driver's first save ends the run."""
    config = CheckpointConfig(
        num_to_keep=2, checkpoint_score_attribute=attribute, checkpoint_score_order=order
    )

    def metrics(value: float) -> dict[str, Any]:
        # A null that is no score is none of our business, wherever it lies.
        others: dict[str, Any] = {"other": math.nan, "test": {"loss": math.nan}}
        return {**others, **({"loss": value} if attribute == "loss" else {"eval": {"loss": value}})}

    known, bad = _saved(run, 4), _saved(run, 8)
    ray = Ray(run, config)
    ray.register(known, **metrics(2.0))
    ray.register(bad, **metrics(score))
    assert _heal(run, config) == (f"checkpoint {bad} has a score that is no number: ranked last",)
    assert _heal(run, config) == ()
    ray = Ray(run, config)
    assert ray.names == [bad, known]
    assert (Path(ray.latest.checkpoint.path).name, ray.latest.metrics["other"]) == (bad, None)
    ray.register(_saved(run, 12), **metrics(3.0))
    assert bad not in ray.names
    assert not (run / bad).exists()


def test_cut_off_anywhere_it_is_done_when_called_again(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [_saved(run, 4), _saved(run, 8)]
    files = {str(p): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    torn = files[str(run / SNAPSHOT)] = b'{"ray_version": "2", "checkpoint_res'

    def healed(filesystem: Any) -> tuple[str, ...]:
        monkeypatch.setattr(heal, "resolve", lambda path, given: (filesystem, str(path)))
        return _heal(run)

    memory = MemoryFilesystem(files)
    recording = RecordingFilesystem(memory)
    assert len(healed(recording)) == 3
    assert len(recording.operations) == 6
    for cut in range(7):
        for part in (True, False):
            left = replay(recording.operations[:cut], onto=files, torn=part)
            healed(left)
            state = json.loads(left.files[str(run / SNAPSHOT)])
            assert [r["checkpoint_dir_name"] for r in state["checkpoint_results"]] == names
            assert str(run / f"{SNAPSHOT}.torn") in left.files
    assert memory.files[str(run / f"{SNAPSHOT}.torn")] == torn
