"""A fixed dozen of the campaign: each kind of fault strikes at least once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos import reference
from tests.chaos.campaign import line, play
from tests.chaos.cluster import Nodes, started
from tests.chaos.faults import KINDS
from tests.chaos.scenario import draw

# Ray's own handling of files and deprecated calls is not what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore")

# By `make test`: a damaged file, an elastic run that loses a node, a full disk, and a worker
# that comes back from memory. What else there is has the others, by `make test-all`.
SHORT = (8, 10, 34, 36)
DOZEN = (*SHORT, 2, 6, 9, 13, 14, 17, 48, 59)
SEEDS = [*SHORT, *(pytest.param(seed, marks=pytest.mark.long) for seed in DOZEN[len(SHORT) :])]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return reference.digests(tmp_path_factory.mktemp("untouched"))


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with started() as nodes:
        yield nodes


def test_the_dozen_has_each_kind() -> None:
    assert {draw(seed).kind for seed in DOZEN} == {kind.kind for kind in KINDS}
    assert {draw(seed).shape for seed in DOZEN} == {"fixed", "elastic"}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_that_is_struck_ends_as_one_that_is_not(
    seed: int, nodes: Nodes, untouched: list[str], tmp_path: Path
) -> None:
    outcome = play(draw(seed), nodes, untouched, tmp_path)
    assert not outcome.wrong, line(outcome)
