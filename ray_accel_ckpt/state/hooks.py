"""Hooks around saving and loading, called as 🤗 Accelerate calls them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.state.entries import fits, is_extra
from ray_accel_ckpt.state.model import ModelPart

SaveHook = Callable[[list[nn.Module], list[dict[str, Any]], str], None]
LoadHook = Callable[[list[nn.Module], str], None]


class Hooks:
    """The two lists of hooks of one `Checkpointer`, in order of registration."""

    def __init__(self) -> None:
        self._save: OrderedDict[int, SaveHook] = OrderedDict()
        self._load: OrderedDict[int, LoadHook] = OrderedDict()

    def add_save(self, hook: SaveHook) -> RemovableHandle:
        handle = RemovableHandle(self._save)
        self._save[handle.id] = hook
        return handle

    def add_load(self, hook: LoadHook) -> RemovableHandle:
        handle = RemovableHandle(self._load)
        self._load[handle.id] = hook
        return handle

    def weights(
        self, models: list[ModelPart], directory: str
    ) -> Mapping[str, Mapping[str, Any]] | None:
        """State dicts by part after all save hooks; None if there are no hooks.

        A hook may take entries out of a state dict, or a whole one out of the list.

        Raises:
            ConfigurationError: a hook put something in that no load would know.
        """
        if not self._save:
            return None
        named = [(part.name, part.weights()) for part in models]
        before = {name: dict(weights) for name, weights in named}
        remaining = [weights for _, weights in named]
        for hook in self._save.values():
            hook([part.module for part in models], remaining, directory)
        kept = {id(weights) for weights in remaining}
        if kept - {id(weights) for _, weights in named}:
            raise _unknown("a state dict in the place of one it was given")
        for name, weights in named:
            for key, value in weights.items():
                if key not in before[name]:
                    raise _unknown(f"{name}/{key}")
                if not is_extra(key) and not fits(before[name][key], value):
                    raise _unknown(f"{name}/{key}, in another dtype or shape")
        return {name: weights for name, weights in named if id(weights) in kept}

    def skipped(self, models: list[ModelPart], directory: str) -> frozenset[str]:
        """Names of models that load hooks have taken out: they load themselves."""
        remaining = [part.module for part in models]
        for hook in self._load.values():
            hook(remaining, directory)
        kept = {id(module) for module in remaining}
        return frozenset(part.name for part in models if id(part.module) not in kept)


def _unknown(what: str) -> ConfigurationError:
    return ConfigurationError(
        f"a hook of register_save_state_pre_hook put in {what}",
        why="the checkpoint would not fit the model that it is of",
        remedy="take entries out of the dicts it is given (del weights[0][name]), or whole dicts "
        "out of the list; save what is added with register_for_checkpointing",
    )
