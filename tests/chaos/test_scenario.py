"""A seed means one scenario, and seeds in a row mean all kinds of faults."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.faults import KINDS
from tests.chaos.records import Life, Rank
from tests.chaos.scenario import draw
from tests.chaos.trace import LONGEST, MOST, Trace
from tests.chaos.verdict import lost, resumed, samples
from tests.chaos.watch import SNAPSHOT, Watch


def test_a_seed_is_one_scenario_in_any_process() -> None:
    code = "from tests.chaos.scenario import draw; print([draw(s) for s in range(20)])"
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert other.stdout.decode().strip() == str([draw(seed) for seed in range(20)])
    assert len({str(draw(seed)) for seed in range(200)}) == 200


@pytest.mark.parametrize("first", [0, 1, 1000])
def test_seeds_in_a_row_have_each_kind_of_fault(first: int) -> None:
    seeds = range(first, first + len(KINDS))
    assert {draw(seed).kind for seed in seeds} == {kind.kind for kind in KINDS}


def test_each_fault_has_the_storage_and_the_job_that_it_needs() -> None:
    for scenario in map(draw, range(500)):
        for strike in scenario.strikes:
            assert scenario.storage in strike.fault.needs
            assert scenario.shape in strike.fault.shapes
            assert 0 < strike.step < scenario.steps


def _life(number: int, *, resumed: int, steps: range, source: str | None = None) -> Life:
    # In epoch 0 of the job, batches of one sample: the step's own number.
    written = {step: {"epoch": 0, "indices": [step]} for step in steps}
    rank = Rank(
        pid=1,
        node="",
        world_size=1,
        began=float(number),
        resumed=resumed,
        source=source,
        steps=written,
    )
    return Life(number=number, ranks={0: rank})


def test_steps_that_are_done_again_are_lost() -> None:
    lives = [_life(0, resumed=0, steps=range(1, 8)), _life(1, resumed=4, steps=range(5, 12))]
    assert lost(lives) == 3


def test_samples_that_are_missing_or_out_of_order_are_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.chaos.verdict.order", lambda epoch: list(range(1, 12)))
    whole = [_life(0, resumed=0, steps=range(1, 8)), _life(1, resumed=4, steps=range(5, 12))]
    assert list(samples(whole, epochs=1)) == []
    gap = [_life(0, resumed=0, steps=range(1, 8)), _life(1, resumed=8, steps=range(9, 12))]
    assert any("missing" in wrong for wrong in samples(gap, epochs=1))
    short = [_life(0, resumed=0, steps=range(1, 11))]
    assert any("another order" in wrong for wrong in samples(short, epochs=1))


def test_a_life_goes_on_from_what_was_registered_and_not_damaged(tmp_path: Path) -> None:
    watch = Watch(tmp_path, tmp_path)
    names = ["checkpoint_00000004_aaaaaa", "checkpoint_00000008_aaaaaa"]
    results = [{"checkpoint_dir_name": name} for name in names]
    (tmp_path / SNAPSHOT).write_text(json.dumps({"checkpoint_results": results}))
    watch.look()
    watch.seen = {name: (0.5, each) for name, (_, each) in watch.seen.items()}
    first = _life(0, resumed=0, steps=range(1, 10))
    behind = [first, _life(1, resumed=4, steps=range(5, 12), source=names[0])]
    newest = [first, _life(1, resumed=8, steps=range(9, 12), source=names[1])]
    assert len(list(resumed(behind, watch))) == 1
    assert list(resumed(newest, watch)) == []
    watch.damaged[names[1]] = 0.7
    assert list(resumed(behind, watch)) == []
    assert len(list(resumed(newest, watch))) == 1


def test_a_trace_begins_with_its_first_node_and_waits_for_none_for_long(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    content = {"metadata": {"gap_seconds": 300}, "data": [0, 0, 16, 3, *([0] * 50), 1, 2]}
    file.write_text(json.dumps(content))
    counts = (MOST, 3, *([0] * LONGEST), 1)
    assert Trace.read(file, ticks=3 + LONGEST) == Trace(counts=counts, gap=300.0)
