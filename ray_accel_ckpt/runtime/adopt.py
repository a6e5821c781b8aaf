"""What a 🤗 Accelerator has prepared, made part of a bundle where it stands.

Nothing of Accelerate is imported: what is used of an accelerator are its attributes.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.runtime.prepare import Preparer
from ray_accel_ckpt.runtime.refusals import refuse_unreadable_model
from ray_accel_ckpt.runtime.session import Session
from ray_accel_ckpt.state.accelerated import adopt_loader
from ray_accel_ckpt.state.bundle import StateBundle
from ray_accel_ckpt.state.hooks import Hooks
from ray_accel_ckpt.state.part import (
    Captured,
    Differences,
    SavedPart,
    Scope,
    captured_tree,
    require,
)
from ray_accel_ckpt.state.sharding import is_sharded

_HELD = ("_models", "_optimizers", "_schedulers", "_dataloaders", "_custom_objects")
_HOOKS = ("_save_model_state_pre_hook", "_load_model_state_pre_hook")
_ENGINES = ("DEEPSPEED", "MEGATRON_LM", "XLA", "FSDP")
_THEIRS = ("scaler", "ddp_kwargs")


def require_accelerator(accelerator: Any, options: Mapping[str, Any]) -> None:
    """Raise `ConfigurationError` unless this is an accelerator that can be adopted.

    Args:
        options: what the `Checkpointer` is going to be made with.
    """
    if not all(hasattr(accelerator, name) for name in (*_HELD, *_HOOKS, "gradient_state")):
        raise ConfigurationError(
            f"from_accelerator takes an accelerate.Accelerator, not a {type(accelerator).__name__}"
        )
    if "save_state" in vars(accelerator):
        raise ConfigurationError(
            "this accelerator has a Checkpointer already",
            why="its loaders go on where that one says",
            remedy="keep the first one",
        )
    taken = [name for name in _THEIRS if name in options]
    if taken:
        raise ConfigurationError(
            f"from_accelerator takes no {' and no '.join(taken)}",
            why="the accelerator has its own",
            remedy="leave it out; Accelerator(kwargs_handlers=[...]) configures the scaler and DDP",
        )
    kind = getattr(accelerator.distributed_type, "value", "")
    if kind in _ENGINES and not getattr(accelerator, "is_fsdp2", False):
        raise ConfigurationError(
            f"an accelerator of {kind} cannot be adopted",
            why="models and optimizers are sharded by it in a way that cannot be read",
            remedy="use DDP, or FSDP2: FullyShardedDataParallelPlugin(fsdp_version=2)",
        )


def adopt(
    accelerator: Any,
    *,
    bundle: StateBundle,
    session: Session,
    preparer: Preparer,
    hooks: Hooks,
) -> None:
    """Register everything that the accelerator holds now. Collective when there are peers.

    Raises:
        ConfigurationError: it holds nothing yet, something that cannot be read, or
            knows other peers than this process has.
    """
    session.agree()
    group = session.group
    if accelerator.num_processes != group.world_size:
        raise ConfigurationError(
            f"the accelerator has {accelerator.num_processes} processes, torch.distributed "
            f"{group.world_size}",
            why="on CPUs, Accelerate sees peers only with Accelerator(cpu=True)",
            remedy="make the Accelerator inside train_loop_per_worker, with cpu=True without GPUs",
        )
    if not any(getattr(accelerator, name) for name in _HELD):
        raise ConfigurationError(
            "the accelerator holds nothing that could be saved",
            why="nothing was prepared with it yet",
            remedy="call from_accelerator after accelerator.prepare(...)",
        )
    models = [_as_wrapped(model, group.world_size) for model in accelerator._models]
    installs = []
    for loader in accelerator._dataloaders:
        part, install = adopt_loader(
            loader,
            name=bundle.next_loader_name(),
            seed=session.seed,
            rank=group.rank,
            world_size=group.world_size,
            agree=group.from_rank_zero,
        )
        bundle.add(part)
        installs.append(install)
    for model in models:
        preparer.adopt_model(model)
    for optimizer in accelerator._optimizers:
        preparer.adopt_optimizer(_inner(optimizer, "optimizer"))
    for scheduler in accelerator._schedulers:
        bundle.add_scheduler(_inner(scheduler, "scheduler"))
    numbers: Counter[str] = Counter()
    for obj in accelerator._custom_objects:
        # Accelerate keeps them by the order of registration. So are those of one class here.
        kind = type(obj).__name__
        name = kind if not numbers[kind] else f"{kind}_{numbers[kind]}"
        numbers[kind] += 1
        bundle.add_object(name, obj, kind="object")
    for hook in accelerator._save_model_state_pre_hook.values():
        hooks.add_save(hook)
    for hook in accelerator._load_model_state_pre_hook.values():
        hooks.add_load(hook)
    bundle.add(AcceleratorPart(accelerator, models))
    # Nothing is refused any more.
    for install in installs:
        install()
    _refuse_its_own(accelerator)


class AcceleratorPart:
    """What an accelerator itself counts: micro-steps of its window, passes of its loaders.
    And of each model, whether DDP hands out rank 0's buffers at the next forward: not
    after one inside a window.

    It also watches that the accelerator holds nothing that it did not hold when it was
    adopted: that would be left out of every checkpoint.
    """

    kind = "accelerator"
    name = "accelerator"

    def __init__(self, accelerator: Any, models: list[nn.Module]) -> None:
        self._accelerator = accelerator
        self._loaders = list(accelerator._dataloaders)
        self._models = models
        self._known = {id(obj): obj for obj in _held(accelerator)}

    def capture(self) -> Captured:
        self._require_all_known()
        state = {
            "step": self._accelerator.step,
            "sync_gradients": self._accelerator.gradient_state.sync_gradients,
            "iterations": [loader.iteration for loader in self._loaders],
            "buffer_syncs": [getattr(m, "require_forward_param_sync", True) for m in self._models],
        }
        return captured_tree(state, name=self.name, kind=self.kind, scope=Scope.RANK_ZERO)

    def compare(self, saved: SavedPart, differences: Differences) -> None:
        del saved, differences
        self._require_all_known()

    def targets(self, saved: SavedPart) -> Mapping[str, torch.Tensor]:
        return {}

    def templates(self, saved: SavedPart) -> Mapping[str, torch.Tensor]:
        return {}

    def check(self, state: Any) -> None:
        names = {"step", "sync_gradients", "iterations", "buffer_syncs"}
        known = isinstance(state, dict) and set(state) == names
        lists = {"iterations": self._loaders, "buffer_syncs": self._models}
        counted = known and all(
            isinstance(state[name], list) and len(state[name]) == len(objects)
            for name, objects in lists.items()
        )
        sound = counted and all(
            type(n) is int and 0 <= n < 2**63 for n in (state["step"], *state["iterations"])
        )
        sound = sound and all(
            type(flag) is bool for flag in (state["sync_gradients"], *state["buffer_syncs"])
        )
        require(sound, self.name, "expected the counters of an accelerator that holds as much")

    def apply(self, state: Any) -> None:
        self._accelerator.step = state["step"]
        self._accelerator.gradient_state.sync_gradients = state["sync_gradients"]
        for loader, iteration in zip(self._loaders, state["iterations"], strict=True):
            loader.iteration = iteration
        for model, syncs in zip(self._models, state["buffer_syncs"], strict=True):
            if hasattr(model, "require_forward_param_sync"):
                model.require_forward_param_sync = syncs

    def _require_all_known(self) -> None:
        late = [type(o).__name__ for o in _held(self._accelerator) if id(o) not in self._known]
        if late:
            raise ConfigurationError(
                f"not part of the state, though the accelerator holds it: {', '.join(late)}",
                why="it was prepared or registered after Checkpointer.from_accelerator",
                remedy="call from_accelerator after the last accelerator.prepare(...), "
                "register_for_checkpointing(...) and register_..._pre_hook(...)",
            )


def _as_wrapped(model: nn.Module, world_size: int) -> nn.Module:
    """What the loop calls for a model that the accelerator holds.

    Accelerate returns a `DistributedDataParallel` to the loop and keeps what is in it. So
    it has to be found among all objects of this process.
    """
    refuse_unreadable_model(model, world_size=world_size)
    own = isinstance(model, DistributedDataParallel) or any(map(is_sharded, model.parameters()))
    if world_size == 1 or own or not any(p.requires_grad for p in model.parameters()):
        return model
    for obj in gc.get_objects():
        if issubclass(type(obj), DistributedDataParallel) and obj.module is model:
            found: DistributedDataParallel = obj
            return found
    raise ConfigurationError(
        f"no DistributedDataParallel was found around the accelerator's {type(model).__name__}",
        why="it was deleted, or gc.freeze() hides what was made before it",
        remedy="call from_accelerator right after accelerator.prepare(...), and keep what it "
        "returns",
    )


def _held(accelerator: Any) -> list[Any]:
    objects = [obj for name in _HELD for obj in getattr(accelerator, name)]
    return objects + [hook for name in _HOOKS for hook in getattr(accelerator, name).values()]


def _inner(obj: Any, name: str) -> Any:
    """What Accelerate has wrapped; the object itself if it has not."""
    return getattr(obj, name, obj)


def _refuse_its_own(accelerator: Any) -> None:
    """Let the accelerator's own ways of saving and resuming say what to do instead."""
    accelerator.save_state = _refusal("save_state()", "ckpt.save_state(), or ckpt.step()")
    accelerator.load_state = _refusal("load_state()", "ckpt.load_state()")
    accelerator.skip_first_batches = _refusal(
        "skip_first_batches()", "the loader itself: after ckpt.load_state() it goes on at its batch"
    )


def _refusal(method: str, instead: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise ConfigurationError(
            f"accelerator.{method} was called, and a Checkpointer has the accelerator's state",
            why="Accelerate's own files do not hold the position in the data, so that what they "
            "bring back would be another state than the Checkpointer's",
            remedy=f"use {instead}; Accelerate's files are written by "
            "ray_accel_ckpt.integrations.accelerate.to_accelerate",
        )

    return refuse
