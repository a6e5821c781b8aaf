"""`ray-accel-ckpt report`: what happened in a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.commands import document, refused, told
from tests.report import runs

SECOND = ("step", "150,", "storage", 4, 2, "s", "150-300", 90, 3, "lost")


@pytest.fixture
def lost(tmp_path: Path) -> Path:
    """A run of three attempts."""
    return runs.write(tmp_path / "run")


def test_attempts_and_times_are_told(lost: Path) -> None:
    lines = told("report", lost).splitlines()
    assert lines[0] == f"{lost}: 3 attempts, step 400"
    assert lines[1] == "from 2026-09-21 14:13:20 to 2026-09-21 14:19:20 UTC"
    (second,) = (line for line in lines if line.startswith("bbbbbb"))
    assert second.split()[3:] == list(map(str, SECOND))
    (first,) = (line for line in lines if line.startswith("aaaaaa"))
    assert "failed: rank 2: ActorDiedError" in first
    assert any(line.startswith("down, until the workers were there again") for line in lines)


def test_the_same_is_told_as_json(lost: Path) -> None:
    found = document("report", lost)
    assert [attempt["writer"] for attempt in found["attempts"]] == ["aaaaaa", "bbbbbb", "cccccc"]
    assert found["lost"] == [90, 0]
    assert found["steps"] == 400
    assert 0 < found["goodput"] < 1
    assert found["written"] == []


def test_files_are_written_that_are_asked_for(lost: Path, tmp_path: Path) -> None:
    page, picture = tmp_path / "out.html", tmp_path / "out.png"
    found = document("report", lost, "--html", page, "--png", picture)
    assert found["written"] == [str(page), str(picture)]
    assert str(lost) in page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_run_that_wrote_nothing_down_says_so(tmp_path: Path) -> None:
    assert "nothing is written down" in refused("report", tmp_path)


def test_a_place_that_cannot_be_written_is_an_error(lost: Path, tmp_path: Path) -> None:
    assert "no-such" in refused("report", lost, "--html", tmp_path / "no-such" / "out.html")


@pytest.mark.parametrize("option", ["--html", "--png"])
def test_a_page_is_written_to_this_machine_alone(lost: Path, option: str) -> None:
    said = refused("report", lost, option, "s3://b/out")
    assert "must be a local path, not 's3://b/out'" in said
