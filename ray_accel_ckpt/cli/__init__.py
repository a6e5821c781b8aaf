"""The command line: `ray-accel-ckpt`, one module a command.

A command gathers what it prints from the rooms below, which it imports when it runs,
so that `--help` and completion need neither torch nor Ray.
"""

from ray_accel_ckpt.cli.app import app
from ray_accel_ckpt.cli.diff import diff
from ray_accel_ckpt.cli.export import export
from ray_accel_ckpt.cli.heal import heal
from ray_accel_ckpt.cli.ls import ls
from ray_accel_ckpt.cli.report import report
from ray_accel_ckpt.cli.show import show
from ray_accel_ckpt.cli.sweep import sweep
from ray_accel_ckpt.cli.verify import verify
from ray_accel_ckpt.cli.watch_node import watch_node

__all__ = ["app"]

app.command("ls")(ls)
app.command("show")(show)
app.command("verify")(verify)
app.command("diff")(diff)
app.command("export")(export)
app.command("heal")(heal)
app.command("sweep")(sweep)
app.command("report")(report)
app.command("watch-node")(watch_node)
