"""`python -m ray_accel_ckpt.cli`."""

from ray_accel_ckpt.cli import app

app(prog_name="ray-accel-ckpt")
