"""torch.distributed.checkpoint (DCP): its loader reads our checkpoints, and both are converted."""

from ray_accel_ckpt.integrations.dcp.convert import from_dcp, to_dcp
from ray_accel_ckpt.integrations.dcp.reader import CheckpointReader

__all__ = ["CheckpointReader", "from_dcp", "to_dcp"]
