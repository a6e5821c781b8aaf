"""The files of a folder that `Accelerator.save_state` writes."""

from __future__ import annotations

import _codecs
import itertools
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ray_accel_ckpt.errors import (
    CorruptCheckpointError,
    NotACheckpointError,
    UnsupportedStateError,
)

_NUMPY = [
    np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    np.ndarray,
    np.dtype,
    np.dtypes.UInt32DType,
    _codecs.encode,
]
"""What the state of numpy's generator is pickled with. None of it runs anything."""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder on this machine.

    Attributes:
        unpickle: whether what torch's restricted unpickler refuses is unpickled all the
            same, which runs whatever code is written there.

    Raises:
        NotACheckpointError: no model is there. (Accelerate leaves no mark when it is done.)
        UnsupportedStateError: the model is sharded.
    """

    path: Path
    unpickle: bool = False

    def __post_init__(self) -> None:
        if self._weights(0) is not None:
            return
        sharded = sorted(self.path.glob("pytorch_model*"))
        if sharded:
            raise UnsupportedStateError(
                "the folder holds a sharded model",
                where=str(sharded[0]),
                why="FSDP and DeepSpeed write models in formats of their own",
                remedy="what FSDP writes with SHARDED_STATE_DICT is a checkpoint of "
                "torch.distributed.checkpoint: integrations.dcp.from_dcp reads it",
            )
        raise NotACheckpointError(
            "not a folder of Accelerator.save_state: no model there",
            where=str(self.path),
            why="neither model.safetensors nor pytorch_model.bin exists",
            remedy="give the folder that save_state returned",
        )

    def models(self) -> list[dict[str, torch.Tensor]]:
        """The state of each model, in the order of `prepare`."""
        paths = itertools.takewhile(bool, map(self._weights, itertools.count()))
        return [self._read_weights(path) for path in paths if path]

    def optimizers(self) -> list[Any]:
        return [self._load(path) for path in self._numbered("optimizer", ".bin")]

    def schedulers(self) -> list[Any]:
        return [self._load(path) for path in self._numbered("scheduler", ".bin")]

    def scaler(self) -> Any:
        """The gradient scaler's state, or None."""
        path = self.path / "scaler.pt"
        return self._load(path) if path.exists() else None

    def random_states(self) -> list[Any]:
        """Of each process."""
        return [self._load(path) for path in self._counted("random_states_{}.pkl")]

    def objects(self) -> list[Any]:
        """The states of registered objects, in the order of registration."""
        return [self._load(path) for path in self._counted("custom_checkpoint_{}.pkl")]

    def _numbered(self, stem: str, suffix: str) -> list[Path]:
        endings = itertools.chain([""], (f"_{i}" for i in itertools.count(1)))
        paths = (self.path / f"{stem}{ending}{suffix}" for ending in endings)
        return list(itertools.takewhile(Path.exists, paths))

    def _counted(self, pattern: str) -> list[Path]:
        paths = (self.path / pattern.format(i) for i in itertools.count())
        return list(itertools.takewhile(Path.exists, paths))

    def _weights(self, i: int) -> Path | None:
        ending = f"_{i}" if i else ""
        names = (f"model{ending}.safetensors", f"pytorch_model{ending}.bin")
        return next((p for name in names if (p := self.path / name).is_file()), None)

    def _read_weights(self, path: Path) -> dict[str, torch.Tensor]:
        if path.suffix == ".bin":
            return dict(self._load(path))
        try:
            return load_file(path)
        except (SafetensorError, OSError) as e:
            raise _unreadable(path, e) from e

    def _load(self, path: Path) -> Any:
        try:
            with torch.serialization.safe_globals(_NUMPY):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as e:
            if not self.unpickle:
                raise UnsupportedStateError(
                    "a file holds more than tensors, arrays and plain values",
                    where=str(path),
                    why=str(e).partition("\n")[0],
                    remedy="if you trust whoever wrote it, pass unpickle=True: that runs "
                    "whatever code is written there",
                ) from e
        except (RuntimeError, EOFError, OSError) as e:
            raise _unreadable(path, e) from e
        try:
            return torch.load(path, map_location="cpu", weights_only=False)
        except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, ImportError) as e:
            raise _unreadable(path, e) from e


@dataclass(frozen=True, kw_only=True)
class NewFolder:
    """A folder that is being written."""

    path: Path

    def model(self, i: int, state: Mapping[str, torch.Tensor]) -> None:
        name = f"model_{i}.safetensors" if i else "model.safetensors"
        save_file(dict(state), self.path / name, metadata={"format": "pt"})

    def optimizer(self, i: int, state: Any) -> None:
        self._save(f"optimizer_{i}.bin" if i else "optimizer.bin", state)

    def scheduler(self, i: int, state: Any) -> None:
        self._save(f"scheduler_{i}.bin" if i else "scheduler.bin", state)

    def scaler(self, state: Any) -> None:
        self._save("scaler.pt", state)

    def random_states(self, rank: int, state: Any) -> None:
        self._save(f"random_states_{rank}.pkl", state)

    def object(self, i: int, state: Any) -> None:
        self._save(f"custom_checkpoint_{i}.pkl", state)

    def _save(self, name: str, state: Any) -> None:
        torch.save(state, self.path / name)


def _unreadable(path: Path, e: Exception) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        "a file of Accelerate's cannot be read",
        where=str(path),
        why=f"{type(e).__name__}: {e}",
        remedy="use another folder: the save may have been cut off",
    )
