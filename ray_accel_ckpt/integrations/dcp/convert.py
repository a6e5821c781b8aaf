"""Checkpoints of DCP made ours, and ours made DCP's, by one process."""

from __future__ import annotations

import os
import re
from typing import Any

import torch

from ray_accel_ckpt.errors import ConfigurationError, UnsupportedStateError
from ray_accel_ckpt.integrations.dcp.layout import from_dcp_shape, models_of, to_dcp_shape
from ray_accel_ckpt.integrations.dcp.transfer import fetched, sent
from ray_accel_ckpt.integrations.dcp.whole import read_whole, write_whole
from ray_accel_ckpt.integrations.making import NewCheckpoint
from ray_accel_ckpt.state.model import ModelPart
from ray_accel_ckpt.state.optimizer import OptimizerPart
from ray_accel_ckpt.state.part import Captured, SavedPart, Scope, captured_tree
from ray_accel_ckpt.state.tree import tensor_refs, unflatten
from ray_accel_ckpt.storage.filesystem import resolve
from ray_accel_ckpt.storage.opened import StoredTensors, open_stored, part_of, shared_parts

_TIMEOUT = 600.0
_OBJECT = "object"
# The names and kinds that `Checkpointer` gives to what it prepares.
_KINDS = re.compile(r"(scheduler)(?:_[0-9]+)?|(scaler)")


def from_dcp(
    source: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    model: str | None = "model",
    optimizer: str | None = "optimizer",
) -> str:
    """Make a checkpoint of this library of one that DCP wrote.

    **Only give it checkpoints that you trust.** DCP's `.metadata` is a pickle, and
    so is every value in it that is no tensor: reading one can run any code.
    What is written holds no pickle.

    Sharded tensors come out whole. `Checkpointer.load_state(output_dir,
    parts=("model", "optimizer"))` loads the result on any number of workers, bit
    for bit. Counters, random streams and data positions are not in it, so name the
    parts. What lies beside model and optimizer becomes parts of its own.

    Host memory: twice the checkpoint.

    Args:
        source: the directory that holds `.metadata`, or a URI: that is copied to
            this machine's temporary directory first.
        output_dir: a new directory or a URI.
        model: where the model's state dict is, dots between nested keys
            (``"app.model"``). ``""`` if there is nothing else in the checkpoint,
            None if there is no model in it.
        optimizer: where that is which `get_optimizer_state_dict` returned; None if
            there is none.

    Returns:
        The new checkpoint's path.

    Raises:
        CheckpointExistsError: a checkpoint is there. Nothing is overwritten.
        NotACheckpointError: DCP wrote nothing whole there.
        UnsupportedStateError: what cannot be represented, by its place.
        ConfigurationError: there is nothing at `model` or `optimizer`.
        StorageError: what storage refused.
    """
    filesystem, directory = resolve(output_dir)
    checkpoint = NewCheckpoint(filesystem, directory)
    with fetched(source, timeout=_TIMEOUT) as local:
        tree = read_whole(local)
    captured = _captured(tree, model=model, optimizer=optimizer, where=os.fspath(source))
    checkpoint.write(captured)
    return directory


def to_dcp(
    checkpoint: Any,
    output_dir: str | os.PathLike[str],
    *,
    parts: tuple[str, ...] | None = None,
) -> str:
    """Make a checkpoint that `torch.distributed.checkpoint.load` reads by itself.

    Its keys are the names of parts, their states in the shape that
    `CheckpointReader` describes; tied weights are written under each of their
    names. DCP has no place for empty dicts, so these are not in it. What each worker
    has for itself (random streams, data positions, gradients) has no one value to
    write and is left out. Every byte is proved before it is handed to DCP.

    To load into DCP once, `CheckpointReader` does without a copy.

    Host memory: once the parts that are converted.

    Args:
        checkpoint: a path, a URI, or a `ray.train.Checkpoint`.
        output_dir: a new directory, or a URI: then it is made in this machine's
            temporary directory and copied, `.metadata` last.
        parts: names of those to convert. None: all that the workers share.

    Returns:
        The new checkpoint's path.

    Raises:
        CheckpointExistsError: `output_dir` holds something. Nothing is overwritten.
        UnsupportedStateError: a dict whose keys are no text, or whose keys DCP
            would confuse; by its place.
        ConfigurationError: no such part, or each worker has its own of it.
        CorruptCheckpointError, NotACheckpointError, FormatVersionError: see `open_checkpoint`.
        StorageError: what storage refused.
    """
    snapshot, fetch = open_stored(checkpoint)
    own, shared = snapshot.per_rank_parts(), shared_parts(snapshot)
    chosen = {name: part_of(snapshot, name, 0) for name in (shared if parts is None else parts)}
    for name in chosen:
        if name in own:
            raise ConfigurationError(
                f"each worker has a part {name!r} of its own: which one is to be converted?",
                where=snapshot.where,
                remedy=f"these are shared: {', '.join(shared)}",
            )
    tensors, models = StoredTensors(snapshot, fetch, 0), models_of(snapshot)
    with sent(output_dir, timeout=_TIMEOUT) as local:
        state = {name: _whole(name, saved, tensors, models) for name, saved in chosen.items()}
        write_whole(state, local)
    return resolve(output_dir)[1]


def _whole(name: str, saved: SavedPart, tensors: StoredTensors, models: tuple[str, ...]) -> Any:
    """One part with its tensors, in DCP's shape. Of a tied weight the names share one tensor."""
    read = {ref: tensors[ref] for ref in tensor_refs(saved.value)}
    return to_dcp_shape(unflatten(saved.value, read), kind=saved.kind, name=name, models=models)


def _captured(
    tree: dict[str, Any], *, model: str | None, optimizer: str | None, where: str
) -> dict[str, Captured]:
    """What DCP held, as parts of ours."""
    rest = dict(tree)
    found: dict[str, Captured] = {}
    weights: dict[str, Any] = {}
    if model is not None:
        weights = _taken(rest, model, where, argument="model")
        _require_weights(weights, model)
        found["model"] = captured_tree(
            weights, name="model", kind=ModelPart.kind, scope=Scope.REPLICATED
        )
    if optimizer is not None:
        state = _taken(rest, optimizer, where, argument="optimizer")
        shaped = from_dcp_shape(state, where=optimizer, names=weights.keys())
        found["optimizer"] = captured_tree(
            shaped, name="optimizer", kind=OptimizerPart.kind, scope=Scope.REPLICATED
        )
    for name, value in rest.items():
        if not name.isidentifier() or name in found:
            raise UnsupportedStateError(
                "this name cannot be that of a part",
                where=name,
                why="it is taken" if name in found else "it is no identifier",
                remedy='if it belongs to the model, say where that is: model="" if everything does',
            )
        prepared = _KINDS.fullmatch(name)
        kind = next(filter(None, prepared.groups())) if prepared else _OBJECT
        found[name] = captured_tree(value, name=name, kind=kind, scope=Scope.RANK_ZERO)
    return found


def _taken(tree: dict[str, Any], place: str, where: str, *, argument: str) -> Any:
    """Take what lies at `place` out of `tree`, and dicts that are empty then."""
    if not place:
        whole = dict(tree)
        tree.clear()
        return whole
    if place in tree:
        return tree.pop(place)
    first, _, below = place.partition(".")
    inner = tree.get(first)
    if not below or not isinstance(inner, dict):
        raise ConfigurationError(
            f"the checkpoint has nothing at {argument}={place!r}",
            where=where,
            why=f"there is: {', '.join(list(tree)[:20]) or 'nothing more'}",
            remedy=f'say where it is ("" is all there is), or {argument}=None if there is none',
        )
    tree[first] = inner = dict(inner)
    found = _taken(inner, below, where, argument=argument)
    if not inner:
        del tree[first]
    return found


def _require_weights(weights: Any, place: str) -> None:
    if not isinstance(weights, dict):
        raise UnsupportedStateError(
            f"a model's state is a dict, not a {type(weights).__qualname__}", where=place
        )
    for name, value in weights.items():
        # Extra state may be anything, see `torch.nn.Module.get_extra_state`.
        if not isinstance(value, torch.Tensor) and not name.endswith("_extra_state"):
            raise UnsupportedStateError(
                f"a model's state holds tensors by name, not a {type(value).__qualname__}",
                where=f"{place}.{name}" if place else name,
                remedy='say where the model\'s state dict is: model="app.model", say',
            )
