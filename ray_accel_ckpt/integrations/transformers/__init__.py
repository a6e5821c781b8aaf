"""🤗 Transformers: a `Trainer` that saves through a `Checkpointer`, and goes on where it was."""

from ray_accel_ckpt.integrations.transformers.trainer import checkpointed

__all__ = ["checkpointed"]
