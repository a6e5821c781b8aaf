"""What lies in a checkpoint under the names that DCP gives it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from ray_accel_ckpt.errors import UnsupportedStateError
from ray_accel_ckpt.image.pieces import dtype_of
from ray_accel_ckpt.image.reader import Located, Snapshot
from ray_accel_ckpt.integrations.dcp.layout import flattened_groups, models_of, to_dcp_shape
from ray_accel_ckpt.state.optimizer import OptimizerPart
from ray_accel_ckpt.state.part import SavedTensor
from ray_accel_ckpt.state.tree import TAG, Json, tensor_refs, unflatten


class Contents:
    """Every tensor and value of a checkpoint by the name that DCP asks for.

    DCP itself gives the names: its own flattening is run over each part with
    tensors in it that have no bytes. So nothing but the manifests is read.

    Args:
        rank: whose, of what each worker has for itself.

    Attributes:
        metadata: what DCP plans a load with.

    Raises:
        CorruptCheckpointError: a part's values are not of this format.
        UnsupportedStateError: two values of a part would have one name.
    """

    def __init__(self, snapshot: Snapshot, rank: int) -> None:
        self._parts = snapshot.parts(rank)
        self._models = models_of(snapshot)
        self._pieces: dict[tuple[str, tuple[int, ...]], Located] = {}
        self._owner: dict[str, str] = {}
        self._needed: dict[str, set[str]] = {}
        self._values: dict[str, dict[str, Any]] = {}
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        paths: dict[str, Any] = {}
        for name, part in self._parts.items():
            stand_ins = _StandIns(part.tensors)
            leaves, found = self._leaves(name, _without_arrays(part.value), stand_ins)
            self._needed[name] = set(_arrays(part.value)) | stand_ins.beside(leaves.values())
            paths.update(found)
            for key, leaf in leaves.items():
                ref = stand_ins.name_of(leaf)
                if ref:
                    entries[key] = self._tensor(key, snapshot.located(ref, rank))
                else:
                    entries[key] = BytesStorageMetadata()
                    self._owner[key] = name
        self.metadata = Metadata(state_dict_metadata=entries, planner_data=paths)

    def piece(self, key: str, offsets: tuple[int, ...]) -> Located:
        """Where the chunk of a tensor that begins at `offsets` lies."""
        return self._pieces[key, offsets]

    def value(self, key: str, tensors: Mapping[str, torch.Tensor]) -> Any:
        """What is no tensor of its own.

        Args:
            tensors: by stored name; those inside of values (arrays, tuples of
                tensors) are looked up, all of the part at once.
        """
        name = self._owner[key]
        if name not in self._values:
            part, needed = self._parts[name], self._needed[name]
            stand_ins = _StandIns(part.tensors)
            known = {ref: (tensors if ref in needed else stand_ins)[ref] for ref in part.tensors}
            self._values[name], _ = self._leaves(name, part.value, known)
        return self._values[name][key]

    def _tensor(self, key: str, located: list[Located]) -> TensorStorageMetadata:
        chunks = []
        for each in located:
            # What has no bytes may begin where another piece does, and is never asked for.
            if each.info.box.numel or len(located) == 1:
                self._pieces[key, tuple(each.info.offsets)] = each
                offsets, sizes = torch.Size(each.info.offsets), torch.Size(each.info.sizes)
                chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=sizes))
        info = located[0].info
        properties = TensorProperties(dtype=dtype_of(info))
        return TensorStorageMetadata(
            properties=properties, size=torch.Size(info.shape), chunks=chunks
        )

    def _leaves(
        self, name: str, value: Json, tensors: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The leaves of one part and their paths, by DCP's names."""
        kind = self._parts[name].kind
        tree = to_dcp_shape(unflatten(value, tensors), kind=kind, name=name, models=self._models)
        try:
            leaves, paths = flatten_state_dict({name: tree})
            if kind != OptimizerPart.kind:
                return leaves, paths
            more, more_paths = flatten_state_dict({name: flattened_groups(tree)})
        except ValueError as e:
            raise UnsupportedStateError(
                "DCP cannot tell two values apart",
                where=name,
                why=str(e),
                remedy="read it with open_checkpoint(...).state_dict(...)",
            ) from e
        return more | leaves, more_paths | paths


class _StandIns(Mapping[str, torch.Tensor]):
    """Tensors without bytes, another one at each look-up: so each place in a tree has its own."""

    def __init__(self, specs: Mapping[str, SavedTensor]) -> None:
        self._specs = specs
        self._made: dict[int, tuple[torch.Tensor, str]] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        spec = self._specs[name]
        made = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        self._made[id(made)] = (made, name)
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def name_of(self, value: Any) -> str:
        """The stored name of a stand-in, "" for any other value."""
        return self._made[id(value)][1] if isinstance(value, torch.Tensor) else ""

    def beside(self, leaves: Any) -> set[str]:
        """Stored names of those that are no leaves themselves, but inside of one."""
        own = {id(leaf) for leaf in leaves}
        return {name for key, (_, name) in self._made.items() if key not in own}


def _without_arrays(value: Json) -> Json:
    """An encoded tree with None for each numpy array, which only bytes could make."""
    if isinstance(value, list):
        return [_without_arrays(each) for each in value]
    if isinstance(value, dict):
        if value.get(TAG) == "ndarray":
            return None
        return {key: _without_arrays(each) for key, each in value.items()}
    return value


def _arrays(value: Json) -> Iterator[str]:
    """Stored names of the numpy arrays of an encoded tree."""
    if isinstance(value, list):
        for each in value:
            yield from _arrays(each)
    elif isinstance(value, dict):
        if value.get(TAG) == "ndarray":
            yield from tensor_refs(value)
        else:
            for each in value.values():
                yield from _arrays(each)
