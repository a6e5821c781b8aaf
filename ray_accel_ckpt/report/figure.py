"""Pictures of a run: its timeline, and how long saves and restores took."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from ray_accel_ckpt.errors import ConfigurationError
from ray_accel_ckpt.report.history import Attempt, History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEW, AGAIN, DOWN, LOSS, NOTICE, SAVED = (
    "#2563eb",
    "#f59e0b",
    "#e5e7eb",
    "#dc2626",
    "#a855f7",
    "#059669",
)
_UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


def timeline(history: History) -> Figure:
    """Steps over time: new ones and those made again, saves, losses, and when nothing ran."""
    figure = _figure(height=4.2)
    axes = figure.add_subplot()
    scale, unit = _unit(history.known - history.begun)

    def since(at: float) -> float:
        return (at - history.begun) / scale

    made = 0
    for attempt, down in zip(history.attempts, history.down, strict=True):
        if down:
            heard = attempt.begun - attempt.restoring - down
            axes.axvspan(since(heard), since(attempt.begun), color=DOWN, lw=0, label="down")
        _steps(axes, attempt, made, since)
        _saves(axes, attempt, since)
        if attempt.ending not in ("finished", ""):
            axes.plot(
                since(attempt.known), attempt.last, "x", color=LOSS, ms=9, mew=2.2, label="lost"
            )
        made = max(made, attempt.last)
    for event in history.events:
        if event.kind == "notice":
            axes.axvline(
                since(event.at), color=NOTICE, ls=":", lw=1.4, label="notice of preemption"
            )
    axes.set_xlabel(f"{unit} since the run began")
    axes.set_ylabel("step")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    _legend(axes)
    return figure


def durations(history: History) -> Figure:
    """How long each save stalled training and took to be durable, and each restore."""
    figure = _figure(height=3.2)
    axes = figure.add_subplot()
    scale, unit = _unit(history.known - history.begun)
    saves = history.saves
    at = [(save.at - history.begun) / scale for save in saves]
    waited = [save.blocked for save in saves]
    durable = [(t, s.durable) for t, s in zip(at, saves, strict=True) if s.durable is not None]
    whole = [seconds for _, seconds in durable]
    restores = [a for a in history.attempts if a.resumed_from is not None]
    restored = [attempt.restoring for attempt in restores]
    axes.plot(at, waited, ".", color=NEW, ms=7, label="save: training waited")
    axes.plot(
        [t for t, _ in durable],
        whole,
        "o",
        mfc="none",
        color=SAVED,
        ms=6,
        label="save: durable after",
    )
    axes.plot(
        [(attempt.begun - history.begun) / scale for attempt in restores],
        restored,
        "D",
        color=AGAIN,
        ms=6,
        label="restore",
    )
    if max([*waited, *whole, *restored], default=0.0) > 0:
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xlim(0, max((history.known - history.begun) / scale, 1e-9))
    axes.set_xlabel(f"{unit} since the run began")
    axes.set_ylabel("seconds")
    _legend(axes)
    return figure


def svg(figure: Figure) -> str:
    """As an element of a page: no header of its own, and the same text each time."""
    import matplotlib

    data = io.StringIO()
    # Names inside would be drawn at random otherwise.
    with matplotlib.rc_context({"svg.hashsalt": "ray_accel_ckpt"}):
        figure.savefig(data, format="svg", metadata={"Date": None, "Creator": None})
    return data.getvalue()[data.getvalue().index("<svg") :]


def png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    return data.getvalue()


def _steps(axes: Axes, attempt: Attempt, made: int, since: Any) -> None:
    times = [since(at) for at, _ in attempt.points]
    steps = [step for _, step in attempt.points]
    turn = since(attempt.reached(made)) if attempt.first < made else times[0]
    height = min(made, attempt.last) if attempt.first < made else steps[0]
    old = [(t, s) for t, s in zip(times, steps, strict=True) if s < height]
    new = [(t, s) for t, s in zip(times, steps, strict=True) if s >= height]
    if attempt.first < made:
        old.append((turn, height))
        new = [(turn, height), *new] if attempt.last > made else []
        axes.plot(*zip(*old, strict=True), color=AGAIN, lw=2, label="steps made again")
    if new:
        axes.plot(*zip(*new, strict=True), color=NEW, lw=2, label="new steps")


def _saves(axes: Axes, attempt: Attempt, since: Any) -> None:
    for durable in (True, False):
        chosen = [save for save in attempt.saves if (save.durable is not None) is durable]
        axes.plot(
            [since(save.at) for save in chosen],
            [save.step for save in chosen],
            "o",
            color=SAVED,
            mfc=SAVED if durable else "none",
            ms=5,
            label="saved" if durable else "save that was not finished",
        )


def _figure(*, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ConfigurationError(
            "a report needs matplotlib, which is not installed",
            why=str(e),
            remedy="pip install 'ray_accel_ckpt[report]'",
        ) from e
    return Figure(figsize=(10, height), layout="constrained")


def _legend(axes: Axes) -> None:
    """Each label once, and none of what is not there.

    Above the axes: among the points of a long run, the best place takes minutes to find.
    """
    handles: dict[str, Any] = {}
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        drawn = not hasattr(handle, "get_xdata") or len(handle.get_xdata())
        if drawn:
            handles.setdefault(label, handle)
    if handles:
        axes.legend(
            handles.values(),
            handles.keys(),
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=4,
            frameon=False,
            fontsize=9,
        )
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _unit(seconds: float) -> tuple[float, str]:
    """The largest unit of which there are two."""
    return next(((s, name) for s, name in _UNITS if seconds >= 2 * s), _UNITS[-1])
