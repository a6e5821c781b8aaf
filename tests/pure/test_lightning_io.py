"""Lightning's own checkpoints in our format: whole or not there, proved, nothing pickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from ray_accel_ckpt import errors, open_checkpoint
from ray_accel_ckpt.integrations.lightning import CheckpointerIO
from ray_accel_ckpt.storage.filesystem import LocalFilesystem
from tests.pure import test_lightning
from tests.pure.helpers import checkpointer, digest, seed_everything
from tests.pure.test_lightning import EPOCHS, Net

pytestmark = [
    *test_lightning.pytestmark,
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def trainer_of(directory: Path, epochs: int = EPOCHS, **options: Any) -> Any:
    saving = ModelCheckpoint(
        **{"dirpath": directory, "filename": "{step}", "save_top_k": -1, "monitor": None, **options}
    )
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[CheckpointerIO()],
        callbacks=[saving],
    )


def fit(directory: Path, epochs: int = EPOCHS, start: Any = None, **options: Any) -> Any:
    seed_everything(7)
    trainer = trainer_of(directory, epochs, **options)
    trainer.fit(Net(), ckpt_path=start)
    return trainer


def test_a_fit_goes_on_from_what_was_saved(tmp_path: Path) -> None:
    """From the end of an epoch, as exactly as Lightning does from its own files."""
    ends = {}
    for name, plugins in (("ours", [CheckpointerIO()]), ("theirs", [])):
        seed_everything(7)
        first = trainer_of(tmp_path / name, 1)
        first.strategy.checkpoint_io = plugins[0] if plugins else pl.plugins.TorchCheckpointIO()
        first.fit(Net())
        seed_everything(8)
        second = trainer_of(tmp_path / name)
        second.strategy.checkpoint_io = first.strategy.checkpoint_io
        second.fit(Net(), ckpt_path=tmp_path / name / "step=6.ckpt", weights_only=False)
        ends[name] = digest(second.lightning_module, *second.optimizers)
    assert ends["ours"] == ends["theirs"]
    assert (tmp_path / "ours" / "step=6.ckpt").is_dir()
    assert (tmp_path / "theirs" / "step=6.ckpt").is_file()


def test_every_value_comes_back_as_it_was(tmp_path: Path) -> None:
    trainer = fit(tmp_path, 1)
    saved = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    trainer.strategy.save_checkpoint(saved, tmp_path / "again.ckpt")
    loaded = CheckpointerIO().load_checkpoint(tmp_path / "again.ckpt")
    assert set(loaded) == set(saved)
    assert all(digest(loaded[name]) == digest(saved[name]) for name in saved)


def test_the_weights_are_a_part_of_their_own(tmp_path: Path) -> None:
    trainer = fit(tmp_path, 1)
    saved = open_checkpoint(tmp_path / "step=6.ckpt")
    assert (saved.step, saved.world_size, set(saved.parts)) == (6, 1, {"model", "lightning"})
    assert digest(saved.state_dict("model")) == digest(trainer.lightning_module)


def test_lightning_removes_what_it_does_not_keep(tmp_path: Path) -> None:
    keeping = {"save_top_k": 1, "monitor": "loss_epoch", "save_last": True}
    last = tmp_path / f"last-step={6 * EPOCHS}.ckpt"
    for epochs, start in ((EPOCHS, None), (EPOCHS + 1, last)):
        seed_everything(7)
        trainer = trainer_of(tmp_path, epochs, **keeping)
        trainer.checkpoint_callback.CHECKPOINT_NAME_LAST = "last-{step}"
        trainer.fit(Net(), ckpt_path=start)
        assert trainer.current_epoch == epochs
        names = {path.name for path in tmp_path.iterdir()}
        assert f"last-step={6 * epochs}.ckpt" in names
        # The best one, too; and Lightning does not remove what it has begun from.
        assert len(names - {start and start.name}) == 2


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    with pytest.raises(errors.CheckpointExistsError, match="CHECKPOINT_NAME_LAST"):
        fit(tmp_path, save_last=True)


def test_damage_is_found_before_anything_is_loaded(tmp_path: Path) -> None:
    fit(tmp_path, 1)
    (shard,) = (tmp_path / "step=6.ckpt").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(errors.CorruptCheckpointError):
        fit(tmp_path, start=tmp_path / "step=6.ckpt")


def test_what_has_no_place_in_the_format_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(errors.UnsupportedStateError, match="lightning/callbacks/Own"):
        CheckpointerIO().save_checkpoint({"callbacks": {"Own": object()}}, tmp_path / "a.ckpt")
    assert not (tmp_path / "a.ckpt").exists()


def test_what_is_no_checkpoint_of_lightnings_is_refused(tmp_path: Path) -> None:
    ckpt = checkpointer(tmp_path)
    ckpt.prepare(torch.nn.Linear(1, 1))
    ckpt.save_state(tmp_path / "ours")
    with pytest.raises(errors.NotACheckpointError, match="CheckpointerCallback"):
        CheckpointerIO().load_checkpoint(tmp_path / "ours")
    with pytest.raises(errors.NotACheckpointError):
        CheckpointerIO().load_checkpoint(tmp_path / "nothing")


def test_a_removal_that_is_cut_off_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io = CheckpointerIO()
    io.save_checkpoint({"state_dict": {"w": torch.ones(3)}}, tmp_path / "a.ckpt")
    delete, deleted = LocalFilesystem.delete, []

    def once(self: Any, path: str) -> None:
        if deleted:
            raise OSError("gone")
        deleted.append(path)
        delete(self, path)

    monkeypatch.setattr(LocalFilesystem, "delete", once)
    with pytest.raises(OSError, match="gone"):
        io.remove_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(errors.NotACheckpointError):
        io.load_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize("name", ["storage_options", "map_location"])
def test_options_without_a_meaning_are_refused(tmp_path: Path, name: str) -> None:
    io = CheckpointerIO()
    called = io.save_checkpoint if name == "storage_options" else io.load_checkpoint
    arguments = [{}] if name == "storage_options" else []
    with pytest.raises(errors.ConfigurationError, match=name):
        called(*arguments, tmp_path / "a.ckpt", **{name: "cpu"})
