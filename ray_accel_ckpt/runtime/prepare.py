"""What `Checkpointer.prepare` makes of models and optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.runtime.ray_run import is_ray_data, training_device
from ray_accel_ckpt.runtime.refusals import refuse_unreadable_model, refuse_unreadable_optimizer
from ray_accel_ckpt.runtime.session import Session
from ray_accel_ckpt.state.bundle import StateBundle
from ray_accel_ckpt.state.dealing import require_by_index
from ray_accel_ckpt.state.loader import PreparedLoader
from ray_accel_ckpt.state.materialise import materialise
from ray_accel_ckpt.state.model import ModelPart
from ray_accel_ckpt.state.optimizer import OptimizerPart
from ray_accel_ckpt.state.parts import ObjectPart
from ray_accel_ckpt.state.scaling import ScalerPart, refuse_driven
from ray_accel_ckpt.state.sharding import held, is_sharded, reshard


class AccumulationWindow:
    """Whether gradients wait for a step: a model went forward with gradients enabled
    since the last step of some optimizer.

    It is a forward hook of prepared models, and they may be copied and pickled:
    so it holds nothing else, and a copy of a model reports to the same window.
    """

    def __init__(self) -> None:
        self._optimizers = 0
        self._open: set[int] = set()

    @property
    def open(self) -> bool:
        return bool(self._open)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            self.reopen()

    def reopen(self) -> None:
        """As after a forward: every optimizer has something to step for."""
        self._open = set(range(max(1, self._optimizers)))

    def __deepcopy__(self, memo: Any) -> AccumulationWindow:
        return self

    def closer(self, stepped: Callable[[], None]) -> Callable[[], None]:
        """What one more optimizer calls after each of its steps, be it twice.

        Args:
            stepped: called once for each forward that an optimizer has stepped for.
        """
        number = self._optimizers
        self._optimizers += 1

        def close() -> None:
            if number in self._open:
                self._open.discard(number)
                stepped()

        return close

    def clear(self) -> None:
        self._open = set()


class Preparer:
    """Makes objects part of a bundle, and what the loop uses in their place."""

    def __init__(
        self,
        bundle: StateBundle,
        session: Session,
        *,
        scaling: ScalerPart | None,
        ddp_kwargs: Mapping[str, Any],
    ) -> None:
        self._bundle, self._session = bundle, session
        self._scaling, self._ddp_kwargs = scaling, dict(ddp_kwargs)
        self.window = AccumulationWindow()

    @cached_property
    def device(self) -> torch.device:
        return training_device()

    def adopt_model(self, model: nn.Module) -> None:
        """Make a model that somebody else has prepared part of the bundle, as it is."""
        # Of two numbers the order of adding does not matter.
        if isinstance(model, DistributedDataParallel) and self._session.group.world_size > 2:
            pin(model)
        self._watch(model)
        self._bundle.add_model(model)

    def adopt_optimizer(self, optimizer: Optimizer) -> Callable[[], None]:
        """As `adopt_model`, for the torch optimizer that somebody else steps.

        Returns:
            What a step that is skipped has to call.

        Raises:
            ConfigurationError: it keeps its state on other workers.
        """
        refuse_unreadable_optimizer(optimizer)
        stepped = self.window.closer(lambda: self._bundle.zeroed.stepped(optimizer))
        optimizer.register_step_post_hook(lambda *_: stepped())
        self._bundle.add_optimizer(optimizer)
        return stepped

    def prepare(
        self,
        obj: Any,
        *,
        global_batch_size: int | None = None,
        data_mesh: DeviceMesh | None = None,
    ) -> Any:
        """See `Checkpointer.prepare`. What is prepared already comes back as it is."""
        self._session.agree()
        group = self._session.group
        if self._is_prepared(obj):
            return obj
        if isinstance(obj, PreparedLoader):
            raise ConfigurationError(
                "a loader is prepared already, by another Checkpointer",
                where=obj.name,
                why="its position is part of the state of that one",
                remedy="make the loader anew for each Checkpointer, in the same notebook cell say",
            )
        if isinstance(obj, nn.Module):
            unset = materialise(obj, self.device)
            model = prepare_model(
                obj, self.device, world_size=group.world_size, ddp_kwargs=self._ddp_kwargs
            )
            self._watch(model)
            if unset.names:
                model.register_forward_pre_hook(unset)
            self._bundle.add_model(model, unset)
            return model
        if isinstance(obj, Optimizer):
            refuse_driven(obj)
            stepped = self.adopt_optimizer(obj)
            if self._scaling is not None:
                self._scaling.drive(obj, stepped)
            return obj
        if isinstance(obj, DataLoader) or is_ray_data(obj):
            rank, world_size = group.rank, group.world_size
            if data_mesh is not None:
                require_by_index(obj)
                rank, world_size = data_mesh.get_local_rank(), data_mesh.size()
            loader = PreparedLoader(
                obj,
                name=self._bundle.next_loader_name(),
                seed=self._session.seed,
                rank=rank,
                world_size=world_size,
                device=self.device,
                global_batch_size=global_batch_size,
            )
            self._bundle.add(loader)
            return loader
        if isinstance(obj, LRScheduler):
            self._bundle.add_scheduler(obj)
        return obj

    def _watch(self, model: nn.Module) -> None:
        """Have the window know of each forward."""
        if isinstance(model, torch.jit.ScriptModule):
            raise ConfigurationError(
                "a model that is a ScriptModule cannot be prepared",
                where=type(model).__qualname__,
                why="TorchScript takes no forward hooks, by which gradients that wait are known",
                remedy="prepare an nn.Module that calls it in its forward; its state_dict() "
                "names have that attribute's name before them",
            )
        model.register_forward_pre_hook(self.window)

    def _is_prepared(self, obj: Any) -> bool:
        bundle = self._bundle
        models = [part.model for part in bundle.of_type(ModelPart)]
        optimizers = [part.optimizer for part in bundle.of_type(OptimizerPart)]
        objects = [part.object for part in bundle.of_type(ObjectPart)]
        schedulers = [each for each in objects if isinstance(each, LRScheduler)]
        loaders = bundle.of_type(PreparedLoader)
        return any(obj is each for each in (*models, *optimizers, *schedulers, *loaders))


class PinnedDDP(DistributedDataParallel):
    """`DistributedDataParallel` whose gradient buckets are the same in every life.

    DDP reduces the first backward in buckets by declaration, then rebuilds them
    in the order gradients became ready. Where in a bucket a gradient lies decides
    in which order three or more workers add it up, so the first step after a
    restart would round differently than the same step of a run that never
    failed. Here the buckets are built once, in reverse declaration order (about
    the order of readiness), before the first step, and stay.
    """

    def __init__(self, module: nn.Module, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)
        _rebuild_buckets(self)

    def _build_params_for_reducer(self) -> tuple[list[nn.Parameter], list[bool]]:
        # Rebuilding lays buckets out in the order of this list.
        parameters, sparse = super()._build_params_for_reducer()  # type: ignore[no-untyped-call]
        return parameters[::-1], sparse[::-1]


def pin(model: DistributedDataParallel) -> None:
    """Give a model that is wrapped already, and not trained yet, buckets as `PinnedDDP` has."""
    if isinstance(model, PinnedDDP):
        return
    parameters, sparse = model._build_params_for_reducer()  # type: ignore[no-untyped-call]
    parameters, sparse = parameters[::-1], sparse[::-1]
    names = model._build_debug_param_to_name_mapping(parameters)  # type: ignore[no-untyped-call]
    # The old one first: its hooks on the parameters go with it.
    del model.reducer, model.logger
    model._ddp_init_helper(parameters, sparse, names, model.static_graph)  # type: ignore[no-untyped-call]
    for hook, state in model._comm_hooks:
        dist._register_comm_hook(model.reducer, state, hook)  # type: ignore[attr-defined]
    _rebuild_buckets(model)


def _rebuild_buckets(model: DistributedDataParallel) -> None:
    model.reducer._push_all_rebuilt_params()
    model.reducer._rebuild_buckets()


def prepare_model(
    model: nn.Module, device: torch.device, *, world_size: int, ddp_kwargs: Mapping[str, Any]
) -> nn.Module:
    """Move to `device`; wrap for data parallelism if there are peers and something to train.

    A model that is sharded already (`fully_shard`, tensor parallel plans) stays as it is.

    Raises:
        ConfigurationError: the model is sharded in a way that cannot be read.
        UnsupportedStateError: a parameter's shards are not boxes of a mesh over all ranks.
    """
    refuse_unreadable_model(model, world_size=world_size)
    reshard(model)
    if isinstance(model, DistributedDataParallel):
        return model
    sharded = {name: p for name, p in model.named_parameters() if is_sharded(p)}
    for name, parameter in sharded.items():
        held(parameter, name)
    if sharded:
        return model
    model = model.to(device)
    trains = any(p.requires_grad for p in model.parameters())
    if world_size == 1 or not trains:
        return model
    devices = None if device.type == "cpu" else [device]
    return PinnedDDP(model, **{"device_ids": devices, **ddp_kwargs})
