"""What is logged in an epoch and not yet reduced, which Lightning forgets when it resumes."""

from __future__ import annotations

import builtins
from operator import attrgetter
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultMetric,
    _Sync,
)
from torchmetrics import Metric

from ray_accel_ckpt.errors import UnsupportedStateError

_PLAIN = ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph")
_PLACED = ("add_dataloader_idx", "dataloader_idx", "metric_attribute")
_REDUCTIONS = {
    **{f"torch.{name}": getattr(torch, name) for name in ("mean", "sum", "min", "max")},
    **{f"builtins.{name}": getattr(builtins, name) for name in ("sum", "min", "max")},
}


class Logged:
    """One worker's part of the epoch's metrics, as an object with a state.

    What `self.log` has summed up so far, the states of the module's `torchmetrics.Metric`s,
    and the values that callbacks and schedulers look at.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        connector = self._trainer._logger_connector
        results = self._trainer.fit_loop.epoch_loop._results
        return {
            "results": {k: _saved(k, m) for k, m in results.items() if not m.has_reset},
            "metrics": {name: _state_of(metric) for name, metric in self._metrics()},
            "latest": {
                "callback": dict(connector._callback_metrics),
                "logged": dict(connector._logged_metrics),
                "progress_bar": dict(connector._progress_bar_metrics),
            },
            "first": connector._first_loop_iter,
            "fx": connector._current_fx,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state

    def set(self) -> None:
        """Be as it was loaded: Lightning resets much of this after loading."""
        if self._loaded is None:
            return
        loaded, self._loaded = self._loaded, None
        metrics = dict(self._metrics())
        for name, state in loaded["metrics"].items():
            if name in metrics:
                _set_state(metrics[name], state)
        results = self._trainer.fit_loop.epoch_loop._results
        for key, saved in loaded["results"].items():
            results[key] = self._result(saved)
        connector = self._trainer._logger_connector
        connector._callback_metrics = dict(loaded["latest"]["callback"])
        connector._logged_metrics = dict(loaded["latest"]["logged"])
        connector._progress_bar_metrics = dict(loaded["latest"]["progress_bar"])
        connector._first_loop_iter = loaded["first"]
        connector._current_fx = loaded["fx"]

    def _metrics(self) -> list[tuple[str, Metric]]:
        module = self._trainer.lightning_module
        return [(name, m) for name, m in module.named_modules() if isinstance(m, Metric)]

    def _result(self, saved: dict[str, Any]) -> _ResultMetric:
        meta = _Metadata(**saved["meta"], reduce_fx=_REDUCTIONS[saved["reduction"]])
        meta.sync = _Sync(fn=self._trainer.strategy.reduce, **saved["sync"])
        module = self._trainer.lightning_module
        metric = _ResultMetric(meta, saved["is_tensor"])
        metric.to(self._trainer.strategy.root_device)
        if saved["is_tensor"]:
            _set_state(metric, saved["state"])
        else:
            metric.value = attrgetter(meta.metric_attribute)(module)
        metric._forward_cache = saved["step"]
        return metric


def _saved(key: str, metric: _ResultMetric) -> dict[str, Any]:
    meta = metric.meta
    if meta.sync.group is not None:
        raise UnsupportedStateError(
            "a value that is logged over a process group of its own cannot be saved",
            where=key,
            remedy="log it without sync_dist_group",
        )
    reduction = next(name for name, fx in _REDUCTIONS.items() if fx is meta.reduce_fx)
    return {
        "meta": {name: getattr(meta, name) for name in (*_PLAIN, *_PLACED)},
        "reduction": reduction,
        "sync": {"_should": meta.sync.should, "rank_zero_only": meta.sync.rank_zero_only},
        "is_tensor": metric.is_tensor,
        "state": _state_of(metric) if metric.is_tensor else None,
        "step": metric._forward_cache,
    }


def _state_of(metric: Metric) -> dict[str, Any]:
    states = {name: getattr(metric, name) for name in metric._defaults}
    return {"states": states, "updates": metric._update_count}


def _set_state(metric: Metric, state: dict[str, Any]) -> None:
    for name, value in state["states"].items():
        setattr(metric, name, value)
    metric._update_count, metric._computed = state["updates"], None
