"""The shape that a state has in DCP's hands, and the shape it has here.

They differ in optimizers. `get_optimizer_state_dict` names parameters as the
model does and has `param_groups`; here they begin with the name of the model's
part, so that one optimizer may train several models, and there are `groups`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ray_accel_ckpt.errors import CorruptCheckpointError, UnsupportedStateError
from ray_accel_ckpt.image.reader import Snapshot
from ray_accel_ckpt.state.model import ModelPart
from ray_accel_ckpt.state.optimizer import OptimizerPart


def models_of(snapshot: Snapshot) -> tuple[str, ...]:
    """Names of the parts that are models."""
    parts = snapshot.manifests[0].parts
    return tuple(name for name, part in parts.items() if part.kind == ModelPart.kind)


def to_dcp_shape(value: Any, *, kind: str, name: str, models: Collection[str]) -> Any:
    """The decoded state of part `name` as DCP's users save and load it.

    Raises:
        CorruptCheckpointError: it is no state that this kind of part writes.
    """
    if kind != OptimizerPart.kind:
        return value
    try:
        prefix = _prefix([n for group in value["groups"] for n in group["params"]], models)
        groups = [
            {**group, "params": [n.removeprefix(prefix) for n in group["params"]]}
            for group in value["groups"]
        ]
        state = {n.removeprefix(prefix): each for n, each in value["state"].items()}
        return {**value.get("extra", {}), "state": state, "param_groups": groups}
    except (LookupError, TypeError, AttributeError) as e:
        raise CorruptCheckpointError(
            "the state of an optimizer is not one that this library writes",
            where=name,
            why=f"{type(e).__name__}: {e}",
            remedy="use another checkpoint",
        ) from e


def flattened_groups(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """The `param_groups` as `flatten_optimizer_state_dict=True` has them: for each parameter."""
    return {
        f"param_groups.{name}.{key}": value
        for group in optimizer["param_groups"]
        for name in group["params"]
        for key, value in group.items()
        if key != "params"
    }


def from_dcp_shape(value: Any, *, where: str, names: Collection[str]) -> dict[str, Any]:
    """An optimizer's state of DCP as `OptimizerPart` writes it, for the model part `model`.

    Args:
        where: its place in the DCP checkpoint, for errors.
        names: those of the model's state; without any, every parameter is the model's.

    Raises:
        UnsupportedStateError: parameters have no names, or it is flattened.
    """
    groups = value.get("param_groups") if isinstance(value, dict) else None
    if not isinstance(groups, list) or not all(_named(group) for group in groups):
        flat = isinstance(value, dict) and any(str(k).startswith("param_groups.") for k in value)
        raise UnsupportedStateError(
            "the optimizer's state does not name parameters by group",
            where=where,
            why="it was saved with flatten_optimizer_state_dict=True, and which parameters "
            "form a group is lost in that"
            if flat
            else 'expected was {"state": {name: ...}, "param_groups": [{"params": [names]}]}',
            remedy="save what torch.distributed.checkpoint.state_dict.get_optimizer_state_dict "
            "returns, with its default options",
        )

    def full(name: str) -> str:
        return f"model.{name}" if name in names or not names else name

    made = {
        # Empty dicts are not there in a DCP checkpoint: an SGD without momentum has no state.
        "state": {full(n): each for n, each in value.get("state", {}).items()},
        "groups": [{**group, "params": [full(n) for n in group["params"]]} for group in groups],
    }
    extra = {k: v for k, v in value.items() if k not in ("state", "param_groups")}
    return {**made, "extra": extra} if extra else made


def _prefix(names: Iterable[str], models: Collection[str]) -> str:
    """What to strip: the model's name if there is one that all named parameters are of."""
    owners = {owner for n in names if (owner := n.partition(".")[0]) in models}
    return f"{owners.pop()}." if len(owners) == 1 else ""


def _named(group: Any) -> bool:
    names = group.get("params") if isinstance(group, dict) else None
    return isinstance(names, list) and all(isinstance(name, str) for name in names)
