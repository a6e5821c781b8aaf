"""`python -m tests.chaos`: as many seeds as one likes, a line each, a table in the end."""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.chaos import reference
from tests.chaos.cluster import Nodes, started
from tests.chaos.faults import KINDS
from tests.chaos.scenario import Scenario, draw
from tests.chaos.stage import LIMIT, Stuck, set_for
from tests.chaos.verdict import Outcome, judge, unfinished


def play(scenario: Scenario, nodes: Nodes, untouched: list[str], directory: Path) -> Outcome:
    """One scenario, from its start to its verdict."""
    with set_for(scenario, nodes, directory, limit=LIMIT) as stage:
        try:
            stage.play()
            return judge(stage, untouched)
        except Stuck as e:
            return unfinished(stage, str(e))
        except Exception:
            # The campaign goes on: the next seeds have something to tell too.
            return unfinished(stage, traceback.format_exc())


def campaign(seeds: Iterable[int], directory: Path) -> Iterator[Outcome]:
    """Each seed's scenario, in one cluster."""
    (directory / "untouched").mkdir()
    untouched = reference.digests(directory / "untouched")
    with started() as nodes:
        for seed in seeds:
            yield play(draw(seed), nodes, untouched, directory / f"seed-{seed}")


def line(outcome: Outcome) -> str:
    """One run, and how to run it again if it failed."""
    told = [
        f"{outcome.verdict:6} seed {outcome.scenario.seed}: {outcome.scenario}",
        f"       {outcome.lives} lives, {outcome.starts} drivers, {outcome.lost} steps done again, "
        f"{outcome.seconds:.0f} s",
        *(f"       note: {note}" for note in outcome.notes),
    ]
    if outcome.wrong:
        told += [f"       {each}" for wrong in outcome.wrong for each in wrong.splitlines()]
        told += [f"       again: make chaos SEED={outcome.scenario.seed} RUNS=1"]
    return "\n".join(told)


def table(outcomes: list[Outcome]) -> str:
    """By kind of the first fault, as Markdown."""
    rows = [
        "| first fault | runs | ok | lives of the workers | steps done again | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name in [*(kind.kind for kind in KINDS), "all"]:
        of = [o for o in outcomes if name in (o.scenario.kind, "all")]
        if of:
            cells = [
                name,
                str(len(of)),
                str(sum(not o.wrong for o in of)),
                *(
                    _spread(values)
                    for values in (
                        [o.lives for o in of],
                        [o.lost for o in of],
                        [round(o.seconds) for o in of],
                    )
                ),
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _spread(values: list[int]) -> str:
    ordered = sorted(values)
    return f"{ordered[0]} to {ordered[-1]}, median {ordered[len(ordered) // 2]}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the first")
    parser.add_argument("--runs", type=int, default=10, help="how many, each with the next seed")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    options = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as directory:
        seeds = range(options.seed, options.seed + options.runs)
        for outcome in campaign(seeds, Path(directory)):
            outcomes.append(outcome)
            print(line(outcome), flush=True)
    print(f"\n{table(outcomes)}")
    if options.out is not None:
        options.out.write_text(f"{table(outcomes)}\n")
    sys.exit(any(outcome.wrong for outcome in outcomes))
