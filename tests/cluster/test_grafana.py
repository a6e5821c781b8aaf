"""The dashboard asks Prometheus for what workers export. That they do: tests/ray/test_events.py."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from ray_accel_ckpt.runtime.metrics import ALL
from tests.cluster.files import CLUSTER

DASHBOARD: dict[str, Any] = json.loads((CLUSTER / "grafana.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
EXPORTED = {name for metric in ALL for name in metric.exported}
TAGS = {"run", "rank", "le", *(tag for metric in ALL for tag in metric.tags)}


def _expressions() -> list[str]:
    return [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_every_metric_that_is_asked_for_is_exported() -> None:
    variables = [each["query"] for each in DASHBOARD["templating"]["list"]]
    for expression in [*_expressions(), *variables]:
        asked = re.findall(r"\bray_\w+", expression)
        assert set(asked) <= EXPORTED, expression
    assert all(re.search(r"\bray_\w+", expression) for expression in _expressions())


def test_every_metric_is_shown() -> None:
    text = " ".join(_expressions())
    for metric in ALL:
        assert any(name in text for name in metric.exported), metric.name


def test_panels_group_by_tags_that_there_are_and_choose_runs() -> None:
    for expression in _expressions():
        for tags in re.findall(r"by \(([^)]*)\)", expression):
            assert set(re.split(r",\s*", tags)) <= TAGS, expression
        assert '{run=~"$run"}' in expression


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: str(panel["title"]))
def test_a_panel_has_what_grafana_needs(panel: dict[str, Any]) -> None:
    assert panel["type"] == "timeseries"
    assert panel["datasource"]["uid"] == "${datasource}"
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert {target["refId"] for target in panel["targets"]} == {
        chr(65 + n) for n in range(len(panel["targets"]))
    }


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
