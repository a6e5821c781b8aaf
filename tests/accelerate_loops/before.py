"""A loop in the manner of Accelerate's own example of checkpointing."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from tests.accelerate_loops.data import EPOCHS, SAVE_EVERY, Progress, made


def train_loop_per_worker(config: dict[str, Any]) -> float:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    set_seed(42)
    model, optimizer, scheduler, loader, held_out = accelerator.prepare(*made())
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if config["resume_from"]:
        accelerator.load_state(config["resume_from"])
    for epoch in range(progress.epoch, EPOCHS):
        model.train()
        for pixels, labels in accelerator.skip_first_batches(loader, progress.batch):
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(pixels), labels)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            progress.batch += 1
            progress.step += 1
            if progress.step % SAVE_EVERY == 0:
                accelerator.save_state(f"{config['folder']}/step_{progress.step}")
        progress.epoch, progress.batch = epoch + 1, 0
        model.eval()
        right = seen = 0
        for pixels, labels in held_out:
            found = accelerator.gather_for_metrics(model(pixels).argmax(1) == labels)
            right, seen = right + int(found.sum()), seen + len(found)
        config["on_epoch"](accelerator, model, right / seen)
    return right / seen
