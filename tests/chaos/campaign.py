"""`python -m tests.chaos`: as many seeds as one likes, a line each, a table in the end."""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from tests.chaos import reference
from tests.chaos.cluster import Nodes, started
from tests.chaos.faults import KINDS
from tests.chaos.scenario import Scenario, draw
from tests.chaos.stage import LIMIT, StuckError, set_for
from tests.chaos.trace import Trace, replay
from tests.chaos.verdict import Outcome, judge, unfinished


def play(scenario: Scenario, nodes: Nodes, untouched: list[str], directory: Path) -> Outcome:
    """One scenario, from its start to its verdict."""
    with set_for(scenario, nodes, directory, limit=LIMIT) as stage:
        try:
            stage.play()
            return judge(stage, untouched)
        except StuckError as e:
            return unfinished(stage, str(e))
        except Exception:
            # The campaign goes on: the next seeds have something to tell too.
            return unfinished(stage, traceback.format_exc())


def campaign(scenarios: Iterable[Scenario], directory: Path) -> Iterator[Outcome]:
    """Each of them, in one cluster."""
    (directory / "untouched").mkdir()
    untouched = reference.digests(directory / "untouched")
    with started() as nodes:
        for scenario in scenarios:
            yield play(scenario, nodes, untouched, directory / f"seed-{scenario.seed}")


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
        memory = " MEMORY=1" if outcome.scenario.memory else ""
        told += [f"       again: make chaos SEED={outcome.scenario.seed} RUNS=1{memory}"]
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


def follow(options: argparse.Namespace, directory: Path) -> bool:
    """Replay a trace; whether all is well."""
    trace = Trace.read(options.trace, options.ticks)
    print(f"{len(trace.counts)} ticks of {trace.gap:.0f} s, each in {options.tick:.0f} s")
    with started() as nodes:
        came = replay(trace, nodes, directory, tick=options.tick, epochs=options.epochs)
    sizes = ", ".join(map(str, came.sizes))
    print(f"{'FAILED' if came.wrong else 'ok'}: {came.steps} steps in {came.seconds:.0f} s")
    print(f"{len(came.sizes)} lives, of {sizes} workers; {came.lost} steps done again")
    print("\n".join(came.wrong))
    return not came.wrong


def strike(options: argparse.Namespace, directory: Path) -> bool:
    """Play seeds; whether all is well."""
    outcomes = []
    scenarios = map(draw, range(options.seed, options.seed + options.runs))
    if options.memory:
        scenarios = (replace(scenario, memory=True) for scenario in scenarios)
    for outcome in campaign(scenarios, directory):
        outcomes.append(outcome)
        print(line(outcome), flush=True)
    print(f"\n{table(outcomes)}")
    if options.out is not None:
        options.out.write_text(f"{table(outcomes)}\n")
    return not any(outcome.wrong for outcome in outcomes)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the first")
    parser.add_argument("--runs", type=int, default=10, help="how many, each with the next seed")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    parser.add_argument("--memory", action="store_true", help="all with the memory tier")
    parser.add_argument("--trace", type=Path, help="replay this spot trace instead")
    parser.add_argument("--ticks", type=int, default=40, help="of the trace")
    parser.add_argument("--tick", type=float, default=5.0, help="seconds of a tick")
    parser.add_argument("--epochs", type=int, default=40, help="of the job under the trace")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as directory:
        act = strike if options.trace is None else follow
        sys.exit(not act(options, Path(directory)))
