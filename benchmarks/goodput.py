"""How much of its time a run trains while workers are lost, with several ways of saving.

The same job under the same losses for the same time: seeded ones, or those of a spot
trace at a compressed clock:

    python benchmarks/goodput.py --seed 1
    python benchmarks/goodput.py --trace trace.json --tick 4

See benchmarks/README.md for what is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import machine
from benchmarks.ray_loops import Made, Way, end, fit, kill, made

WAYS = [
    Way(name="ray_accel_ckpt, memory tier", kind="ours", every=50, memory=True),
    Way(name="ray_accel_ckpt, save each 10", kind="ours", every=10),
    Way(name="torch.save + report each 5", kind="recipe", every=5),
    Way(name="torch.save + report each 10", kind="recipe", every=10),
]

LONGEST = 8
"""Ticks of a trace in a row without a change; the rest of a longer stretch is left out."""


@dataclass(frozen=True, kw_only=True)
class Came:
    """How a run came out, from its first step on.

    Attributes:
        new: steps that were made, each counted once.
        again: steps that were made more than once, each time but one.
        down: seconds without a step around the losses: from the last step of a group of
            workers to the first of the next.
        lives: of the group.
    """

    new: int
    again: int
    down: float
    lives: int


def measure(
    way: Way, losses: list[float], directory: Path, *, megabytes: float, seconds: float, step: float
) -> Came:
    def run() -> None:
        fit(way, directory, megabytes=megabytes, step_seconds=step)

    training = threading.Thread(target=run)
    training.start()
    while not (directory / "steps").exists() or not made(directory):
        time.sleep(0.02)
    begun = made(directory)[0].at
    for number, loss in enumerate(losses):
        time.sleep(max(0.0, begun + loss - time.time()))
        # A group that is down already loses nothing more.
        with contextlib.suppress(ProcessLookupError):
            kill(directory, rank=number % 2)
    time.sleep(max(0.0, begun + seconds - time.time()))
    end(directory)
    training.join()
    return came([each for each in made(directory) if each.at <= begun + seconds])


def came(steps: list[Made]) -> Came:
    different = len({each.step for each in steps})
    gaps = [b.at - a.at for a, b in itertools.pairwise(steps) if a.life != b.life]
    return Came(
        new=different,
        again=len(steps) - different,
        down=sum(gaps),
        lives=len({each.life for each in steps}),
    )


def seeded(seed: int, mean: float, until: float) -> list[float]:
    """Seconds of losses, so many seconds apart on average, without memory of each other."""
    draw = random.Random(seed)
    gaps = (draw.expovariate(1 / mean) for _ in itertools.count())
    return list(itertools.takewhile(lambda at: at < until, itertools.accumulate(gaps)))


def traced(file: Path, tick: float, until: float) -> list[float]:
    """Seconds of the ticks at which a spot trace has fewer instances than before."""
    counts = json.loads(file.read_text())["data"]
    begun = itertools.dropwhile(lambda count: count == 0, counts)
    stretches = [list(same)[:LONGEST] for _, same in itertools.groupby(begun)]
    shorter = [count for same in stretches for count in same]
    drops = [i for i, (a, b) in enumerate(itertools.pairwise(shorter), start=1) if b < a]
    return [drop * tick for drop in drops if drop * tick < until]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=200, help="state (default: 200)")
    parser.add_argument("--seconds", type=float, default=120, help="of each way (default: 120)")
    parser.add_argument("--step", type=float, default=0.5, help="seconds a step (default: 0.5)")
    parser.add_argument("--seed", type=int, default=1, help="of the losses (default: 1)")
    parser.add_argument("--mean", type=float, default=30, help="seconds between (default: 30)")
    parser.add_argument("--trace", type=Path, help="a spot trace, in the place of a seed")
    parser.add_argument("--tick", type=float, default=4, help="seconds a tick (default: 4)")
    parser.add_argument("--directory", help="storage (default: a new one in /var/tmp)")
    args = parser.parse_args()
    import ray

    losses = (
        seeded(args.seed, args.mean, args.seconds)
        if args.trace is None
        else traced(args.trace, args.tick, args.seconds)
    )
    parent = Path(args.directory or tempfile.mkdtemp(prefix="goodput-", dir="/var/tmp"))
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    print(
        f"{machine(parent)}; 2 workers, {args.megabytes:g} MB, {args.seconds:g} s, steps "
        f"of {args.step:g} s; losses of "
        f"{args.trace.name if args.trace else f'seed {args.seed}'} at "
        f"{', '.join(f'{loss:.0f}' for loss in losses)} s",
        flush=True,
    )
    print(f"{'':30}{'goodput':>9}{'steps':>7}{'made again':>12}{'down, s':>9}{'lives':>7}")
    for way in random.Random(args.seed).sample(WAYS, len(WAYS)):
        directory = parent / str(WAYS.index(way))
        found = measure(
            way,
            losses,
            directory,
            megabytes=args.megabytes,
            seconds=args.seconds,
            step=args.step,
        )
        # Keepers of the memory tier may still be writing what the workers left.
        shutil.rmtree(directory, ignore_errors=True)
        useful = found.new * args.step / args.seconds
        print(
            f"{way.name:30}{useful:>9.0%}{found.new:>7}{found.again:>12}{found.down:>9.0f}"
            f"{found.lives:>7}",
            flush=True,
        )


if __name__ == "__main__":
    main()
