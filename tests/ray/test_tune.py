"""A real `Tuner`: trials that exploit each other, are killed, stopped early and restored."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import ray.train
import torch
from ray import PlacementGroupID, tune
from ray.train import ScalingConfig
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
from ray.util.placement_group import PlacementGroup, remove_placement_group

from ray_accel_ckpt import Checkpointer, EverySteps, open_checkpoint
from ray_accel_ckpt.integrations.tune import trainable
from tests.ray.runs import record
from tests.training import network, train

pytestmark = [
    pytest.mark.usefixtures("cluster", "no_leftovers"),
    # Ray's own handling of files and deprecated calls is not what is tested here.
    pytest.mark.filterwarnings("ignore"),
]

EVERY, STEPS = 12, 72  # and a save at the end
EXPLOIT_AT = 36


def _loop(config: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    ckpt = Checkpointer(save=EverySteps(EVERY))
    out = Path(config["out"])
    lives = out / config["name"]
    lives.mkdir(parents=True, exist_ok=True)
    life = lives / f"{len([*lives.iterdir()])}.json"
    record: dict[str, Any] = {}

    def note(**values: Any) -> None:
        record.update(values)
        life.write_text(json.dumps(record))

    def wait_for_tune(step: int) -> None:
        """Training takes no time here: without this it would be over at the first report."""
        while config["paced"] and step % EVERY == 0 and not (out / _seen(config, step)).exists():
            time.sleep(0.01)

    def begin(resumed: bool) -> None:
        note(resumed_from=ckpt.resumed_from, step=ckpt.global_step)
        if not resumed:
            # As after a notice at the first step: Tune could make nothing of it.
            ckpt.save_state()

    ended = train(
        ckpt,
        config["seed"],
        epochs=config["epochs"],
        on_loaded=begin,
        on_step=wait_for_tune,
        metrics=lambda step: {
            "step": step,
            # Some saves have it, as where it is measured once an epoch.
            **({"quality": config["quality"]} if step == EVERY else {}),
            "exploit": float(step == EXPLOIT_AT),
        },
    )
    note(digest=ended)


def _seen(config: dict[str, Any], step: int) -> str:
    return f"{config['name']}-{step}"


def _lives(out: Path, name: str) -> list[dict[str, Any]]:
    files = sorted((out / name).iterdir(), key=lambda file: int(file.stem))
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture
def no_leftovers(cluster: None) -> Iterator[None]:
    """Ray Train's cleaner of placement groups, for runs that are killed, needs a dashboard."""
    yield
    for found in ray.util.placement_group_table().values():
        if found["state"] != "REMOVED":
            group = PlacementGroupID(bytes.fromhex(found["placement_group_id"]))
            remove_placement_group(PlacementGroup(group))


class _OnResult(tune.Callback):
    """In the driver, for each result: `act` says whether the trial may train on."""

    def __init__(self, act: Callable[[str, dict[str, Any]], bool]) -> None:
        self._act = act

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if self._act(trial.config["name"], result):
            Path(trial.config["out"], _seen(trial.config, result["step"])).touch()


def test_an_exploited_trial_goes_on_from_the_other_and_killed_from_its_own(tmp_path: Path) -> None:
    killed, paused = tmp_path / "killed", tmp_path / "paused"
    out = tmp_path / "out"
    out.mkdir()

    def kill(name: str, result: dict[str, Any]) -> bool:
        """The bad one, after its exploit, when all that is missing is that its loop ends."""
        if name == "bad" and result["step"] == STEPS and not killed.exists():
            killed.touch()
            # As Tune's `num_to_keep` does it before a trial is started with it: with the last
            # or, if Tune has not taken note of that yet, the one before it.
            (directory,) = tmp_path.glob("search/*bad*")
            for reference in sorted(directory.glob("checkpoint_*"))[-2:]:
                shutil.rmtree(reference)
            os.kill(result["pid"], signal.SIGKILL)
            return False
        # The good one comes last to where Tune pauses both. If the exploited one did, Tune
        # might keep a decision to stop it, and carry that out at its next save.
        if (name, result["step"]) == ("bad", EXPLOIT_AT):
            paused.touch()
            (out / f"good-{EXPLOIT_AT - EVERY}").touch()
        if (name, result["step"]) == ("good", EXPLOIT_AT - EVERY):
            return paused.exists()
        return bool(result["step"] != EXPLOIT_AT)

    results = tune.Tuner(
        trainable(_loop, scaling_config=ScalingConfig(num_workers=1)),
        param_space={
            "out": str(out),
            "epochs": 3,
            "paced": True,
            "name": tune.grid_search(["bad", "good"]),
            "quality": tune.sample_from(lambda config: float(config["name"] == "good")),
            "seed": tune.sample_from(lambda config: int(config["name"] == "bad")),
        },
        tune_config=tune.TuneConfig(
            metric="quality",
            mode="max",
            scheduler=PopulationBasedTraining(
                time_attr="exploit",
                perturbation_interval=1,
                # All but the name becomes the good one's: what follows must be, too.
                hyperparam_mutations={"name": ["bad"]},
                custom_explore_fn=lambda config: {**config, "name": "bad"},
                synch=True,
            ),
        ),
        run_config=tune.RunConfig(
            name="search",
            # A user's way of writing it, which paths in references do not have.
            storage_path=f"{out}/..",
            callbacks=[_OnResult(kill)],
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    ).fit()
    assert not results.errors

    bad, good = _lives(out, "bad"), _lives(out, "good")
    assert [life["step"] for life in bad] == [0, EXPLOIT_AT, STEPS]
    assert [life["step"] for life in good] == [0, EXPLOIT_AT]
    assert bad[1]["resumed_from"] == good[1]["resumed_from"]
    assert "-1/checkpoint_" in bad[2]["resumed_from"]
    trials = {Path(life["resumed_from"]).parents[1] for life in bad[1:]}
    assert len(trials) == 2
    # Its seed was another one: that it exploited the good one is in every bit.
    assert bad[2]["digest"] == good[1]["digest"]

    for result in results:
        saved = open_checkpoint(result.checkpoint)
        saved.verify()
        assert (saved.step, saved.epoch) == (STEPS, 3)
        network().load_state_dict(saved.state_dict("model"))
        # The killed one's end was saved without a step, and so without metrics of its own.
        assert result.metrics["quality"] == 1
    for trial in trials:
        known_to_tune = [*trial.glob("checkpoint_*")]
        assert len(known_to_tune) >= 4
        for directory in known_to_tune:
            assert sum(file.stat().st_size for file in directory.iterdir()) < 500
            open_checkpoint(directory).verify()


@pytest.mark.long
def test_early_stopped_trials_free_their_workers(tmp_path: Path) -> None:
    # Workers so large that a second trial's fit only when the first one's are gone.
    free = ray.available_resources()["CPU"]
    results = tune.Tuner(
        trainable(
            _loop,
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 4}),
        ),
        param_space={
            "out": str(tmp_path),
            "epochs": 10**6,
            "name": tune.grid_search(["a", "b"]),
            "paced": False,
            "quality": 1.0,
            "seed": 0,
        },
        tune_config=tune.TuneConfig(
            metric="quality", mode="max", scheduler=ASHAScheduler(max_t=2, grace_period=1)
        ),
        run_config=tune.RunConfig(name="search", storage_path=str(tmp_path)),
    ).fit()
    assert not results.errors
    assert [len(_lives(tmp_path, name)) for name in ("a", "b")] == [1, 1]
    for result in results:
        assert 1 <= result.metrics["training_iteration"] <= 2
        assert (
            open_checkpoint(result.checkpoint).step == EVERY * result.metrics["training_iteration"]
        )
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < free:
        assert time.monotonic() < deadline, "workers of a stopped trial are still there"
        time.sleep(0.1)


class _DriverLostError(Exception):
    pass


@pytest.mark.long
def test_a_restored_experiment_tells_tune_what_it_had_not_heard(tmp_path: Path) -> None:
    lost = tmp_path / "lost"

    def lose(name: str, result: dict[str, Any]) -> bool:
        """The driver, when the trial has saved its end and Tune has not heard of it."""
        if result["step"] == STEPS and not lost.exists():
            (run,) = tmp_path.glob("search/*/*-0")
            while len(record(run).names) < STEPS // EVERY + 2:
                time.sleep(0.01)
                (tmp_path / f"a-{STEPS}").touch()
            lost.touch()
            raise _DriverLostError
        return True

    function = trainable(_loop, scaling_config=ScalingConfig(num_workers=1))
    tuner = tune.Tuner(
        function,
        param_space={
            "out": str(tmp_path),
            "epochs": 3,
            "paced": True,
            "name": "a",
            "quality": 1.0,
            "seed": 0,
        },
        tune_config=tune.TuneConfig(metric="quality", mode="max"),
        run_config=tune.RunConfig(
            name="search", storage_path=str(tmp_path), callbacks=[_OnResult(lose)]
        ),
    )
    with pytest.raises(Exception, match="_DriverLostError"):
        tuner.fit()
    (result,) = tune.Tuner.restore(str(tmp_path / "search"), function).fit()
    assert result.error is None
    first, second = _lives(tmp_path, "a")
    assert (first["resumed_from"], second["step"]) == (None, STEPS)
    assert second["digest"] == first["digest"]
    assert (result.metrics["step"], result.metrics["quality"]) == (STEPS, 1)
    saved = open_checkpoint(result.checkpoint)
    assert (saved.step, saved.epoch) == (STEPS, 3)
    assert saved.path == second["resumed_from"]


def _quiet_loop(config: dict[str, Any]) -> None:
    """Reports beside the saves, or nothing at all but the saves."""
    ckpt = Checkpointer(save=EverySteps(2))
    ckpt.prepare(network())
    ckpt.load_state()
    for _ in ckpt.epochs(1):
        for _ in range(5):
            if config["arrays"]:
                ray.train.report({"scalar": np.float32(0.5), "array": np.zeros((2, 2))})
                ckpt.step(metrics=lambda: {"step": ckpt.global_step})
            else:
                ckpt.step()


@pytest.mark.long
def test_loops_may_report_no_metrics_and_anything_without_a_checkpoint(tmp_path: Path) -> None:
    results = tune.Tuner(
        trainable(_quiet_loop, scaling_config=ScalingConfig(num_workers=1)),
        param_space={"arrays": tune.grid_search([False, True])},
        run_config=tune.RunConfig(name="search", storage_path=str(tmp_path)),
    ).fit()
    assert not results.errors
    for result in results:
        saved = open_checkpoint(result.checkpoint)
        assert (saved.step, saved.epoch) == (5, 1)
        if result.config["arrays"]:
            assert (result.metrics["scalar"], result.metrics["step"]) == (0.5, 5)
