"""Where saves of a Ray run go."""

from __future__ import annotations

from ray_accel_ckpt.runtime.ray_run import RayRun
from ray_accel_ckpt.runtime.session import Session
from ray_accel_ckpt.runtime.sinks import sink_for


def test_no_two_saves_of_a_life_go_to_one_directory() -> None:
    """Ray would delete the second with the first."""
    session = Session(project=None, seed=None, timeout=1.0, saves=False)
    session.agree()
    session.run = RayRun(name="run", path="storage/run", arrow=None)
    # Twice at one step, and back to an earlier one.
    steps = (5, 5, 10, 15, 5, 10, 10)
    sinks = [sink_for(session, None, step=step) for step in steps]
    paths = [sink.path for sink in sinks if sink is not None]
    assert len({*paths}) == len(steps)


def test_naming_saves_takes_no_memory_that_grows() -> None:
    session = Session(project=None, seed=None, timeout=1.0, saves=False)
    session.agree()

    def held() -> dict[str, int]:
        return {k: len(v) for k, v in vars(session).items() if isinstance(v, (dict, list, set))}

    before = held()
    assert len({(step, session.next_save_id(step)) for step in [*range(1000), *range(500)]}) == 1500
    assert held() == before
