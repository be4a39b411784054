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


def test_the_dashboard_shows_every_metric_by_tags_that_it_has() -> None:
    """Hit rate, waiting rows and stalls were counted, and shown nowhere."""
    panels = json.loads((CLUSTER / "grafana_serving.json").read_text())["panels"]
    expressions = [t["expr"] for panel in panels for t in panel["targets"]]
    exported = {f"{name}_total": tags for name, (_, tags) in COUNTERS.items()}
    exported |= {name: tags for name, (_, tags) in GAUGES.items()}
    exported |= {f"{name}_bucket": (*tags, "le") for name, (_, tags) in HISTOGRAMS.items()}
    shown = set[str]()
    for expression in expressions:
        names = re.findall(r"ray_rlhf_ray_(\w+)", expression)
        labels = re.findall(r"by \((\w+)\)", expression) + re.findall(r"[{,](\w+)=", expression)
        assert all({*labels} <= {*exported[name], "replica"} for name in names), expression
        shown.update(names)
    assert shown == exported.keys()
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len({panel["id"] for panel in panels}) == len(set(places)) == len(panels)


def test_nginx_bounds_what_the_proxy_leaves_open() -> None:
    """Ray's proxy reads a header without end, waits for slow ones and idle connections, and keeps metrics for every path."""
    text = "\n".join(line.partition("#")[0] for line in (CLUSTER / "nginx.conf").read_text().splitlines())
    assert text.count("{") == text.count("}")
    said = {words[0]: words[1:] for line in re.split(r"[;{}]", text) if (words := line.split())}
    limits = ServeConfig(output_dir="x", model_name_or_path="x").limits
    seconds = {name: int(said[name][0].removesuffix("s")) for name in said if name.endswith("_timeout")}
    assert seconds["client_header_timeout"] <= 10 and seconds["keepalive_timeout"] <= 60
    assert seconds["client_body_timeout"] <= limits.body_timeout_s
    assert seconds["proxy_read_timeout"] > limits.request_timeout_s
    assert said["large_client_header_buffers"] == ["4", "8k"] and said["client_max_body_size"] == ["1m"]
    assert limits.max_body_bytes <= 1 << 20 and said["proxy_buffering"] == ["off"]
    assert {"limit_conn", "limit_req", "ssl_certificate", "send_timeout"} <= said.keys()
    for header in ("X-Request-Timeout-Seconds", "X-Request-Disconnect-Disabled", "Serve-Multiplexed-Model-Id"):
        assert f'proxy_set_header {header} "";' in text, "any client could send it to Serve"


def test_nginx_lets_through_every_route_of_the_service_and_nothing_else(tmp_path: Path) -> None:
    from rlhf_ray.serve.api import HttpApi

    text = (CLUSTER / "nginx.conf").read_text()
    exact = set(re.findall(r"location = (\S+) \{ proxy_pass", text))
    patterns = re.findall(r"location ~ (\S+) \{ proxy_pass", text)

    def passes(path: str) -> bool:
        return path in exact or any(re.search(pattern, path) for pattern in patterns)

    api: Any = HttpApi(ServeConfig(output_dir=str(tmp_path), model_name_or_path="x"), None)  # type: ignore[arg-type]
    routes = {route.path.replace("{model:path}", "helper@v3-0a1b2c3d") for route in api.app.app.routes}
    assert len(routes) > 8 and [path for path in routes if not passes(path)] == []
    assert not any(
        map(passes, ("/x", "/v1/", "/v1/models/a/b", "/v1/chat/completions/x", "/-/routes", "//", "/v1/score/x"))
    )
