"""The position: how passes are counted, and what a resumed run makes of a saved one."""

from __future__ import annotations

from ray_accel_ckpt.state.cursor import Cursor


def saved(cursor: Cursor, *, replay: bool = False) -> Cursor:
    """As another process has it after loading."""
    loaded = Cursor(seed=0)
    loaded.load(cursor.state(replay=replay))
    return loaded


def test_passes_are_counted() -> None:
    cursor = Cursor(seed=1)
    cursor.begin()
    assert cursor.epoch == 0
    cursor.ended = True
    cursor.begin()
    assert (cursor.epoch, cursor.consumed) == (1, 0)


def test_a_pass_under_way_is_gone_on_with() -> None:
    cursor = Cursor(seed=1)
    cursor.begin()
    cursor.consumed = 12
    loaded = saved(cursor)
    loaded.begin()
    assert (loaded.seed, loaded.epoch, loaded.consumed) == (1, 0, 12)
    loaded.begin()
    assert (loaded.epoch, loaded.consumed) == (1, 0)


def test_an_ended_pass_is_followed_by_the_next() -> None:
    cursor = Cursor(seed=1)
    cursor.begin()
    cursor.consumed, cursor.ended = 22, True
    loaded = saved(cursor)
    loaded.begin()
    assert (loaded.epoch, loaded.consumed, loaded.spent) == (1, 0, False)


def test_an_ended_pass_of_an_epoch_entered_again_is_empty() -> None:
    cursor = Cursor(seed=1)
    cursor.begin()
    cursor.consumed, cursor.ended = 22, True
    loaded = saved(saved(cursor, replay=True))
    loaded.begin()
    assert (loaded.epoch, loaded.spent) == (0, True)


def test_a_loader_not_used_yet_stays_so() -> None:
    loaded = saved(Cursor(seed=1))
    loaded.begin()
    assert (loaded.epoch, loaded.consumed) == (0, 0)
