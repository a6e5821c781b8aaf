"""The page of a run, as a real browser shows it."""

from __future__ import annotations

import io
import re
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.legend import Legend

from ray_accel_ckpt.report.figure import AGAIN, LOSS, NEW, NOTICE, SAVED, png, timeline
from ray_accel_ckpt.report.history import history_of
from ray_accel_ckpt.report.page import duration, nbytes, page
from tests.report.browser import browse
from tests.report.runs import attempt, event, run

_KINDS = ("start", "resumed", "heartbeat", "save", "durable", "end")


def _page(where: str = "s3://bucket/run") -> str:
    return page(history_of(run(), where=where), run=where)


def _text(dom: str, name: str) -> str:
    found = re.search(rf'id="{name}"[^>]*>([^<]*)<', dom)
    assert found is not None, name
    return found[1]


def _count(picture: Path, colour: str) -> int:
    pixels = (matplotlib.image.imread(picture)[..., :3] * 255).round().astype(int)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((abs(pixels - wanted).max(axis=-1) <= 2).sum())


def test_a_browser_shows_the_page(tmp_path: Path) -> None:
    dom = browse(tmp_path, _page(), "--dump-dom")
    history = history_of(run(), where="")
    assert history.spent.goodput is not None
    assert _text(dom, "goodput") == f"{100 * history.spent.goodput:.1f} %"
    assert (_text(dom, "steps"), _text(dom, "attempts"), _text(dom, "lost")) == ("400", "3", "90")
    table = dom[dom.index('id="attempts-table"') :]
    assert table[: table.index("</table>")].count("<tr>") == 4
    assert dom.count("<svg") == 2
    events = dom[dom.index('id="events"') :]
    assert events[: events.index("</table>")].count("<tr>") == len(run()) + 1


def test_a_browser_draws_the_timeline(tmp_path: Path) -> None:
    shot = tmp_path / "shot.png"
    browse(tmp_path, _page(), f"--screenshot={shot}", "--window-size=1100,1900")
    for colour, least in ((NEW, 300), (AGAIN, 100), (SAVED, 100), (LOSS, 20), (NOTICE, 20)):
        assert _count(shot, colour) > least, colour


def test_the_timeline_is_not_down_between_a_finished_run_and_its_next_start() -> None:
    for end in (False, True):
        events = [
            *attempt("aaaaaa", 0, 0, 100, end=end),
            *attempt("bbbbbb", 500, 100, 150, tier="storage"),
        ]
        [axes] = timeline(history_of(events, where="")).axes
        assert ("down" in axes.get_legend_handles_labels()[1]) is not end


def test_a_long_run_is_drawn_without_looking_for_the_best_place_of_a_legend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """matplotlib looks at each point for it, and warns that this is slow."""

    def looked(*arguments: object) -> None:
        raise AssertionError("the best place is looked for")

    monkeypatch.setattr(Legend, "_find_best_position", looked)
    assert "</html>" in _page()


def test_nothing_in_it_comes_from_elsewhere_or_runs() -> None:
    hostile = event(150, "failure", "controller", errors={"2": "E: <script>alert(1)</script>"})
    events = [each for each in run() if each.kind != "failure"]
    html = page(history_of([*events, hostile], where=""), run="s3://bucket/<run>&")
    assert "s3://bucket/&lt;run&gt;&amp;" in html
    assert html.count("&lt;script&gt;alert(1)") == 2
    assert "<script" not in html
    # Names of namespaces are no addresses that anything is read from.
    outside = re.findall(r'(?:src|href)="(?!#)([^"]*)"', html)
    assert outside == []
    assert "@import" not in html


def test_a_page_of_a_journal_that_makes_no_sense_is_still_one(tmp_path: Path) -> None:
    strange = {"step": 2**62, "name": ["x"], "seconds": 1e300, "share_nbytes": "x", "blocked": -1}
    events = [event(5 * n, kind, "aaaaaa", **strange) for n, kind in enumerate(_KINDS)]
    html = page(history_of(events, where=""), run="x\udcff")
    assert "<svg" in html
    zero = [event(0, "start", "aaaaaa"), event(1, "save", "aaaaaa", name="x", blocked=0)]
    assert "<svg" in page(history_of(zero, where=""), run="x")


def test_the_same_run_makes_the_same_page() -> None:
    assert _page() == _page()


def test_the_timeline_alone_is_a_picture(tmp_path: Path) -> None:
    (tmp_path / "timeline.png").write_bytes(png(timeline(history_of(run(), where=""))))
    assert _count(tmp_path / "timeline.png", AGAIN) > 100
    quiet = png(timeline(history_of(attempt("aaaaaa", 0, 0, 100), where="")))
    assert matplotlib.image.imread(io.BytesIO(quiet)).shape[:2] == (630, 1500)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.03123, "0.0312 s"),
        (12.34, "12.3 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
        (273600, "3 d 04 h"),
        (None, "-"),
    ],
)
def test_durations_are_for_readers(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_bytes_are_for_readers() -> None:
    assert [nbytes(n) for n in (None, 12, 1234, 5_600_000, 7_890_000_000)] == [
        "-",
        "12 B",
        "1.23 kB",
        "5.6 MB",
        "7.89 GB",
    ]
