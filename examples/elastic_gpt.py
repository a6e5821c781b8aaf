"""A small GPT goes on with 3 workers, and then with 1, from what 2 have saved.

The text is the source of Python's standard library, which is on every machine.
The model is sharded with FSDP2: no worker holds all of it. The run begins with
two workers, goes on with three and ends with one. Then the order of its samples
is compared with that of a run which two workers went through undisturbed.

    python examples/elastic_gpt.py
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset

from ray_accel_ckpt import Checkpointer, EverySteps, open_checkpoint, run_config

CONTEXT, WIDTH, HEADS, LAYERS = 64, 64, 4, 2
SAMPLES, GLOBAL_BATCH, EPOCHS, SAVE_EVERY = 500, 20, 2, 5
STEPS = EPOCHS * SAMPLES // GLOBAL_BATCH
PHASES = ((2, 15), (3, 35), (1, STEPS))
"""How many workers, and up to which step. The second phase crosses into the next epoch."""


class StandardLibrary(Dataset[tuple[int, torch.Tensor]]):
    """Windows of bytes from the modules of the standard library, and the number of each."""

    def __init__(self) -> None:
        modules = sorted(Path(os.__file__).parent.glob("*.py"))
        text = b"".join(module.read_bytes() for module in modules)
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.windows = tokens[: SAMPLES * (CONTEXT + 1)].view(SAMPLES, CONTEXT + 1)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, self.windows[index]


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(256, WIDTH)
        self.place = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, HEADS, 4 * WIDTH, dropout=0.1, batch_first=True, norm_first=True
            )
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        hidden = self.token(tokens) + self.place(torch.arange(length, device=tokens.device))
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        return self.head(self.norm(hidden))


def sharded(model: GPT, device: torch.device) -> nn.Module:
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train_loop_per_worker(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ckpt = Checkpointer(save=EverySteps(SAVE_EVERY))
    model = sharded(GPT().to(ckpt.device), ckpt.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model, optimizer = ckpt.prepare(model, optimizer)
    # The batch over all workers stays the same, whatever their number.
    loader = ckpt.prepare(
        DataLoader(StandardLibrary(), shuffle=True), global_batch_size=GLOBAL_BATCH
    )
    ckpt.load_state()
    rank = ray.train.get_context().get_world_rank()
    notes = Path(config["notes"], f"until-{config['until']:04d}-rank-{rank}")
    with notes.open("w") as seen:
        for _ in ckpt.epochs(EPOCHS):
            for indices, tokens in loader:
                scores = model(tokens[:, :-1])
                loss = nn.functional.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten())
                ckpt.backward(loss)  # weighted: some workers have a sample more than others
                optimizer.step()
                optimizer.zero_grad()
                ckpt.step(metrics={"loss": loss.item()})
                print(ckpt.global_step, loss.item(), *indices.tolist(), file=seen, flush=True)
                if ckpt.global_step == config["until"]:
                    return


def fit(name: str, storage: str, *, workers: int, until: int) -> Any:
    notes = Path(storage, f"notes-{name}")
    notes.mkdir(parents=True, exist_ok=True)
    return TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"notes": str(notes), "until": until},
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=run_config(name=name, storage_path=storage),
    ).fit()


def steps_of(name: str, storage: str) -> dict[int, tuple[list[int], float]]:
    """By step: the samples of all workers in the order of their ranks, and the mean of the loss."""
    found: dict[int, tuple[list[int], float]] = {}
    for notes in sorted(Path(storage, f"notes-{name}").iterdir()):
        for line in notes.read_text().splitlines():
            step, loss, *indices = line.split()
            samples, total = found.setdefault(int(step), ([], 0.0))
            samples += map(int, indices)
            found[int(step)] = (samples, total + float(loss) * len(indices) / GLOBAL_BATCH)
    return found


def digest(steps: dict[int, tuple[list[int], float]]) -> str:
    """SHA-256 over the number of each step and the samples of all workers in it, in order."""
    order = [(step, samples) for step, (samples, _) in sorted(steps.items())]
    return hashlib.sha256(repr(order).encode()).hexdigest()


def each_once_an_epoch(steps: dict[int, tuple[list[int], float]]) -> bool:
    order = [sample for _, (samples, _) in sorted(steps.items()) for sample in samples]
    epochs = [order[i : i + SAMPLES] for i in range(0, len(order), SAMPLES)]
    return len(epochs) == EPOCHS and all(sorted(e) == list(range(SAMPLES)) for e in epochs)


def demonstrate(storage: str) -> bool:
    """Both runs, in a Ray that is there already. Whether the order of the samples is the same."""
    print(f"run 1: 2 workers, {STEPS} steps, undisturbed", flush=True)
    fit("untouched", storage, workers=2, until=STEPS)
    plan = ", ".join(f"{workers} to step {until}" for workers, until in PHASES)
    print(f"run 2, number of workers: {plan}", flush=True)
    for workers, until in PHASES:
        result = fit("elastic", storage, workers=workers, until=until)
        loss = steps_of("elastic", storage)[until][1]
        saved = open_checkpoint(result.checkpoint)
        by = f"saved by {saved.world_size} at step {saved.step}"
        print(f"    step {until:3}: loss {loss:.4f}, {by}", flush=True)
    untouched, elastic = (steps_of(name, storage) for name in ("untouched", "elastic"))
    first, second = digest(untouched), digest(elastic)
    print(f"loss at the end: {untouched[STEPS][1]:.4f} untouched, {elastic[STEPS][1]:.4f} elastic")
    print(f"each sample once an epoch: {'yes' if each_once_an_epoch(elastic) else 'NO'}")
    print(f"order of the samples, untouched: {first}")
    print(f"order of the samples, elastic:   {second}")
    print(f"the same order: {'yes' if first == second else 'NO'}")
    return first == second and each_once_an_epoch(elastic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storage", help="directory for both runs (default: a temporary one)")
    storage = parser.parse_args().storage or tempfile.mkdtemp(prefix="elastic_gpt-")
    started = time.monotonic()
    print("starting Ray on this machine", flush=True)
    # The workers' own output is Ray's usual flood; the notes tell what matters.
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    same = demonstrate(storage)
    ray.shutdown()
    print(f"{time.monotonic() - started:.0f} s in all")
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
