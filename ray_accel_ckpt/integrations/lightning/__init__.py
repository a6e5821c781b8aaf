"""Lightning: a callback that saves through a `Checkpointer`, and a plugin in its format."""

from ray_accel_ckpt.integrations.lightning.callback import CheckpointerCallback
from ray_accel_ckpt.integrations.lightning.io import CheckpointerIO

__all__ = ["CheckpointerCallback", "CheckpointerIO"]
