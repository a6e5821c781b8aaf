"""Which run a trial goes on with, told by nothing but the checkpoint that Tune hands it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ray.train import ScalingConfig

from ray_accel_ckpt.errors import ConfigurationError, CorruptCheckpointError, NotACheckpointError
from ray_accel_ckpt.integrations.tune import trainable
from ray_accel_ckpt.integrations.tune.metrics import completed, remembered
from ray_accel_ckpt.integrations.tune.runs import (
    TrialRuns,
    newest_reference,
    reference_at,
    standing_reference,
)
from ray_accel_ckpt.storage.catalog import inherited
from ray_accel_ckpt.storage.fakes import MemoryFilesystem
from ray_accel_ckpt.storage.reference import REFERENCE
from tests.pages import snippets

HERE, THERE = "experiment/a", "experiment/b"
FIRST, SECOND = f"{THERE}/b-0/checkpoint_00000020_aa", f"{THERE}/b-0/checkpoint_00000040_aa"


@pytest.fixture
def memory() -> MemoryFilesystem:
    return MemoryFilesystem()


@pytest.fixture
def runs(memory: MemoryFilesystem) -> TrialRuns:
    return TrialRuns(filesystem=memory, directory=HERE, trial="a")


def _own(run: str) -> str:
    return f"{HERE}/{run}/checkpoint_00000020_bb"


def test_a_trial_that_is_handed_nothing_has_its_first_run(runs: TrialRuns) -> None:
    assert runs.choose(None) == "a-0"
    runs.tell("a-0")
    assert runs.choose(None) == "a-0"


def test_a_trial_that_is_handed_its_own_goes_on_with_that_run(
    memory: MemoryFilesystem, runs: TrialRuns
) -> None:
    runs.tell("a-0")
    before = dict(memory.files)
    assert runs.choose(_own("a-0")) == "a-0"
    assert memory.files == before


def test_an_exploit_begins_a_run_from_the_other_trial(
    memory: MemoryFilesystem, runs: TrialRuns
) -> None:
    runs.tell("a-0")
    assert runs.choose(FIRST) == "a-1"
    assert inherited(memory, f"{HERE}/a-1") == [FIRST]
    assert inherited(memory, f"{HERE}/a-0") == []


def test_a_restart_after_an_exploit_goes_on_with_its_run(runs: TrialRuns) -> None:
    runs.tell("a-0")
    runs.choose(FIRST)
    assert [runs.choose(FIRST) for _ in range(3)] == ["a-1"] * 3
    runs.tell("a-1")
    assert runs.choose(_own("a-1")) == "a-1"


def test_the_same_checkpoint_exploited_once_more_begins_another_run(runs: TrialRuns) -> None:
    runs.choose(FIRST)
    runs.tell("a-1")
    assert runs.choose(FIRST) == "a-2"
    assert runs.choose(FIRST) == "a-2"


def test_another_checkpoint_exploited_begins_another_run(
    memory: MemoryFilesystem, runs: TrialRuns
) -> None:
    runs.choose(FIRST)
    assert runs.choose(SECOND) == "a-2"
    assert inherited(memory, f"{HERE}/a-2") == [SECOND]


def test_an_exploit_cut_off_before_its_origin_was_written_is_done_again(
    memory: MemoryFilesystem, runs: TrialRuns
) -> None:
    runs.choose(FIRST)
    del memory.files[f"{HERE}/a-1/origin.json"]
    memory.files[f"{HERE}/a-1/half"] = b""
    assert runs.choose(FIRST) == "a-2"


def test_an_experiment_set_back_to_before_an_exploit_goes_on_with_the_run_before(
    runs: TrialRuns,
) -> None:
    runs.choose(FIRST)
    assert runs.choose(_own("a-0")) == "a-0"


def test_runs_are_numbered_and_not_spelled(runs: TrialRuns) -> None:
    for number in range(1, 12):
        assert runs.choose(f"{THERE}/b-0/checkpoint_{number}") == f"a-{number}"


def test_only_a_directory_of_its_own_is_a_run_of_a_trial(runs: TrialRuns) -> None:
    for other in ("aa-0", "a-x", "a-", "xa-1"):
        runs.filesystem.write(f"{HERE}/{other}/file", [b"x"])
    assert runs.choose(f"{HERE}/aa-7/checkpoint_1") == "a-1"
    assert runs.choose(f"{THERE}/a-0/checkpoint_1") == "a-2"


def _handed(memory: MemoryFilesystem, name: str, target: str) -> str:
    directory, _, run = target.rpartition("/")[0].rpartition("/")
    runs = TrialRuns(filesystem=memory, directory=directory, trial=run[:-2])
    memory.write(f"{directory}/{name}/{REFERENCE}", [runs.reference(target)])
    return f"{directory}/{name}"


def test_a_reference_of_a_trial_names_its_checkpoint(memory: MemoryFilesystem) -> None:
    handed = _handed(memory, "checkpoint_000000", FIRST)
    assert reference_at(memory, handed).checkpoint == FIRST


def test_a_reference_that_tune_removed_is_replaced_by_the_newest(
    memory: MemoryFilesystem, caplog: pytest.LogCaptureFixture
) -> None:
    gone = _handed(memory, "checkpoint_000001", FIRST)
    _handed(memory, "checkpoint_000002", FIRST)
    _handed(memory, "checkpoint_000010", SECOND)
    memory.files[f"{THERE}/checkpoint_000011/{REFERENCE}"] = b"torn"
    memory.delete(gone)
    assert standing_reference(memory, gone) == f"{THERE}/checkpoint_000010"
    assert f"{gone} is gone" in caplog.text
    assert "checkpoint_000011" in caplog.text


def test_a_reference_that_is_there_is_taken_though_a_newer_one_is_there_too(
    memory: MemoryFilesystem,
) -> None:
    handed = _handed(memory, "checkpoint_000001", FIRST)
    _handed(memory, "checkpoint_000002", SECOND)
    assert standing_reference(memory, handed) == handed


def test_with_all_references_gone_the_one_handed_over_is_what_is_missing(
    memory: MemoryFilesystem,
) -> None:
    handed = f"{THERE}/checkpoint_000001"
    assert standing_reference(memory, handed) == handed


def test_a_checkpoint_of_another_trainable_is_refused(memory: MemoryFilesystem) -> None:
    memory.write(f"{THERE}/checkpoint_000000/model.pt", [b"x"])
    with pytest.raises(NotACheckpointError, match="no reference"):
        reference_at(memory, f"{THERE}/checkpoint_000000")
    with pytest.raises(NotACheckpointError, match="no reference"):
        reference_at(memory, f"{HERE}/checkpoint_000000")


def test_a_damaged_reference_is_refused(memory: MemoryFilesystem) -> None:
    handed = _handed(memory, "checkpoint_000000", FIRST)
    memory.files[f"{handed}/{REFERENCE}"] = b"torn"
    with pytest.raises(CorruptCheckpointError):
        reference_at(memory, handed)


def test_a_trial_that_told_nothing_has_no_newest_reference(memory: MemoryFilesystem) -> None:
    memory.write(f"{HERE}/a-0/{REFERENCE}", [b"x"])
    assert newest_reference(memory, HERE) is None


AFTER_LOADING = textwrap.dedent(snippets("docs/tune.md", "python")[1])


def _rates(base: float, *, loaded: Any = None, steps: int) -> tuple[list[float], Any]:
    """Of some steps, after what docs/tune.md says is to be done after `load_state`."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    if loaded is not None:
        optimizer.load_state_dict(loaded[0])
        scheduler.load_state_dict(loaded[1])
    names = {
        "ckpt": SimpleNamespace(load_state=lambda: loaded is not None),
        "config": {"lr": base},
        "optimizer": optimizer,
        "scheduler": scheduler,
    }
    exec(AFTER_LOADING, names)  # noqa: S102
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates, (optimizer.state_dict(), scheduler.state_dict())


def test_the_learning_rate_of_an_exploit_is_scaled_and_that_of_a_restart_is_not() -> None:
    untouched, _ = _rates(0.1, steps=10)
    _, saved = _rates(0.1, steps=5)
    assert _rates(0.1, loaded=saved, steps=5)[0] == untouched[5:]
    assert _rates(0.2, loaded=saved, steps=5)[0] == [2 * rate for rate in untouched[5:]]


@given(st.floats(1e-5, 1.0), st.floats(1e-5, 1.0))
def test_a_restart_after_an_exploit_changes_no_learning_rate(of_other: float, own: float) -> None:
    _, saved = _rates(of_other, steps=3)
    exploiting, _ = _rates(own, loaded=saved, steps=5)
    _, saved = _rates(own, loaded=saved, steps=2)
    assert _rates(own, loaded=saved, steps=3)[0] == exploiting[2:]


def test_metrics_that_are_not_reported_keep_their_values() -> None:
    known = {"loss": 1.0, "eval": {"loss": 2.0, "accuracy": 0.5}}
    new = {"loss": 3.0, "eval": {"loss": 4.0}, "step": 7}
    assert completed(known, new) == {
        "loss": 3.0,
        "eval": {"loss": 4.0, "accuracy": 0.5},
        "step": 7,
    }
    assert known == {"loss": 1.0, "eval": {"loss": 2.0, "accuracy": 0.5}}


def test_what_json_cannot_hold_is_told_and_not_remembered() -> None:
    metrics = {"loss": np.float32(0.5), "count": np.int64(3), "matrix": np.zeros((2, 2)), "at": {1}}
    found = remembered(metrics)
    assert json.dumps(found) == '{"loss": 0.5, "count": 3}'


def _loop(config: dict[str, Any]) -> None: ...


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: trainable(_loop, scaling_config=s, run_options={"name": "x"}), "name cannot"),
        (
            lambda s: trainable(_loop, scaling_config=s, run_options={"storage_path": "x"}),
            "storage_path cannot",
        ),
        (lambda s: trainable(_loop, scaling_config=s, run_config=None), "run_config cannot"),
        (
            lambda s: trainable(_loop, scaling_config=s, train_loop_config={}),
            "train_loop_config cannot",
        ),
        (
            lambda s: trainable(_loop, scaling_config=ScalingConfig(num_workers=0)),
            "a trial needs workers",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    make: Callable[[ScalingConfig], Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make(ScalingConfig(num_workers=1))
