"""The same work for many items, by several threads."""

from __future__ import annotations

import threading

import pytest

from ray_accel_ckpt.image import threads
from ray_accel_ckpt.image.threads import THREADS, for_each


def test_items_are_worked_on_side_by_side() -> None:
    together = threading.Barrier(THREADS)

    def wait(item: int) -> None:
        together.wait(timeout=60)

    for_each(wait, range(THREADS))


def test_one_item_needs_no_thread() -> None:
    found = []
    for_each(lambda item: found.append(threading.current_thread()), ["only"])
    assert found == [threading.current_thread()]


def test_the_first_error_is_raised_though_a_later_item_failed_earlier() -> None:
    later_failed = threading.Event()

    def work(item: int) -> None:
        if item == 0:
            assert later_failed.wait(timeout=60)
        else:
            later_failed.set()
        raise ValueError(item)

    with pytest.raises(ValueError, match="0"):
        for_each(work, range(2))


def test_after_an_error_what_has_not_begun_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    failed: list[threading.Event] = []

    class Flag(threading.Event):
        def __init__(self) -> None:
            super().__init__()
            failed.append(self)

    def work(item: int) -> None:
        begun.append(item)
        if item == 0:
            raise ValueError(item)
        assert failed[0].wait(timeout=60)

    monkeypatch.setattr(threads, "Event", Flag)
    with pytest.raises(ValueError, match="0"):
        for_each(work, range(50 * THREADS))
    assert len(begun) < 50 * THREADS
