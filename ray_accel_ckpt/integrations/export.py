"""The weights of a checkpoint as plain safetensors files, for whoever loads such."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ray_accel_ckpt.errors import CheckpointExistsError, ConfigurationError, UnsupportedStateError
from ray_accel_ckpt.image import shard
from ray_accel_ckpt.image.dtypes import is_plain
from ray_accel_ckpt.image.partition import Slice, TensorSpec
from ray_accel_ckpt.image.shard import Layout
from ray_accel_ckpt.image.staging import Slot
from ray_accel_ckpt.state.box import Box
from ray_accel_ckpt.state.part import SavedPart, Scope
from ray_accel_ckpt.state.tree import encoded_items, tensor_ref
from ray_accel_ckpt.storage.access import listed
from ray_accel_ckpt.storage.filesystem import Filesystem, resolve
from ray_accel_ckpt.storage.opened import StoredTensors, open_stored, part_of
from ray_accel_ckpt.storage.writer import write_file

logger = logging.getLogger(__name__)

_TIMEOUT = 600.0
_INDEX = "model.safetensors.index.json"
_WEIGHTS = re.compile(r"model(-[0-9]{5}-of-[0-9]{5})?\.safetensors(\.index\.json)?")


def export_safetensors(
    checkpoint: Any,
    output_dir: str | os.PathLike[str],
    *,
    part: str = "model",
    max_shard_nbytes: int = 5 * 10**9,
) -> tuple[str, ...]:
    """Write the tensors of one part as `model.safetensors`, under their `state_dict` names.

    What does not fit one file becomes `model-00001-of-0000N.safetensors` and so
    on. `model.safetensors.index.json` says which name is in which file, as
    🤗 Transformers has it: with the model's `config.json` beside them,
    `from_pretrained(output_dir)` loads them.
    Weights that were saved sharded come out whole, tied ones under each of their
    names. Every byte is proved before it is written. What is no tensor, a
    module's extra state say, is left out with a warning that names it.

    Host memory: the largest file that is written, and the largest tensor.

    Args:
        checkpoint: a path, a URI, or a `ray.train.Checkpoint`.
        output_dir: a directory or URI. Other files may lie there, weights may not.
        part: what to export: a model (the second one is called `model_1`), or an
            object whose state is a flat dict, such as an average of weights.
            Of what each worker has for itself, rank 0's is taken.
        max_shard_nbytes: bytes of tensors in one file. A tensor that is larger
            has a file of its own.

    Returns:
        The paths of the files, the index last.

    Raises:
        CheckpointExistsError: weights lie in `output_dir`. Nothing is overwritten.
        CorruptCheckpointError: damage. Files that are done by then are whole and
            stay; without the index they are no model.
        UnsupportedStateError: there is no tensor in the part, or one of a dtype
            that safetensors does not have.
        ConfigurationError: no such part, a size that is not positive, or no checkpoint's path.
        NotACheckpointError, FormatVersionError: see `open_checkpoint`.
        StorageError: what storage refused.
    """
    if type(max_shard_nbytes) is not int or max_shard_nbytes < 1:
        raise ConfigurationError(
            f"max_shard_nbytes must be a positive number of bytes, not {max_shard_nbytes!r}"
        )
    filesystem, directory = resolve(output_dir)
    snapshot, fetch = open_stored(checkpoint)
    saved = part_of(snapshot, part, 0)
    _refuse_weights(filesystem, directory)
    stored = _stored_names(saved, part, snapshot.where)
    files = _split(
        [_spec(name, ref, saved, part) for name, ref in stored.items()], max_shard_nbytes
    )
    tensors = _Named(stored, StoredTensors(snapshot, fetch, 0))
    slot = Slot()
    for name, specs in files.items():
        layout = shard.plan(Slice(spec=spec, start=0, stop=spec.box.rows) for spec in specs)
        _write_weights(filesystem, f"{directory}/{name}", layout, slot, tensors)
    index = f"{directory}/{_INDEX}"
    _write_index(filesystem, index, files)
    return (*(f"{directory}/{name}" for name in files), index)


def _stored_names(saved: SavedPart, part: str, where: str) -> dict[str, str]:
    """Each tensor's name in the state dict, with the name it is stored under."""
    refs = {name: tensor_ref(value) for name, value in encoded_items(saved.value).items()}
    found = {name: ref for name, ref in refs.items() if ref}
    omitted = [name for name in refs if name not in found]
    if not found:
        raise UnsupportedStateError(
            f"part {part!r} has no tensor to export",
            where=where,
            why="only a flat dict of tensors can be written as safetensors",
            remedy="name the part that holds the weights: export_safetensors(..., part=...)",
        )
    if omitted:
        logger.warning(
            "not exported, as safetensors holds nothing but tensors: %s of part %r",
            ", ".join(omitted[:20]) + (f" and {len(omitted) - 20} more" if omitted[20:] else ""),
            part,
        )
    return found


def _spec(name: str, ref: str, saved: SavedPart, part: str) -> TensorSpec:
    tensor = saved.tensors[ref]
    if not is_plain(tensor.dtype):
        raise UnsupportedStateError(
            f"cannot export a tensor of {tensor.dtype}",
            where=f"{part}/{name}",
            why="safetensors has no such type: it would be read back as another one",
            remedy="load it with open_checkpoint(...).state_dict(...) and convert it",
        )
    return TensorSpec(
        name=name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        scope=Scope.REPLICATED,
        box=Box.whole(tensor.shape),
        peers=(0,),
    )


def _split(specs: list[TensorSpec], limit: int) -> dict[str, list[TensorSpec]]:
    """File names, each with the tensors that go there, in the order of the state dict."""
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if groups[-1] and filled + spec.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": g for i, g in enumerate(groups, 1)}


@dataclass(frozen=True)
class _Named(Mapping[str, torch.Tensor]):
    """Tensors by their names in the state dict, read when they are looked up: one at a time."""

    stored: Mapping[str, str]
    tensors: StoredTensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[self.stored[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def _write_weights(
    filesystem: Filesystem,
    path: str,
    layout: Layout,
    slot: Slot,
    tensors: Mapping[str, torch.Tensor],
) -> None:
    data = slot.fill(layout, tensors)
    slot.copies.wait()
    chunk = 8 * 2**20
    write_file(
        filesystem,
        path,
        lambda: (data[at : at + chunk] for at in range(0, len(data), chunk)),
        what="write weights",
        timeout=_TIMEOUT,
    )


def _write_index(filesystem: Filesystem, path: str, files: Mapping[str, list[TensorSpec]]) -> None:
    total = sum(spec.nbytes for specs in files.values() for spec in specs)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {spec.name: file for file, specs in files.items() for spec in specs},
    }
    text = json.dumps(index, indent=2) + "\n"
    write_file(filesystem, path, lambda: [text.encode()], what="write an index", timeout=_TIMEOUT)


def _refuse_weights(filesystem: Filesystem, directory: str) -> None:
    entries = listed(filesystem, directory, timeout=_TIMEOUT)
    for entry in entries:
        if _WEIGHTS.fullmatch(entry.name):
            raise CheckpointExistsError(
                "weights lie there already",
                where=f"{directory}/{entry.name}",
                why="a loader could not tell which of the files belong together",
                remedy="export to another directory, or remove these first",
            )
