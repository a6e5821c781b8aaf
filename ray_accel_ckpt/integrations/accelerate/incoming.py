"""A folder of Accelerate made a checkpoint of ours, by one process."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ray_accel_ckpt.errors import (
    ConfigurationError,
    StateMismatchError,
    UnsupportedStateError,
)
from ray_accel_ckpt.integrations.accelerate import streams
from ray_accel_ckpt.integrations.accelerate.folder import Folder
from ray_accel_ckpt.integrations.making import NewCheckpoint
from ray_accel_ckpt.state.model import ModelPart, unwrap
from ray_accel_ckpt.state.optimizer import OptimizerPart
from ray_accel_ckpt.state.part import Captured, Scope, captured_tree
from ray_accel_ckpt.state.parts import RngPart
from ray_accel_ckpt.state.tree import same_view
from ray_accel_ckpt.storage.filesystem import resolve

_COMPILED = "_orig_mod."
"""What stands before the names of a model that was compiled before it was prepared."""


def from_accelerate(
    input_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    models: Sequence[nn.Module],
    optimizers: Sequence[Optimizer],
    objects: Sequence[str] = (),
    unpickle: bool = False,
) -> str:
    """Make a checkpoint of this library of a folder that `Accelerator.save_state` wrote.

    ``load_state(output_dir, parts=("model", "optimizer", "scheduler", "rng"))`` loads the
    result. Name the parts: what the folder does not say is not in it, which is where the
    loop stood in its data and in its epochs. So go on at the beginning of an epoch.

    Weights come from safetensors or `.bin`. All else are pickles, read with torch's
    restricted unpickler, which runs no code. What is written holds none.

    Host memory: twice the folder.

    Args:
        input_dir: a directory of this machine, of a plain or a DDP run.
        output_dir: a new directory or a URI.
        models, optimizers: built as for the run, in the order they were prepared in. Only
            names are taken from them: the folder numbers an optimizer's parameters. What
            Accelerate has prepared may be given too.
        objects: what the registered objects are to be called, in the order of
            registration. ``Checkpointer.from_accelerator`` calls them by their class.
            Those without a name here are called `custom_checkpoint_<i>`.
        unpickle: read objects that are more than tensors, arrays and plain values by
            unrestricted unpickling. **It runs whatever code is written there**: only for
            folders that you trust.

    Returns:
        The new checkpoint's path.

    Raises:
        CheckpointExistsError: a checkpoint is there. Nothing is overwritten.
        NotACheckpointError: there is no such folder.
        CorruptCheckpointError: a file of it cannot be read.
        StateMismatchError: models or optimizers are others than those of the folder.
        ConfigurationError: an optimizer of other parameters than the models'; a name that
            cannot be that of an object.
        UnsupportedStateError: a sharded model; a value that the format does not have; an
            object for which `unpickle` is needed.
        StorageError: what storage refused.
    """
    filesystem, directory = resolve(output_dir)
    checkpoint = NewCheckpoint(filesystem, directory)
    folder = Folder(path=Path(input_dir), unpickle=unpickle)
    shared = {
        **_models(folder, models),
        **_optimizers(folder, models, optimizers),
        **_others(folder, objects),
    }
    ranks = [{**shared, **own} for own in _streams(folder)]
    checkpoint.write(*ranks)
    return directory


def _models(folder: Folder, models: Sequence[nn.Module]) -> dict[str, Captured]:
    found = folder.models()
    _require_as_many(found, models, "model", folder)
    captured = {}
    for i, (stored, model) in enumerate(zip(found, models, strict=True)):
        live = unwrap(model).state_dict()
        plain = {name.removeprefix(_COMPILED): tensor for name, tensor in stored.items()}
        # Safetensors has one of the names of a tied weight: the others get it, too.
        by_view = {same_view(live[name]): t for name, t in plain.items() if name in live}
        tree = {
            name: plain.get(name, by_view.get(same_view(tensor)))
            for name, tensor in live.items()
            if isinstance(tensor, torch.Tensor)
        }
        missing = tuple(name for name, tensor in tree.items() if tensor is None)
        unexpected = tuple(name for name in plain if name not in live)
        if missing or unexpected:
            raise StateMismatchError(
                f"the folder's model {i} is of another model than models[{i}]",
                missing=missing,
                unexpected=unexpected,
                where=str(folder.path),
                remedy="build the models as for the run, in the order they were prepared in",
            )
        name = f"model_{i}" if i else "model"
        captured[name] = captured_tree(tree, name=name, kind=ModelPart.kind, scope=Scope.REPLICATED)
    return captured


def _optimizers(
    folder: Folder, models: Sequence[nn.Module], optimizers: Sequence[Optimizer]
) -> dict[str, Captured]:
    found = folder.optimizers()
    _require_as_many(found, optimizers, "optimizer", folder)
    index = {
        id(parameter): f"model_{i}.{name}" if i else f"model.{name}"
        for i, model in enumerate(models)
        for name, parameter in unwrap(model).named_parameters()
    }
    strange = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]} - set(index)
    if strange:
        raise ConfigurationError(
            f"{len(strange)} parameters of optimizers= are of none of models=",
            why="an optimizer's state is kept by the names that its parameters have in a model",
            remedy="give the optimizers that were made over the parameters of these models",
        )
    captured = {}
    for i, (stored, given) in enumerate(zip(found, optimizers, strict=True)):
        name = f"optimizer_{i}" if i else "optimizer"
        # Accelerate's wrapper has the groups of what it wraps.
        sizes = [len(group["params"]) for group in given.param_groups]
        if [len(group["params"]) for group in stored["param_groups"]] != sizes:
            raise StateMismatchError(
                f"the folder's optimizer {i} has other parameters than optimizers[{i}]",
                where=str(folder.path),
                why=f"groups of {[len(g['params']) for g in stored['param_groups']]} parameters, "
                f"and of {sizes}",
                remedy="build the optimizers as for the run, in the order they were prepared in",
            )
        captured[name] = OptimizerPart(name, given, lambda: index).named(stored)
    return captured


def _others(folder: Folder, objects: Sequence[str]) -> dict[str, Captured]:
    kinds: dict[str, tuple[str, Any]] = {}
    for i, state in enumerate(folder.schedulers()):
        kinds[f"scheduler_{i}" if i else "scheduler"] = ("scheduler", state)
    scaler = folder.scaler()
    if scaler is not None:
        kinds["scaler"] = ("scaler", scaler)
    for i, state in enumerate(folder.objects()):
        name = objects[i] if i < len(objects) else f"custom_checkpoint_{i}"
        if not name.isidentifier() or name in kinds:
            raise ConfigurationError(
                f"objects={tuple(objects)!r}: {name!r} cannot name a part",
                why="it is taken" if name in kinds else "it is no identifier",
                remedy="give each object a name of its own, of letters, digits and underscores",
            )
        kinds[name] = ("object", state)
    return {
        name: captured_tree(state, name=name, kind=kind, scope=Scope.RANK_ZERO)
        for name, (kind, state) in kinds.items()
    }


def _streams(folder: Folder) -> Iterator[dict[str, Captured]]:
    """The random streams of each process; without any, of one nothing."""
    states = folder.random_states()
    if not states:
        yield {}
    for rank, state in enumerate(states):
        try:
            tree = streams.from_theirs(state)
        except (LookupError, TypeError, ValueError) as e:
            raise UnsupportedStateError(
                "a file holds no random streams as Accelerate saves them",
                where=str(folder.path / f"random_states_{rank}.pkl"),
                why=f"{type(e).__name__}: {e}",
                remedy="remove the file, if the run may go on with new streams",
            ) from e
        yield {
            RngPart.name: captured_tree(
                tree, name=RngPart.name, kind=RngPart.kind, scope=Scope.PER_RANK, per_rank=True
            )
        }


def _require_as_many(found: Sequence[Any], given: Sequence[Any], what: str, folder: Folder) -> None:
    if len(found) != len(given):
        raise StateMismatchError(
            f"the folder has {len(found)} {what}s, and {what}s= {len(given)}",
            where=str(folder.path),
            remedy="give all that were prepared, in the same order",
        )
