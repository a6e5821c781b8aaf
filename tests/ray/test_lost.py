"""Workers and drivers that are lost, one after the other, all in one run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import ray

from ray_accel_ckpt import open_checkpoint
from ray_accel_ckpt.errors import CheckpointError
from tests.ray.runs import digests, directories, fit, record, records, unnamed, until

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    pytest.mark.filterwarnings("ignore"),
]

DRIVER = """
import os, sys
from pathlib import Path
# It registers nothing: reports are taken from the workers with a poll, and the next is far away.
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "10000"
import ray
from tests.ray.runs import fit
ray.init(address=sys.argv[1], log_to_driver=False)
fit(Path(sys.argv[2]), "run", epochs=3)
"""


def _whole(run: Path) -> set[int]:
    """The steps of the checkpoints in storage that are whole."""
    found = set()
    for name in directories(run):
        try:
            found.add(open_checkpoint(run / name).step)
        except CheckpointError:
            continue
    return found


@pytest.mark.long
def test_workers_lost_again_and_again_and_then_the_driver(
    tmp_path: Path, untouched: list[str]
) -> None:
    run = tmp_path / "run"
    deaths = [
        # Two at once; then the same rank, each time in the way of a save.
        ("mid-epoch", 0, 4),
        ("mid-epoch", 1, 4),
        ("mid-upload", 1, 8),
        ("after the manifest, before Ray registers", 1, 12),
    ]
    markers = [tmp_path / f"killed-{i}" for i in range(len(deaths))]
    faults = [
        {"point": point, "rank": rank, "after": after, "marker": str(marker)}
        for (point, rank, after), marker in zip(deaths, markers, strict=True)
    ]
    result = fit(tmp_path, "run", epochs=2, faults=faults, run=str(run), swept_at=24)
    assert all(marker.exists() for marker in markers), "not all were killed"
    assert unnamed(run) == set()
    open_checkpoint(result.checkpoint).verify()
    registered = record(run)

    address = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, address, str(tmp_path)])
    until(lambda: {28, 32} <= _whole(run))
    driver.kill()
    driver.wait()
    assert record(run) == registered, "they were registered: nothing is shown"

    adopted = next(name for name in unnamed(run) if open_checkpoint(run / name).step == 32)
    result = fit(tmp_path, "run", run=str(run))
    assert records(tmp_path, "run")[0]["resumed_from"] == str(run / adopted)
    assert digests(tmp_path, "run") == untouched
    assert unnamed(run) == set()
    assert len(directories(run)) == 3
    assert record(run).latest == Path(result.checkpoint.path).name
