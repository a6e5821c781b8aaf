"""Hooks around saving and loading, called as 🤗 Accelerate calls them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

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
        """
        if not self._save:
            return None
        named = [(part.name, part.weights()) for part in models]
        remaining = [weights for _, weights in named]
        for hook in self._save.values():
            hook([part.module for part in models], remaining, directory)
        kept = {id(weights) for weights in remaining}
        return {name: weights for name, weights in named if id(weights) in kept}

    def skipped(self, models: list[ModelPart], directory: str) -> frozenset[str]:
        """Names of models that load hooks have taken out: they load themselves."""
        remaining = [part.module for part in models]
        for hook in self._load.values():
            hook(remaining, directory)
        kept = {id(module) for module in remaining}
        return frozenset(part.name for part in models if id(part.module) not in kept)
