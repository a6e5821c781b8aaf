"""The command line: `ray-accel-ckpt`, one module a command."""

from ray_accel_ckpt.cli.app import app
from ray_accel_ckpt.cli.watch_node import watch_node

__all__ = ["app"]

app.command("watch-node")(watch_node)
