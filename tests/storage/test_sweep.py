"""What is swept out of a run's directory, and what never is."""

from __future__ import annotations

import errno
import json
import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_accel_ckpt.errors import CheckpointError, NotACheckpointError
from ray_accel_ckpt.runtime import sweep
from ray_accel_ckpt.runtime.record import SNAPSHOT, Record, read_record
from ray_accel_ckpt.runtime.sweep import Orphan, Sweeper, look, remove, sweep_run
from ray_accel_ckpt.storage.catalog import checkpoint_name, open_snapshot
from ray_accel_ckpt.storage.fakes import (
    Fault,
    FaultyFilesystem,
    MemoryFilesystem,
    RecordingFilesystem,
    replay,
)
from ray_accel_ckpt.storage.filesystem import Filesystem, LocalFilesystem
from ray_accel_ckpt.storage.writer import write_image
from tests.helpers_image import RUN, edited, small_image

EARLIER, PRESENT = "aaaaaa", "bbbbbb"
MANIFEST, OTHER_MANIFEST = "manifest-00000-of-00002.json", "manifest-00001-of-00002.json"
SHARD = "shard-00000-of-00002.safetensors"


def _saved(filesystem: Filesystem, step: int, attempt: str = EARLIER, *, ranks: int = 2) -> str:
    """A checkpoint of two ranks of which so many came to their end; its name."""
    name = checkpoint_name(step, attempt)
    for rank in range(ranks):
        image = small_image(step, rank=rank, world_size=2)
        write_image(filesystem, f"{RUN}/{name}", image, timeout=1.0)
    return name


def _record(*names: str, pending: tuple[str, ...] = (), validated: tuple[str, ...] = ()) -> bytes:
    """Ray's record of these checkpoints, the last of them its latest."""
    results = [{"version": 0, "checkpoint_dir_name": name, "metrics": {}} for name in names]
    state = {
        "ray_version": "2",
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(names))),
        "latest_checkpoint_result": results[-1] if results else None,
        "pending_training_results": [{"checkpoint_dir_name": name} for name in pending],
        "pending_validation_specs": [True for _ in pending],
        "current_report_index": len(names),
        "validated_checkpoint_dir_names": list(validated),
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
    return json.dumps(state).encode()


def _register(memory: MemoryFilesystem, *names: str, **others: Any) -> Record:
    memory.files[f"{RUN}/{SNAPSHOT}"] = _record(*names, **others)
    record = read_record(memory, RUN)
    assert record is not None
    return record


def _directories(filesystem: Filesystem) -> set[str]:
    return {entry.name for entry in filesystem.list(RUN) if entry.nbytes is None}


def _orphans(filesystem: Filesystem, record: Record, **options: Any) -> dict[str, bool]:
    found = look(filesystem, RUN, record, **options)
    return {orphan.name: orphan.whole for orphan in found.orphans}


# --- which ---------------------------------------------------------------------------------


def test_what_ray_names_is_never_an_orphan(memory: MemoryFilesystem) -> None:
    best, latest = _saved(memory, 8), _saved(memory, 12)
    pending, validated = _saved(memory, 4), _saved(memory, 3)
    torn = _saved(memory, 5, ranks=1)
    record = _register(memory, best, torn, latest, pending=(pending,), validated=(validated,))
    assert look(memory, RUN, record) == sweep.Found()


def test_saves_that_never_became_whole_are_orphans_newer_ones_too(memory: MemoryFilesystem) -> None:
    latest = _saved(memory, 12)
    older, newer = _saved(memory, 8, ranks=1), _saved(memory, 16, ranks=1)
    cut_off = checkpoint_name(20, EARLIER)
    memory.files[f"{RUN}/{cut_off}/.{SHARD}.1f2e3d4c.partial"] = b"half"
    assert _orphans(memory, _register(memory, latest)) == dict.fromkeys(
        (older, newer, cut_off), False
    )


def test_saves_of_an_attempt_that_lives_are_no_orphans(memory: MemoryFilesystem) -> None:
    latest = _saved(memory, 12)
    _saved(memory, 8, PRESENT)
    _saved(memory, 16, PRESENT, ranks=1)
    _saved(memory, 16, f"{PRESENT}01", ranks=1)
    record = _register(memory, latest)
    assert look(memory, RUN, record, living={PRESENT}) == sweep.Found()
    assert len(_orphans(memory, record)) == 3


def test_whole_ones_are_orphans_once_a_newer_one_is_registered(memory: MemoryFilesystem) -> None:
    before, adopted = _saved(memory, 12), _saved(memory, 16)
    found = look(memory, RUN, _register(memory, before))
    assert (found.orphans, found.adopted) == ((), (adopted,))
    after = _saved(memory, 20, PRESENT)
    assert _orphans(memory, _register(memory, before, after)) == {adopted: True}


def test_what_was_resumed_from_stays_until_this_attempt_has_one(memory: MemoryFilesystem) -> None:
    """Ray's latest was damaged, and the run went back behind it."""
    resumed_from, latest = _saved(memory, 8), _saved(memory, 12)
    options = {"living": {PRESENT}, "resumed_from": f"{RUN}/{resumed_from}"}
    assert _orphans(memory, _register(memory, latest), **options) == {}
    after = _saved(memory, 12, PRESENT)
    assert _orphans(memory, _register(memory, latest, after), **options) == {resumed_from: True}


def test_without_a_record_whole_ones_stay(memory: MemoryFilesystem) -> None:
    whole, torn = _saved(memory, 8), _saved(memory, 12, ranks=1)
    record = read_record(memory, RUN)
    assert record is not None
    found = look(memory, RUN, record)
    assert found.orphans == (Orphan(path=f"{RUN}/{torn}", whole=False),)
    assert found.adopted == (whole,)


def test_what_is_not_ours_is_no_orphan(memory: MemoryFilesystem) -> None:
    latest = _saved(memory, 12)
    ours = _saved(memory, 8, ranks=1)
    for path in (
        "checkpoint_best/model.pt",
        "checkpoint_00000004/model.pt",
        f"checkpoint_4_{EARLIER}/{SHARD}",
        f"checkpoint_00000005_{EARLIER}/model.pt",
        f"checkpoint_00000006_{EARLIER}",
        f"{ours}/notes/why.txt",
    ):
        memory.files[f"{RUN}/{path}"] = b"mine"
    assert _orphans(memory, _register(memory, latest)) == {}


def test_a_newer_format_is_left_alone(memory: MemoryFilesystem) -> None:
    newer, latest = _saved(memory, 8), _saved(memory, 12)
    name = f"{RUN}/{newer}/{MANIFEST}"
    memory.files[name] = edited(memory.files[name], lambda body: body.update(version=99))
    assert look(memory, RUN, _register(memory, latest)) == sweep.Found()


# --- removing ------------------------------------------------------------------------------


def _opens(filesystem: Filesystem, name: str) -> bool:
    """Whether it is whole. Anything but whole or no checkpoint at all is an error."""
    try:
        open_snapshot(filesystem, f"{RUN}/{name}")
    except NotACheckpointError:
        return False
    return True


STATES = st.sampled_from(["registered", "whole", "torn", "present", "mine", "absent"])


@settings(max_examples=40, deadline=None)
@given(states=st.lists(STATES, min_size=1, max_size=6))
def test_cut_off_anywhere_it_takes_nothing_that_is_used_and_is_finished_later(
    states: list[str],
) -> None:
    memory = MemoryFilesystem()
    names: dict[str, list[str]] = {state: [] for state in (*states, "registered", "whole", "mine")}
    for step, state in enumerate(states, 1):
        attempt = PRESENT if state == "present" else EARLIER
        if state == "mine":
            memory.files[f"{RUN}/checkpoint_{step}/mine.txt"] = b"mine"
            names[state].append(f"checkpoint_{step}")
        elif state != "absent":
            ranks = 1 if state in ("torn", "present") else 2
            names[state].append(_saved(memory, step, attempt, ranks=ranks))
    record = _register(memory, *names["registered"])
    before = dict(memory.files)
    newer = {n for n in names["whole"] if int(n.split("_")[1]) > record.step}
    used = {*names["registered"], *names.get("present", ()), *names["mine"], *newer}

    recording = RecordingFilesystem(memory)
    for orphan in look(recording, RUN, record, living={PRESENT}).orphans:
        remove(recording, orphan)
    assert _directories(memory) == used
    for cut in range(len(recording.operations) + 1):
        left = replay(recording.operations[:cut], onto=before)
        for name in used:
            files = {path: b for path, b in before.items() if path.startswith(f"{RUN}/{name}/")}
            assert files.items() <= left.files.items()
        for name in (*names["whole"], *names.get("torn", ())):
            if _opens(left, name):
                assert left.files.items() >= {
                    (path, b) for path, b in before.items() if path.startswith(f"{RUN}/{name}/")
                }
        for orphan in look(left, RUN, record, living={PRESENT}).orphans:
            remove(left, orphan)
        assert left.files == memory.files


def test_on_a_disk_nothing_of_it_is_left(tmp_path: Path) -> None:
    disk = LocalFilesystem()
    directory = tmp_path / "run" / checkpoint_name(8, EARLIER)
    write_image(disk, str(directory), small_image(8, rank=0, world_size=2), timeout=1.0)
    (directory / f".{SHARD}.1f2e3d4c.partial").write_bytes(b"half")
    empty = tmp_path / "run" / checkpoint_name(9, EARLIER)
    empty.mkdir()
    would = sweep_run(tmp_path, "run", dry_run=True)
    assert [(o.name, o.why) for o in would] == [
        (each.name, "it never became whole") for each in (empty, directory)
    ]
    assert directory.exists()
    assert sweep_run(tmp_path, "run") == would
    assert list((tmp_path / "run").iterdir()) == []
    assert sweep_run(tmp_path, "run") == ()


def test_nothing_is_swept_by_a_record_that_cannot_be_understood(tmp_path: Path) -> None:
    orphan = tmp_path / "run" / checkpoint_name(8, EARLIER) / SHARD
    orphan.parent.mkdir(parents=True)
    orphan.touch()
    whole = _record("a", "b")
    for length in range(len(whole)):
        (tmp_path / "run" / SNAPSHOT).write_bytes(whole[:length])
        assert sweep_run(tmp_path, "run") == ()
    (tmp_path / "run" / SNAPSHOT).write_bytes(whole)
    assert len(sweep_run(tmp_path, "run")) == 1


@pytest.mark.parametrize("gone", [None, SHARD, MANIFEST])
def test_what_is_whole_stays_while_rays_latest_is_not_good(
    tmp_path: Path, gone: str | None
) -> None:
    for step, attempt in ((10, EARLIER), (20, PRESENT)):
        for rank in range(2):
            image = small_image(step, rank=rank, world_size=2)
            path = tmp_path / "run" / checkpoint_name(step, attempt)
            write_image(LocalFilesystem(), str(path), image, timeout=1.0)
    cut_off = tmp_path / "run" / checkpoint_name(15, EARLIER)
    cut_off.mkdir()
    (tmp_path / "run" / SNAPSHOT).write_bytes(_record(path.name))
    if gone is not None:
        (path / gone).unlink()
    swept = [checkpoint_name(15, EARLIER)] + [checkpoint_name(10, EARLIER)] * (gone is None)
    assert [orphan.name for orphan in sweep_run(tmp_path, "run")] == swept


# --- beside training -----------------------------------------------------------------------


@dataclass
class _Run:
    filesystem: Filesystem
    path: str = RUN


def _sweeper(
    filesystem: Filesystem, *, resumed_from: str | None = None, registered: str | None = None
) -> Sweeper:
    run: Any = _Run(filesystem)
    path = None if resumed_from is None else f"{RUN}/{resumed_from}"
    return Sweeper(run, living={PRESENT}, resumed_from=path, registered=registered)


def _run(sweeper: Sweeper) -> None:
    sweeper.start()
    for thread in threading.enumerate():
        if thread.name == "ray_accel_ckpt-sweeper":
            thread.join()


def test_a_run_that_adopted_a_checkpoint(memory: MemoryFilesystem) -> None:
    latest, adopted = _saved(memory, 8), _saved(memory, 12)
    torn = _saved(memory, 16, ranks=1)
    _register(memory, latest)
    recording = RecordingFilesystem(memory)
    sweeper = _sweeper(recording, resumed_from=adopted, registered=latest)
    _run(sweeper)
    assert _directories(memory) == {latest, adopted}, torn
    first = _saved(memory, 16, PRESENT)
    _run(sweeper)
    assert _directories(memory) == {latest, adopted, first}
    _register(memory, latest, first)
    _run(sweeper)
    assert _directories(memory) == {latest, first}
    # A worker that was thought dead.
    _saved(memory, 16, ranks=1)
    _run(sweeper)
    assert _directories(memory) == {latest, first}
    _run(sweeper)
    reads = len(recording.reads)
    _run(sweeper)
    assert len(recording.reads) == reads, "nothing is left, and it looks all the same"


def test_a_save_that_comes_back_after_a_clean_look(memory: MemoryFilesystem) -> None:
    latest = _saved(memory, 8)
    _register(memory, latest)
    sweeper = _sweeper(memory, resumed_from=latest, registered=latest)
    _run(sweeper)
    _saved(memory, 12, ranks=1)
    _run(sweeper)
    assert _directories(memory) == {latest}


def test_what_ray_is_about_to_delete_is_left_to_ray(memory: MemoryFilesystem) -> None:
    evicted, latest = _saved(memory, 4), _saved(memory, 8)
    registered = latest
    sweeper = _sweeper(memory, resumed_from=latest, registered=registered)
    # Before the first look: Ray has registered one, and written that `evicted` is gone.
    new = _saved(memory, 12, PRESENT)
    _register(memory, latest, new)
    for _ in range(3):
        _run(sweeper)
    assert evicted in _directories(memory)
    # Between two looks.
    _register(memory, evicted, latest)
    sweeper = _sweeper(memory, resumed_from=latest, registered=registered)
    _run(sweeper)
    _register(memory, latest, new)
    for _ in range(3):
        _run(sweeper)
    assert evicted in _directories(memory)
    # In the middle of a deletion that began before the attempt.
    sweeper = _sweeper(memory, resumed_from=new, registered=new)
    _run(sweeper)
    assert evicted in _directories(memory)
    _run(sweeper)
    assert evicted in _directories(memory), "the latest is of an attempt that lives"


def test_a_record_that_should_be_there_and_is_not(memory: MemoryFilesystem) -> None:
    latest, torn = _saved(memory, 8), _saved(memory, 12, ranks=1)
    sweeper = _sweeper(memory, resumed_from=latest, registered=latest)
    for record in (None, b"", _record(latest)[:-1]):
        if record is not None:
            memory.files[f"{RUN}/{SNAPSHOT}"] = record
        _run(sweeper)
        assert torn in _directories(memory)
    _register(memory, latest)
    _run(sweeper)
    assert _directories(memory) == {latest}


@pytest.mark.usefixtures("no_waits")
@pytest.mark.parametrize("operation", ["list", "read_into", "delete"])
def test_storage_that_refuses_costs_a_warning_and_is_tried_again(
    memory: MemoryFilesystem, caplog: pytest.LogCaptureFixture, operation: Any
) -> None:
    latest = _saved(memory, 4)
    torn = {_saved(memory, step, ranks=1) for step in (8, 12)}
    _register(memory, latest)
    refused = Fault(PermissionError(errno.EACCES, "no"), operation=operation)
    sweeper = _sweeper(FaultyFilesystem(memory, refused), registered=latest)
    with caplog.at_level(logging.WARNING):
        _run(sweeper)
    assert "will be tried again" in caplog.text
    left = _directories(memory) & torn
    assert len(left) == (1 if operation == "delete" else 2)
    _run(sweeper)
    assert _directories(memory) == {latest}


def test_one_look_at_a_time(memory: MemoryFilesystem) -> None:
    looking, go_on = threading.Event(), threading.Event()

    class Slow(MemoryFilesystem):
        lists = 0

        def list(self, path: str) -> Any:
            Slow.lists += 1
            looking.set()
            go_on.wait()
            return super().list(path)

    sweeper = _sweeper(Slow())
    sweeper.start()
    looking.wait()
    sweeper.start()
    sweeper.start()
    assert Slow.lists == 1
    go_on.set()
    _run(sweeper)


def test_a_damaged_one_is_treated_as_a_whole_one(memory: MemoryFilesystem) -> None:
    damaged, latest = _saved(memory, 8), _saved(memory, 12)
    del memory.files[f"{RUN}/{damaged}/{SHARD}"]
    with pytest.raises(CheckpointError, match="a shard is not there in full"):
        open_snapshot(memory, f"{RUN}/{damaged}")
    record = _register(memory, latest)
    assert _orphans(memory, record) == {damaged: True}
    sweeper = _sweeper(memory, resumed_from=latest, registered=latest)
    _run(sweeper)
    assert damaged in _directories(memory)
    _run(sweeper)
    assert damaged not in _directories(memory)
