"""Folders of `Accelerator.save_state` made checkpoints of ours and back, bit for bit."""

from __future__ import annotations

import collections
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from ray_accel_ckpt import Checkpointer, errors, open_checkpoint
from ray_accel_ckpt.integrations.accelerate import from_accelerate, streams, to_accelerate
from ray_accel_ckpt.state import rng
from tests.accelerated import Run, Tied, reset
from tests.pure.helpers import digest, seed_everything

PARTS = ("model", "optimizer", "scheduler", "scaler", "Meter", "rng")


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="accelerate")


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_of_accelerate_becomes_a_checkpoint_with_the_same_bits(
    tmp_path: Path, safe: bool
) -> None:
    run = Run(seed=3)
    run.train(8)
    run.accelerator.save_state(str(tmp_path / "theirs"), safe_serialization=safe)
    path = from_accelerate(
        tmp_path / "theirs",
        tmp_path / "ours",
        models=[run.model],
        optimizers=[run.optimizer],
        objects=("Meter",),
    )
    open_checkpoint(path).verify()
    expected, ended = run.goes_on()
    again = Run(seed=4)
    again.train(2)
    ckpt = Checkpointer.from_accelerator(again.accelerator)
    assert ckpt.load_state(path, parts=PARTS)
    assert again.goes_on() == (expected, ended)


def test_a_checkpoint_becomes_a_folder_that_accelerate_loads(tmp_path: Path) -> None:
    run = Run(seed=3)
    run.train(7)
    ckpt = Checkpointer.from_accelerator(run.accelerator)
    # Seven micro-steps of windows of two: a window is open, and Accelerate has no place for it.
    run.train(1)
    ckpt.save_state(tmp_path / "ours")
    folder = to_accelerate(tmp_path / "ours", tmp_path / "theirs")
    step = run.accelerator.step
    expected, ended = run.goes_on()
    again = Run(seed=4)
    again.train(2)
    again.accelerator.load_state(folder)
    assert again.accelerator.step == step
    assert again.model.head.weight is again.model.z.weight
    assert again.goes_on() == (expected, ended)


def test_there_and_back_nothing_changes(tmp_path: Path) -> None:
    run = Run(seed=3)
    run.train(8)
    run.accelerator.save_state(str(tmp_path / "theirs"))
    given: dict[str, Any] = {"models": [run.model], "optimizers": [run.optimizer]}
    from_accelerate(tmp_path / "theirs", tmp_path / "ours", **given)
    to_accelerate(tmp_path / "ours", tmp_path / "back")
    names = sorted(p.name for p in (tmp_path / "theirs").iterdir())
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == names
    from_accelerate(tmp_path / "back", tmp_path / "again", **given)
    one, two = open_checkpoint(tmp_path / "ours"), open_checkpoint(tmp_path / "again")
    assert one.parts == two.parts
    assert [digest(one.state_dict(part)) for part in one.parts] == [
        digest(two.state_dict(part)) for part in two.parts
    ]


def test_a_stream_of_another_bit_generator_goes_there_and_back() -> None:
    """numpy has its short form for the Mersenne Twister alone, and so has Accelerate."""
    state = rng.capture()
    state["numpy"] = np.random.RandomState(np.random.PCG64(3)).get_state(legacy=False)
    back = streams.from_theirs(streams.to_theirs(state, step=1))
    rng.check(back)
    assert digest(back) == digest(state)


def test_several_models_and_optimizers_keep_their_places(tmp_path: Path) -> None:
    def made(seed: int) -> Any:
        reset()
        seed_everything(seed)
        accelerator = Accelerator(cpu=True)
        models = nn.Linear(2, 3), nn.Linear(3, 2)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in models]
        prepared = accelerator.prepare(*models, *optimizers)
        return accelerator, prepared[:2], prepared[2:]

    accelerator, models, optimizers = made(1)
    models[1](models[0](torch.ones(4, 2))).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    accelerator.save_state(str(tmp_path / "theirs"))
    expected = digest(*models, *(o.state_dict() for o in optimizers))
    from_accelerate(tmp_path / "theirs", tmp_path / "ours", models=models, optimizers=optimizers)
    to_accelerate(tmp_path / "ours", tmp_path / "back")
    accelerator, models, optimizers = made(2)
    accelerator.load_state(str(tmp_path / "back"))
    assert digest(*models, *(o.state_dict() for o in optimizers)) == expected


class Code:
    """What a pickle may run."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def test_nothing_is_run_unless_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(seed=3)
    run.accelerator.save_state(str(tmp_path / "theirs"))
    torch.save({"seen": [1], "more": Code()}, tmp_path / "theirs" / "custom_checkpoint_0.pkl")
    given: dict[str, Any] = {"models": [run.model], "optimizers": [run.optimizer]}
    with pytest.raises(errors.UnsupportedStateError, match="unpickle=True") as raised:
        from_accelerate(tmp_path / "theirs", tmp_path / "ours", **given)
    assert "custom_checkpoint_0.pkl" in raised.value.where
    assert not (tmp_path / "ran").exists()
    from_accelerate(tmp_path / "theirs", tmp_path / "ours", **given, unpickle=True)
    assert (tmp_path / "ran").exists()


def test_an_object_that_only_pickle_can_hold_comes_over_if_it_is_trusted(tmp_path: Path) -> None:
    run = Run(seed=3)
    run.accelerator.save_state(str(tmp_path / "theirs"))
    seen = collections.deque([1, 2])
    torch.save({"seen": seen}, tmp_path / "theirs" / "custom_checkpoint_0.pkl")
    path = from_accelerate(
        tmp_path / "theirs",
        tmp_path / "ours",
        models=[run.model],
        optimizers=[run.optimizer],
        unpickle=True,
    )
    assert open_checkpoint(path).state_dict("custom_checkpoint_0")["seen"] == seen


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("model.safetensors", errors.CorruptCheckpointError),
        ("optimizer.bin", errors.CorruptCheckpointError),
        ("random_states_0.pkl", errors.CorruptCheckpointError),
        ("scaler.pt", errors.CorruptCheckpointError),
    ],
)
def test_a_file_that_is_cut_off_is_named(tmp_path: Path, name: str, error: type[Exception]) -> None:
    run = Run(seed=3)
    run.train(2)
    run.accelerator.save_state(str(tmp_path / "theirs"))
    file = tmp_path / "theirs" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(error, match=name):
        from_accelerate(
            tmp_path / "theirs",
            tmp_path / "ours",
            models=[run.model],
            optimizers=[run.optimizer],
        )
    assert not (tmp_path / "ours").exists()


def test_others_than_the_folders_are_refused(tmp_path: Path) -> None:
    run = Run(seed=3)
    run.accelerator.save_state(str(tmp_path / "theirs"))
    source, target = tmp_path / "theirs", tmp_path / "ours"
    other = nn.Linear(2, 2)
    with pytest.raises(errors.StateMismatchError, match="missing: weight, bias"):
        from_accelerate(source, target, models=[other], optimizers=[run.optimizer])
    with pytest.raises(errors.StateMismatchError, match="1 models, and models= 0"):
        from_accelerate(source, target, models=[], optimizers=[run.optimizer])
    plain = torch.optim.AdamW(run.model.parameters())
    with pytest.raises(errors.StateMismatchError, match="groups of"):
        from_accelerate(source, target, models=[run.model], optimizers=[plain])
    with pytest.raises(errors.ConfigurationError, match="5 parameters of optimizers= are of none"):
        from_accelerate(source, target, models=[Tied()], optimizers=[run.optimizer])
    with pytest.raises(errors.ConfigurationError, match="'scaler' cannot name a part"):
        from_accelerate(
            source, target, models=[run.model], optimizers=[run.optimizer], objects=("scaler",)
        )
    with pytest.raises(errors.NotACheckpointError):
        from_accelerate(tmp_path / "nothing", target, models=[], optimizers=[])
    (tmp_path / "sharded" / "pytorch_model_fsdp_0").mkdir(parents=True)
    with pytest.raises(errors.UnsupportedStateError, match="from_dcp"):
        from_accelerate(tmp_path / "sharded", target, models=[], optimizers=[])


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    run = Run(seed=3)
    run.accelerator.save_state(str(tmp_path / "theirs"))
    given: dict[str, Any] = {"models": [run.model], "optimizers": [run.optimizer]}
    from_accelerate(tmp_path / "theirs", tmp_path / "ours", **given)
    with pytest.raises(errors.CheckpointExistsError):
        from_accelerate(tmp_path / "theirs", tmp_path / "ours", **given)
    with pytest.raises(errors.CheckpointExistsError):
        to_accelerate(tmp_path / "ours", tmp_path / "theirs")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    run = Run(seed=3)
    ckpt = Checkpointer.from_accelerator(run.accelerator)
    ckpt.save_state(tmp_path / "ours")
    shard = next((tmp_path / "ours").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(errors.CorruptCheckpointError):
        to_accelerate(tmp_path / "ours", tmp_path / "theirs")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours"]
