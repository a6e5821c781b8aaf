"""How much of its time a run trains while workers are lost, with several ways of saving.

The same job under the same losses: by seeded ones, or by those of a spot trace at a
compressed clock. Each way makes the same steps, however often it is struck:

    python benchmarks/goodput.py --seed 1
    python benchmarks/goodput.py --trace trace.json --tick 4

See benchmarks/README.md for what is measured.
"""

from __future__ import annotations

import argparse
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
from benchmarks.ray_loops import Way, fit, kill, made

WAYS = [
    Way(name="ray_accel_ckpt, memory tier", kind="ours", every=50, memory=True),
    Way(name="ray_accel_ckpt, save each 10", kind="ours", every=10),
    Way(name="torch.save + report each 5", kind="recipe", every=5),
    Way(name="torch.save + report each 10", kind="recipe", every=10),
    Way(name="torch.save + report each 20", kind="recipe", every=20),
]

LONGEST = 8
"""Ticks of a trace in a row without a change; the rest of a longer stretch is left out."""


@dataclass(frozen=True, kw_only=True)
class Came:
    """How a run came out.

    Attributes:
        seconds: from its first step to its last.
        again: steps that were made more than once, each time but one.
        lives: of the group of workers.
    """

    seconds: float
    again: int
    lives: int


def measure(
    way: Way, losses: list[float], directory: Path, *, megabytes: float, steps: int, step: float
) -> Came:
    def run() -> None:
        fit(way, directory, megabytes=megabytes, steps=steps, step_seconds=step)

    training = threading.Thread(target=run)
    training.start()
    while not (directory / "steps").exists() or not made(directory):
        time.sleep(0.02)
    begun = made(directory)[0].at
    for number, loss in enumerate(losses):
        while training.is_alive() and time.time() < begun + loss:
            time.sleep(0.05)
        if training.is_alive():
            try:
                kill(directory, rank=number % 2)
            except ProcessLookupError:
                # The group is down already: a second loss costs it nothing more.
                continue
    training.join()
    found = made(directory)
    return Came(
        seconds=found[-1].at - begun,
        again=len(found) - len({each.step for each in found}),
        lives=len({each.life for each in found}),
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
    parser.add_argument("--steps", type=int, default=200, help="steps to be made (default: 200)")
    parser.add_argument("--step", type=float, default=0.5, help="seconds a step (default: 0.5)")
    parser.add_argument("--seed", type=int, default=1, help="of the losses (default: 1)")
    parser.add_argument("--mean", type=float, default=30, help="seconds between (default: 30)")
    parser.add_argument("--trace", type=Path, help="a spot trace, in the place of a seed")
    parser.add_argument("--tick", type=float, default=4, help="seconds a tick (default: 4)")
    parser.add_argument("--directory", help="storage (default: a new one in /var/tmp)")
    args = parser.parse_args()
    import ray

    # Nothing is lost after ten times what the steps take: all ways come to an end.
    until = 10 * args.steps * args.step
    losses = (
        seeded(args.seed, args.mean, until)
        if args.trace is None
        else traced(args.trace, args.tick, until)
    )
    parent = Path(args.directory or tempfile.mkdtemp(prefix="goodput-", dir="/var/tmp"))
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    print(
        f"{machine(parent)}; 2 workers, {args.megabytes:g} MB, {args.steps} steps of "
        f"{args.step:g} s; losses of {args.trace.name if args.trace else f'seed {args.seed}'} at "
        f"{', '.join(f'{loss:.0f}' for loss in losses[:20])} s",
        flush=True,
    )
    print(f"{'':30}{'goodput':>9}{'seconds':>9}{'made again':>12}{'lives':>7}")
    for way in random.Random(args.seed).sample(WAYS, len(WAYS)):
        directory = parent / str(WAYS.index(way))
        came = measure(
            way,
            losses,
            directory,
            megabytes=args.megabytes,
            steps=args.steps,
            step=args.step,
        )
        # Keepers of the memory tier may still be writing what the workers left.
        shutil.rmtree(directory, ignore_errors=True)
        useful = args.steps * args.step / came.seconds
        print(
            f"{way.name:30}{useful:>9.0%}{came.seconds:>9.0f}{came.again:>12}{came.lives:>7}",
            flush=True,
        )


if __name__ == "__main__":
    main()
