"""One small Accelerate loop with everything that makes resuming hard, for pure and gloo tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler

from ray_accel_ckpt import Checkpointer
from tests.pure.helpers import digest, seed_everything, streams

SAMPLES, BATCH, EPOCHS = 23, 3, 2


class Augmented(Dataset[tuple[torch.Tensor, int]]):
    """Samples that come out differently each time, unless the streams are the same."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        fixed = torch.randn(8, generator=torch.Generator().manual_seed(index))
        noise = random.random() + float(np.random.rand()) + torch.rand(8)
        return fixed + 0.1 * noise, index


class Scheduled(Augmented):
    """Samples that depend on the epoch that Accelerate tells the dataset."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        sample, index = super().__getitem__(index)
        return sample + self.epoch, index


class Stream(IterableDataset[tuple[torch.Tensor, int]]):
    """The same, as a stream that draws as it goes."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        samples = Augmented()
        return (samples[i] for i in range(SAMPLES))


class StatefulStream(Stream):
    """And one that can be entered in the middle."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        samples = Augmented()
        begin, self.at = self.at, 0
        for i in range(begin, SAMPLES):
            self.at = i + 1
            yield samples[i]
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Backwards(BatchSampler):
    """Batches of somebody's own making."""

    def __iter__(self) -> Iterator[list[int]]:
        yield from list(super().__iter__())[::-1]


def by_index() -> DataLoader[Any]:
    return DataLoader(Augmented(), batch_size=BATCH, shuffle=True)


def own_batches() -> DataLoader[Any]:
    sampler = Backwards(RandomSampler(range(SAMPLES)), BATCH, drop_last=False)
    return DataLoader(Augmented(), batch_sampler=sampler)


class Meter:
    """Something registered: what all have seen, in order."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def reset() -> None:
    """A new process's Accelerate: it keeps its state in the classes."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def train(
    make_checkpointer: Callable[[Accelerator], Checkpointer],
    *,
    loader: Callable[[], DataLoader[Any]] = by_index,
    data: DataLoaderConfiguration | None = None,
    rng_types: list[str] | None = None,
    window: int = 2,
    scaled: bool = False,
    seed: int = 7,
    load: Callable[[Checkpointer], object] = lambda ckpt: ckpt.load_state(),
    on_step: Callable[[Checkpointer], None] = lambda ckpt: ckpt.step(),
) -> dict[str, Any]:
    """Train; digests of all that this rank ended with, and the samples that all saw."""
    reset()
    seed_everything(seed)
    accelerator = Accelerator(
        cpu=True,
        dataloader_config=data,
        rng_types=rng_types,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=window),
    )
    if scaled:
        # On CPUs Accelerate has no fp16 of its own, torch has.
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=3)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Dropout(0.3), nn.Linear(32, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    meter = Meter()
    model, optimizer, scheduler, batches = accelerator.prepare(
        model, optimizer, scheduler, loader()
    )
    accelerator.register_for_checkpointing(meter)
    ckpt = make_checkpointer(accelerator)
    seed_everything(seed + accelerator.process_index)
    load(ckpt)
    for _ in range(ckpt.epoch, EPOCHS):
        for x, index in batches:
            with accelerator.accumulate(model):
                dtype = torch.float16 if scaled else torch.bfloat16
                with torch.autocast("cpu", dtype=dtype, enabled=scaled):
                    loss = nn.functional.cross_entropy(model(x), index % 3)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            meter.seen += accelerator.gather_for_metrics(index.tolist())
            # The ranks' streams do not stay alike, if they ever were.
            torch.rand(accelerator.process_index)
            on_step(ckpt)
    return {
        "model": digest(accelerator.unwrap_model(model)),
        "optimizer": digest(optimizer.state_dict()),
        "scheduler": digest(scheduler.state_dict()),
        "scaler": digest(accelerator.scaler) if scaled else "",
        "streams": streams(),
        "accelerator": accelerator.step,
        "seen": meter.seen,
    }


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what two runs did not end alike with."""
    return [name for name, value in one.items() if other[name] != value]


def resumed_from_each_step(directory: Path, **options: Any) -> None:
    """A run that saves after each step ends with the bits of one that never saves, and so
    does each run that is resumed from one of the saves."""
    saves: list[str] = []

    def save(ckpt: Checkpointer) -> None:
        ckpt.step()
        saves.append(ckpt.save_state(directory / f"{ckpt.global_step}"))

    untouched = train(Checkpointer.from_accelerator, load=lambda ckpt: None, **options)
    saving = train(Checkpointer.from_accelerator, load=lambda ckpt: None, on_step=save, **options)
    assert differing(saving, untouched) == []
    for path in saves:
        # What the seed decided comes out of the checkpoint.
        resumed = train(
            Checkpointer.from_accelerator,
            load=lambda ckpt, path=path: ckpt.load_state(path),  # type: ignore[misc]
            **{**options, "seed": 11},
        )
        found = differing(resumed, untouched)
        if path == saves[-1] and Accelerator(cpu=True).process_index:
            # DDP hands buffers out at the next forward, and there is none.
            found = [name for name in found if name != "model"]
        assert found == [], (path, found)


class Tied(nn.Module):
    """Tied weights, a buffer, and parameters in another order than that of their names."""

    def __init__(self) -> None:
        super().__init__()
        self.z = nn.Embedding(6, 4)
        self.a = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.z.weight

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.a(self.z(index))))


class Run:
    """An accelerator with all that `save_state` writes."""

    def __init__(self, seed: int) -> None:
        reset()
        seed_everything(seed)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**seed)
        model = Tied()
        decayed = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim == 1]
        # Groups, so that the optimizer numbers parameters otherwise than the model does.
        groups = [{"params": rest, "weight_decay": 0.0}, {"params": decayed}]
        optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        self.meter = Meter()
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(
            model, optimizer, scheduler
        )
        self.accelerator.register_for_checkpointing(self.meter)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            with self.accelerator.accumulate(self.model):
                index = torch.randint(0, 6, (5,))
                loss = nn.functional.cross_entropy(self.model(index), index)
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            self.meter.seen += index.tolist()

    def digest(self) -> str:
        parts = self.model, self.optimizer.state_dict(), self.scheduler, self.meter
        return digest(*parts, self.accelerator.scaler, streams())

    def goes_on(self) -> tuple[str, str]:
        """Where it stands, and where it comes to from there."""
        now = self.digest()
        self.train(4)
        return now, self.digest()
