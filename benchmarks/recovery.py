"""How long a run takes to go on after a worker was killed, beside an empty loop under Ray.

Two workers on one node of a local cluster. Each way trains, one worker is killed
at a step, and the run goes on, in turn, several times over:

    python benchmarks/recovery.py --megabytes 200 --rounds 3

See benchmarks/README.md for what is measured.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import machine
from benchmarks.ray_loops import Made, Way, end, fit, kill, made

EVERY = 10
"""Steps between saves to storage."""

KILLED_AFTER = 28
"""Steps: the last save to storage was 8 before."""

WAYS = [
    Way(name="nothing saved (the floor)", kind="nothing"),
    Way(name="ray_accel_ckpt, memory tier", kind="ours", every=EVERY, memory=True),
    Way(name="ray_accel_ckpt, storage", kind="ours", every=EVERY),
    Way(name="torch.save + report", kind="recipe", every=EVERY),
]


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """Seconds from the kill to the end of the first step, and of the first that is new; and
    steps that were made again."""

    first: float
    new: float
    again: int


def measure(way: Way, directory: Path, *, megabytes: float, step_seconds: float) -> Recovered:
    def run() -> None:
        fit(way, directory, megabytes=megabytes, step_seconds=step_seconds)

    training = threading.Thread(target=run)
    training.start()
    while not (directory / "steps").exists() or done(directory) < KILLED_AFTER:
        time.sleep(0.02)
    killed = kill(directory, rank=1)
    while (found := recovered(made(directory), killed, nothing=way.kind == "nothing")) is None:
        time.sleep(0.02)
    end(directory)
    training.join()
    return found


def recovered(steps: list[Made], killed: float, *, nothing: bool) -> Recovered | None:
    """How it came back, or None: not yet. `nothing` is saved: any step is a new one."""
    before = [each.step for each in steps if each.life == steps[0].life]
    after = [each for each in steps if each.life != steps[0].life]
    new = [each for each in after if nothing or each.step > before[-1]]
    if not new:
        return None
    return Recovered(
        first=after[0].at - killed,
        new=new[0].at - killed,
        again=0 if nothing else before[-1] - after[0].step + 1,
    )


def done(directory: Path) -> int:
    return max((each.step for each in made(directory)), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=200, help="state (default: 200)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--step", type=float, default=0.5, help="seconds a step (default: 0.5)")
    parser.add_argument("--directory", help="storage (default: a new one in /var/tmp)")
    args = parser.parse_args()
    import ray

    parent = Path(args.directory or tempfile.mkdtemp(prefix="recovery-", dir="/var/tmp"))
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    print(f"{machine(parent)}; 2 workers, {args.megabytes:g} MB, {args.rounds} rounds", flush=True)
    found: dict[str, list[Recovered]] = {way.name: [] for way in WAYS}
    for number in range(args.rounds):
        for way in random.Random(number).sample(WAYS, len(WAYS)):
            directory = parent / f"{number}-{WAYS.index(way)}"
            found[way.name].append(
                measure(way, directory, megabytes=args.megabytes, step_seconds=args.step)
            )
            shutil.rmtree(directory, ignore_errors=True)
    print(f"{'':30}{'first step, s':>22}{'first new step, s':>22}{'made again':>12}")
    for way in WAYS:
        rounds = found[way.name]
        again = statistics.median(each.again for each in rounds)
        print(
            f"{way.name:30}{seconds([r.first for r in rounds]):>22}"
            f"{seconds([r.new for r in rounds]):>22}{again:>12g}",
            flush=True,
        )


def seconds(values: list[float]) -> str:
    """Median (smallest-largest)."""
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


if __name__ == "__main__":
    main()
