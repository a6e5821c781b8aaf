"""The bundle: all registered parts of one worker, captured and applied in order."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from ray_accel_ckpt.errors import (
    ConfigurationError,
    CorruptCheckpointError,
    StateMismatchError,
    UnsupportedStateError,
)
from ray_accel_ckpt.state.loader import PreparedLoader
from ray_accel_ckpt.state.materialise import Unset
from ray_accel_ckpt.state.model import ModelPart
from ray_accel_ckpt.state.optimizer import OptimizerPart
from ray_accel_ckpt.state.part import Captured, Differences, Part, SavedPart, Scope
from ray_accel_ckpt.state.parts import GradientPart, ObjectPart, RngPart, Stateful
from ray_accel_ckpt.state.sharding import is_sharded, memory_of
from ray_accel_ckpt.state.tree import unflatten
from ray_accel_ckpt.state.zeroed import ZeroedPart

logger = logging.getLogger(__name__)
P = TypeVar("P")

_WORTH_A_FILE = 2**20
"""Bytes of frozen parameters below which they are written with the rest each time."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What loading will do, decided before anything changes.

    Attributes:
        parts: what will be applied, in order, each with what the checkpoint holds of it.
        targets: live tensors that stored ones are copied into, by stored name.
        templates: tensors that fresh ones are made like, by stored name.
        replicated: stored names of what has to be the same on all ranks.
    """

    parts: tuple[tuple[Part, SavedPart], ...]
    targets: Mapping[str, torch.Tensor]
    templates: Mapping[str, torch.Tensor]
    replicated: frozenset[str]


class StateBundle:
    """Named parts in the order of registration; the random streams always come last."""

    def __init__(self) -> None:
        self._parts: dict[str, Part] = {}
        self.gradients = GradientPart(self._trained)
        self.zeroed = ZeroedPart(self._trained)
        self.rng = RngPart()
        # Of those that nobody registers; the last is in each checkpoint.
        own: tuple[Part, ...] = (self.gradients, self.zeroed, self.rng)
        self._unnamed = {part.name: part for part in own}

    def __iter__(self) -> Iterator[Part]:
        yield from self._parts.values()

    def of_type(self, kind: type[P]) -> list[P]:
        return [part for part in self._parts.values() if isinstance(part, kind)]

    # --- registering -------------------------------------------------------------------

    def add(self, part: Part) -> None:
        if part.name in self._parts or part.name in self._unnamed:
            raise ConfigurationError(
                f"a part named {part.name!r} is already registered",
                remedy="give this one another name: register_for_checkpointing(other_name=obj)",
            )
        self._parts[part.name] = part

    def add_model(self, model: nn.Module, unset: Unset | None = None) -> None:
        self.add(ModelPart(self._numbered("model"), model, unset))

    def add_optimizer(self, optimizer: Optimizer) -> None:
        self.add(OptimizerPart(self._numbered("optimizer"), optimizer, self._index, self._own))

    def add_object(self, name: str | None, obj: Any, *, kind: str, per_rank: bool = False) -> None:
        """Register under `name`, or under the object's class."""
        name = _valid_name(name) if name is not None else type(obj).__name__
        if name in self._parts and isinstance(self._parts[name], ObjectPart):
            raise ConfigurationError(
                f"two objects would be registered as {name!r}",
                why="the order of registration is no safe key: swapping them would swap "
                "their states without a word",
                remedy="name them: register_for_checkpointing(warmup=a, decay=b)",
            )
        self.add(ObjectPart(name, obj, kind=kind, per_rank=per_rank))

    def add_scheduler(self, scheduler: Stateful) -> None:
        self.add(ObjectPart(self._numbered("scheduler"), scheduler, kind="scheduler"))

    def next_loader_name(self) -> str:
        return self._numbered("loader")

    # --- saving ------------------------------------------------------------------------

    def capture(
        self,
        *,
        weights: Mapping[str, Mapping[str, Any]] | None = None,
        replayed: Iterable[str] = (),
        with_gradients: bool = False,
    ) -> dict[str, Captured]:
        """References to everything, by part. Nothing is copied and nothing is changed.

        Args:
            weights: state dicts of models after save hooks; a model that is not
                in it is left out. None: all, unchanged.
            replayed: loaders whose ended pass belongs to the epoch a resumed
                run enters again.
            with_gradients: the save falls inside an accumulation window.

        Raises:
            UnsupportedStateError: see `state.tree.flatten`.
        """
        captured: dict[str, Captured] = {}
        for part in self._parts.values():
            if isinstance(part, ModelPart):
                part.unset.require_none()
                if weights is None or part.name in weights:
                    captured[part.name] = part.capture(weights and weights[part.name])
            elif isinstance(part, PreparedLoader):
                captured[part.name] = part.capture(replay=part.name in set(replayed))
            else:
                captured[part.name] = part.capture()
        if with_gradients:
            for model in self.of_type(ModelPart):
                model.require_reduced_gradients()
            captured[self.gradients.name] = self.gradients.capture()
        elif (zeroed := self.zeroed.capture()).value:
            captured[self.zeroed.name] = zeroed
        captured[self.rng.name] = self.rng.capture()
        return captured

    def require_loadable(self, captured: Mapping[str, Captured]) -> None:
        """Let each part look at what was captured of it as it would when it is loaded.

        Raises:
            UnsupportedStateError: naming a part that would refuse it.
        """
        parts = self._parts | self._unnamed
        for name, each in captured.items():
            try:
                parts[name].check(unflatten(each.value, each.tensors))
            except CorruptCheckpointError as e:
                raise UnsupportedStateError(
                    f"what would be saved of part {name!r} could not be loaded",
                    where=name,
                    why=e.why,
                    remedy="change what is said to be wrong with it, or do not prepare or "
                    "register it: no checkpoint with it would be good",
                ) from e

    def written_by_optimizers(
        self, captured: Mapping[str, Captured]
    ) -> dict[str, tuple[torch.Tensor, ...]]:
        """Captured tensors that are a prepared optimizer's, by name: parameters and their state.

        As far as anyone knows, nothing but its `step` writes them. With each come the
        live tensors of its memory: a write counts in the one that it goes through.
        """
        written: dict[int, tuple[torch.Tensor, ...]] = {}
        for part in self.of_type(OptimizerPart):
            for tensor in part.written():
                seen = (tensor, tensor._local_tensor) if is_sharded(tensor) else (tensor,)  # type: ignore[attr-defined]
                written[memory_of(tensor)] = (*written.get(memory_of(tensor), ()), *seen)
        return {
            name: written[memory_of(tensor)]
            for each in captured.values()
            if each.kind in (ModelPart.kind, OptimizerPart.kind)
            for name, tensor in each.tensors.items()
            if memory_of(tensor) in written and memory_of(tensor)
        }

    def frozen(self, captured: Mapping[str, Captured]) -> frozenset[str]:
        """Names of parameters that are not trained, if they are worth a file of their own."""
        # By name, which is the same on all ranks; that they are unchanged is proved elsewhere.
        found = {
            name: captured[part.name].tensors[name]
            for part in self.of_type(ModelPart)
            if part.name in captured
            for name in part.frozen() & captured[part.name].tensors.keys()
            if captured[part.name].scopes[name] is not Scope.PER_RANK
        }
        # By what all hold together, so that the ranks agree.
        worth = sum(tensor.nbytes for tensor in found.values()) >= _WORTH_A_FILE
        return frozenset(found) if worth else frozenset()

    # --- loading -----------------------------------------------------------------------

    def plan(
        self,
        saved: Mapping[str, SavedPart],
        *,
        only: tuple[str, ...] | None,
        skip: frozenset[str],
        strict: bool,
        where: str,
    ) -> Plan:
        """Compare and decide. Changes nothing.

        Args:
            saved: what the checkpoint holds.
            only: names of parts for a partial start, or None for all.
            skip: parts that load hooks have taken out.
            strict: whether any difference is an error; otherwise what fits is taken.

        Raises:
            StateMismatchError: listing every difference.
            ConfigurationError: `only` names a part that is not registered.
        """
        optional = {name: part for name, part in self._unnamed.items() if name in saved}
        registered = self._parts | optional | {self.rng.name: self.rng}
        if only is not None:
            unknown = [name for name in only if name not in registered]
            if unknown:
                raise ConfigurationError(
                    f"load_state(parts=...) names {', '.join(unknown)}, not registered",
                    remedy=f"registered parts: {', '.join(registered)}",
                )
        wanted = {
            n: p for n, p in registered.items() if n not in skip and (only is None or n in only)
        }
        differences = Differences(missing=[n for n in wanted if n not in saved])
        if only is None:
            differences.unexpected = [n for n in saved if n not in registered]
        chosen = [(part, saved[name]) for name, part in wanted.items() if name in saved]
        for part, stored in chosen:
            if part.kind != stored.kind:
                differences.differing.append(
                    f"{part.name} (checkpoint: {stored.kind}, registered: {part.kind})"
                )
            else:
                part.compare(stored, differences)
        if differences and strict:
            raise StateMismatchError(
                "the checkpoint is of another state than the one registered; nothing was changed",
                missing=tuple(differences.missing),
                unexpected=tuple(differences.unexpected),
                differing=tuple(differences.differing),
                where=where,
                remedy="register what was saved, or take part of it: "
                'load_state(parts=("model",)) or load_state(strict=False)',
            )
        if differences:
            logger.warning("loading what fits of %s: %s", where, differences)
        fitting = [(p, s) for p, s in chosen if p.kind == s.kind and (strict or _fits(p, s))]
        targets: dict[str, torch.Tensor] = {}
        templates: dict[str, torch.Tensor] = {}
        replicated: set[str] = set()
        for part, stored in fitting:
            targets.update(part.targets(stored))
            templates.update(part.templates(stored))
            if isinstance(part, ModelPart):
                replicated |= part.replicated()
            elif isinstance(part, OptimizerPart):
                replicated |= part.replicated(stored)
        return Plan(
            parts=tuple(fitting),
            targets=targets,
            templates=templates,
            replicated=frozenset(replicated),
        )

    # --- names -------------------------------------------------------------------------

    def _numbered(self, base: str) -> str:
        names = (base if n == 0 else f"{base}_{n}" for n in range(len(self._parts) + 1))
        return next(name for name in names if name not in self._parts)

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for part in self.of_type(ModelPart):
            for name, parameter in part.named_parameters():
                yield f"{part.name}.{name}", parameter

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self._named_parameters() if p.requires_grad]

    def _own(self) -> set[int]:
        return {
            id(parameter)
            for part in self.of_type(ModelPart)
            for own in [part.own_names()]
            for name, parameter in part.named_parameters()
            if name in own
        }

    def _index(self) -> dict[int, str]:
        return {id(p): name for name, p in self._named_parameters()}


def _fits(part: Part, stored: SavedPart) -> bool:
    """For a lenient load: models take what matches, other parts are taken whole or not."""
    if isinstance(part, ModelPart):
        return True
    differences = Differences()
    part.compare(stored, differences)
    return not differences


def _valid_name(name: str) -> str:
    if not name.isidentifier():
        raise ConfigurationError(
            f"{name!r} cannot name a part", remedy="use letters, digits and underscores"
        )
    return name


def require_stateful(objects: Iterable[Any]) -> None:
    """Raise `ConfigurationError` (a `ValueError`) naming every object that cannot be saved."""
    lacking = [
        f"{type(obj).__module__}.{type(obj).__qualname__}"
        for obj in objects
        if not isinstance(obj, Stateful)
    ]
    if lacking:
        raise ConfigurationError(
            f"cannot be registered: {', '.join(lacking)}",
            why="an object needs both state_dict() and load_state_dict()",
            remedy="add the two methods, or register an object that has them",
        )
