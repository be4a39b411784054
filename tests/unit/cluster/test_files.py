"""The files of `cluster/`: they parse, they set only fields that exist, they are as safe as they say, and jobs fit on them."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_ray.config.load import load_any
from rlhf_ray.launch.preflight import check
from rlhf_ray.launch.resources import Node, role_requests

ROOT = Path(__file__).parents[3]
CLUSTER = ROOT / "cluster"
README = CLUSTER / "README.md"

# The fields of KubeRay's CRDs (ray.io/v1), after its Go types of 1.7 (those with tlsOptions and networkPolicy) without deprecated
# ones, and of what they hold of Kubernetes' own.
POD = {
    *("terminationGracePeriodSeconds", "automountServiceAccountToken", "securityContext", "tolerations", "containers"),
    *("volumes", "nodeSelector", "serviceAccountName", "imagePullSecrets", "initContainers", "affinity"),
}
CONTAINER = {
    *("name", "image", "imagePullPolicy", "ports", "env", "envFrom", "resources", "volumeMounts", "securityContext"),
    *("lifecycle", "command", "args", "livenessProbe", "readinessProbe"),
}
HEAD = {
    *(
        "rayStartParams",
        "template",
        "serviceType",
        "headService",
        "enableIngress",
        "ingressOptions",
        "resources",
        "labels",
    ),
}
WORKERS = {
    *("groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template"),
    *("scaleStrategy", "suspend", "idleTimeoutSeconds", "priority", "resources", "labels"),
}
RAY_CLUSTER = {
    *("rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "authOptions", "tlsOptions", "networkPolicy"),
    *(
        "gcsFaultToleranceOptions",
        "historyServerOptions",
        "headGroupSpec",
        "workerGroupSpecs",
        "headServiceAnnotations",
    ),
    *("upgradeStrategy", "suspend", "managedBy"),
}
RAY_JOB = {
    *("entrypoint", "runtimeEnvYAML", "submissionMode", "rayClusterSpec", "clusterSelector", "backoffLimit", "jobId"),
    *("shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "preRunningDeadlineSeconds"),
    *("deletionStrategy", "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "suspend", "metadata"),
    *("submitterPodTemplate", "submitterConfig", "managedBy"),
}
RAY_SERVICE = {
    *("serveConfigV2", "rayClusterConfig", "upgradeStrategy", "serveService", "excludeHeadPodFromServeSvc"),
    *("rayClusterDeletionDelaySeconds", "suspend", "managedBy"),
}
AUTH = {"mode", "secretName", "enableK8sTokenAuth"}
AUTOSCALER = {
    *("resources", "image", "imagePullPolicy", "env", "envFrom", "volumeMounts", "securityContext"),
    *("idleTimeoutSeconds", "upscalingMode", "version", "command", "args"),
}
KUBERAY = {"RayCluster": RAY_CLUSTER, "RayJob": RAY_JOB, "RayService": RAY_SERVICE}
LAUNCHER = {
    *("cluster_name", "provider", "auth", "available_node_types", "head_node_type", "max_workers", "min_workers"),
    *("upscaling_speed", "idle_timeout_minutes", "file_mounts", "initialization_commands", "setup_commands"),
    *("head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"),
    *("docker", "cluster_synced_files", "rsync_exclude", "rsync_filter"),
}


def kuberay(name: str) -> dict[str, Any]:
    found = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    assert found["apiVersion"] == "ray.io/v1" and set(found) == {"apiVersion", "kind", "metadata", "spec"}
    return found  # type: ignore[no-any-return]


def ray_cluster(found: dict[str, Any]) -> dict[str, Any]:
    spec = found["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["raycluster", "rayjob", "rayservice"])
def test_kuberay_files_set_only_fields_of_the_crds(name: str) -> None:
    found = kuberay(name)
    assert set(found["spec"]) <= KUBERAY[found["kind"]]
    cluster = ray_cluster(found)
    assert set(cluster) <= RAY_CLUSTER and set(cluster["authOptions"]) <= AUTH
    assert set(cluster.get("autoscalerOptions", {})) <= AUTOSCALER
    assert set(cluster["headGroupSpec"]) <= HEAD
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= WORKERS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "the CRD wants strings"
        pod = group["template"]["spec"]
        assert set(pod) <= POD
        for container in pod["containers"]:
            assert set(container) <= CONTAINER
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("name", ["raycluster", "rayjob", "rayservice"])
def test_kuberay_files_are_what_the_list_asks_for(name: str) -> None:
    """Token, ordinary user, time to save, shared volume, GPUs where GPUs are; no work on the head."""
    cluster = ray_cluster(kuberay(name))
    assert cluster["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] == 120
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] == 1000
        claims = [
            volume["persistentVolumeClaim"]["claimName"]
            for volume in pod["volumes"]
            if "persistentVolumeClaim" in volume
        ]
        assert claims == [yaml.safe_load((CLUSTER / "storage.yaml").read_text())["metadata"]["name"]]
        for container in pod["containers"]:
            asked = container["resources"]
            assert asked["limits"] == asked["requests"], "Ray counts limits, Kubernetes places by requests"
            if "nvidia.com/gpu" in asked["limits"]:
                assert {t["key"] for t in pod["tolerations"]} == {"nvidia.com/gpu"}
            values = [entry.get("value", "") for entry in container["env"]]
            assert not any("hf_" in value or "sk-" in value for value in values), "secrets come from Secret objects"


def test_the_ray_job_runs_a_job_file_that_is_there_and_waits_long_enough() -> None:
    spec = kuberay("rayjob")["spec"]
    (job,) = re.findall(r"/jobs/(\S+\.yaml)", spec["entrypoint"])
    assert (ROOT / "jobs" / job).is_file() and "resume=auto" in spec["entrypoint"]
    environment = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    _, config = load_any(ROOT / "jobs" / job, check_files=False)
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) > config.stop_grace_s  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["onprem_2x2a100", "aws"])
def test_launcher_files_hold_what_ray_up_takes(name: str) -> None:
    """Against the schema that comes with Ray."""
    import jsonschema
    import ray.autoscaler

    found = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    assert set(found) <= LAUNCHER
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(found, schema)
    for start in (*found["head_start_ray_commands"][1:], *found["worker_start_ray_commands"][1:]):
        assert "RAY_AUTH_MODE=token" in start and "--dashboard-host=0.0.0.0" not in start
        assert "RAY_AUTH_TOKEN=" not in start, "a token in a command line is read by everybody"


def machines(name: str) -> list[Node]:
    """What a cluster file gives Ray, all of it grown as far as it may."""
    if name == "onprem_2x2a100":
        found = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
        lines = [found["head_start_ray_commands"][1], *found["worker_start_ray_commands"][1:]]
        return [
            Node(f"{i}", {k.upper(): float(v) for k, v in re.findall(r"--num-(cpu|gpu)s=(\d+)", line)})
            for i, line in enumerate(lines)
        ]
    if name == "aws":
        types = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())["available_node_types"]
        return [Node(kind, dict(t["resources"])) for kind, t in types.items() for _ in range(t["max_workers"])]
    nodes = []
    for group in ray_cluster(kuberay(name))["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        each = {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))}
        nodes += [Node(group["groupName"], dict(each)) for _ in range(group["maxReplicas"])]
    return nodes


def named_jobs() -> Iterator[tuple[str, str]]:
    """(cluster file, job file) of every job that a cluster file names."""
    for path in sorted(CLUSTER.glob("*.yaml")):
        for job in sorted(set(re.findall(r"jobs/(\w+)\.yaml", path.read_text()))):
            yield path.stem, job


@pytest.mark.parametrize(("name", "job"), list(named_jobs()))
def test_every_resource_a_job_asks_for_is_in_the_cluster_file_that_names_it(name: str, job: str) -> None:
    _, config = load_any(ROOT / "jobs" / f"{job}.yaml", check_files=False)
    nodes = machines(name)
    total = {kind: sum(n.resources.get(kind, 0.0) for n in nodes) for kind in ("CPU", "GPU")}
    check(role_requests(config, total, own_ray=False), nodes)  # type: ignore[arg-type]


def test_jobs_are_named_by_cluster_files() -> None:
    assert len(list(named_jobs())) >= 4


def test_the_network_policy_opens_the_service_and_nothing_else_to_everybody() -> None:
    spec = yaml.safe_load((CLUSTER / "networkpolicy.yaml").read_text())["spec"]
    (to_all,) = [rule for rule in spec["ingress"] if "from" not in rule]
    assert [port["port"] for port in to_all["ports"]] == [8000]


def test_the_script_is_a_script() -> None:
    script = CLUSTER / "local_nodes.sh"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert script.stat().st_mode & 0o100
    assert "ray stop" not in script.read_text(), "it would end other people's clusters as well"


def test_the_docker_file_builds_both_and_runs_as_nobody_special() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    stages = re.findall(r"^FROM \S+ AS base-(\w+)$", text, re.M)
    assert sorted(stages) == ["cpu", "gpu"] and "FROM base-${DEVICE}" in text
    assert re.findall(r"^USER (\S+)$", text, re.M)[-1] == "1000"
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for word in line.split()]
    assert all((ROOT / name).exists() for name in copied)
    extras = set(re.findall(r"EXTRA=(\w+)", text))
    assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)


def test_prometheus_scrapes_what_ray_writes() -> None:
    config = yaml.safe_load((CLUSTER / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]


TESTED = {
    "serve.yaml",
    "nginx.conf",
    "local_nodes.sh",
    "grafana_serving.json",
    "grafana_training.json",
    "prometheus.yml",
}


@pytest.mark.parametrize("path", sorted(set(CLUSTER.iterdir()) - {README}), ids=lambda p: p.name)
def test_every_file_is_in_the_readmes_table_and_says_so_if_it_is_untested(path: Path) -> None:
    told = [line for line in README.read_text().splitlines() if line.startswith("| `") and f"`{path.name}`" in line]
    assert len(told) == 1, "README's table of cluster files"
    assert (path.name in TESTED) != ("| untested; " in told[0]), told
    first = path.read_text().splitlines()[0]
    assert (path.name in TESTED) != first.startswith("# untested: "), first
