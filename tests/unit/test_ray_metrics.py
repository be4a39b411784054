"""A run's figures on Ray's metrics port. That they arrive there: tests/integration/cluster."""

from __future__ import annotations

import json
import re
from pathlib import Path

from rlhf_ray.metrics import METRICS, MetricsWriter
from rlhf_ray.ray_metrics import FIGURES, MEMORY, OTHERS, PHASES, PREFIX, ROLES, RunGauges, metric_tag, on_ray


def test_every_figure_is_a_metric_that_there_is() -> None:
    names = [metric for metric, _ in FIGURES.values()] + [f"time/{phase}" for phase in PHASES]
    names += [f"time/idle_{role}" for role in ROLES] + [f"memory/{name}" for name in MEMORY.values()]
    assert set(names) <= METRICS.keys()
    assert not FIGURES.keys() & OTHERS.keys()


def test_without_ray_there_are_no_gauges(tmp_path: Path) -> None:
    assert not on_ray()
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"reward/mean": 0.5})
        assert writer._trackers == []


def test_the_dashboard_asks_for_figures_that_there_are() -> None:
    panels = json.loads((Path(__file__).parents[2] / "cluster" / "grafana_training.json").read_text())["panels"]
    asked = {n for p in panels for t in p["targets"] for n in re.findall(rf"ray_{PREFIX}(\w+)", t["expr"])}
    assert asked <= FIGURES.keys() | OTHERS.keys() and len(panels) >= 8


def test_names_of_any_script_become_tags() -> None:
    """Ray's metrics take ASCII alone: a run whose folder is called été ended in a UnicodeEncodeError at its first figure."""
    assert metric_tag("run 1") == "run 1" and metric_tag("été") == r"\xe9t\xe9"
    gauges = RunGauges("été")
    gauges.write(1, {"loss": 0.5, "time/update": 0.1})
