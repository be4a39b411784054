"""Files for clusters: they parse, and every field that they set exists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_ray.config.load import load_dict
from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.serve.metrics import COUNTERS, GAUGES, HISTOGRAMS

CLUSTER = Path(__file__).parents[3] / "cluster"


def serve_config(name: str) -> dict[str, Any]:
    text = (CLUSTER / name).read_text()
    found = yaml.safe_load(text)
    return yaml.safe_load(found["spec"]["serveConfigV2"]) if found.get("kind") == "RayService" else found  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["serve.yaml", "rayservice.yaml"])
def test_serve_takes_the_file_and_we_take_its_arguments(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(serve_config(name))
    (application,) = schema.applications
    assert application.import_path == "rlhf_ray.serve.app:build"
    config = load_dict(ServeConfig, application.args)
    assert config.api_keys is not None and config.host == schema.http_options.host
    assert schema.http_options.request_timeout_s > config.limits.request_timeout_s


def test_the_ray_service_has_what_kuberay_needs() -> None:
    spec = yaml.safe_load((CLUSTER / "rayservice.yaml").read_text())["spec"]
    cluster = spec["rayClusterConfig"]
    assert cluster["rayVersion"] == "2.60.0" and cluster["authOptions"]["mode"] == "token"
    # KubeRay's operator deploys through the head's dashboard; networkpolicy.yaml and the token keep others out.
    assert cluster["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "0.0.0.0"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] and container["volumeMounts"][0]["mountPath"] == "/shared"


def test_the_dashboard_uses_metrics_that_are_exported() -> None:
    panels = json.loads((CLUSTER / "grafana_serving.json").read_text())["panels"]
    used = {
        name
        for evaluation in panels
        for t in evaluation["targets"]
        for name in re.findall(r"ray_rlhf_ray_(\w+)", t["expr"])
    }
    exported = {f"{name}_total" for name in COUNTERS} | {*GAUGES} | {f"{name}_bucket" for name in HISTOGRAMS}
    assert used <= exported and len(panels) >= 8
