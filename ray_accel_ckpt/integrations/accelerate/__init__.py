"""🤗 Accelerate's folders: read into a checkpoint of ours, and written out of one."""

from ray_accel_ckpt.integrations.accelerate.incoming import from_accelerate
from ray_accel_ckpt.integrations.accelerate.outgoing import to_accelerate

__all__ = ["from_accelerate", "to_accelerate"]
