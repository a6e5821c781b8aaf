"""What `prepare` refuses: what would be saved wrong, or not at all.

Ways of sharding are recognised and not read. What such an object holds on this rank is a
part of the whole, and nothing public says which part. Saved as if it were the whole, it would
come back as nonsense.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.runtime.ray_run import is_ray_data

_FSDP2 = "use FSDP2, torch.distributed.fsdp.fully_shard(model), which is read and dealt out anew"
_ENGINES = ("deepspeed", "fairscale", "megatron", "colossalai")
"""Packages whose models and optimizers shard their state behind plain tensors."""


def refuse_containers(objects: Iterable[Any]) -> None:
    """Raise `ConfigurationError` if one is a list, tuple or dict of what is to be prepared.

    It would come back as it is, and nothing in it would be saved.
    """
    for obj in objects:
        if isinstance(obj, (list, tuple, dict)):
            inside = obj.values() if isinstance(obj, dict) else obj
            kinds = (nn.Module, Optimizer, LRScheduler, DataLoader)
            held = [each for each in inside if isinstance(each, kinds) or is_ray_data(each)]
            if held:
                raise ConfigurationError(
                    f"prepare() was given a {type(obj).__name__} with a {type(held[0]).__name__}",
                    why="nothing in it would be prepared, and nothing saved",
                    remedy="give the objects one by one: prepare(*objects)",
                )


def refuse_unreadable_model(model: nn.Module, *, world_size: int) -> None:
    """Raise `ConfigurationError` if any module shards parameters other than as `DTensor`s."""
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel) and module.process_group.size() < world_size:
            raise ConfigurationError(
                "a model is data parallel over some of the workers only",
                where=name or type(module).__qualname__,
                why=f"its process group has {module.process_group.size()} of {world_size} ranks. "
                "Over a tensor parallel plan it hides the shards: they look like whole parameters",
                remedy="use fully_shard(model, mesh=mesh['dp']) on top of a tensor parallel plan; "
                "plain models are wrapped by prepare()",
            )
        kind = type(module)
        engine = _engine(kind)
        if engine or kind.__name__ == "FullyShardedDataParallel":
            raise ConfigurationError(
                "the model is sharded over the workers in a way that cannot be read",
                where=name or kind.__qualname__,
                why=f"{kind.__qualname__} keeps flat pieces of parameters, and which rows of "
                "which parameter they are is its own business",
                remedy=_FSDP2 + (f"; or save with {engine}'s own tools" if engine else ""),
            )
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "ShardedTensor":
            raise ConfigurationError(
                "the model has a ShardedTensor",
                where=name,
                why="torch has replaced it by DTensor, and only that is read",
                remedy="shard it with torch.distributed.tensor.distribute_tensor",
            )


def refuse_unreadable_optimizer(optimizer: Optimizer) -> None:
    """Raise `ConfigurationError` if the optimizer keeps parts of its state on other workers."""
    kind = type(optimizer)
    engine = _engine(kind)
    if engine or kind.__name__ == "ZeroRedundancyOptimizer":
        raise ConfigurationError(
            "the optimizer keeps its state on other workers",
            where=kind.__qualname__,
            why="it deals parameters out to ranks, and this rank has the state of its own only",
            remedy="use the optimizer it wraps; to shard its state too, " + _FSDP2,
        )


def _engine(kind: type) -> str:
    """The package of `_ENGINES` that a class or one of its bases is from, else ""."""
    packages = [base.__module__.partition(".")[0] for base in kind.__mro__]
    return next((package for package in packages if package in _ENGINES), "")
