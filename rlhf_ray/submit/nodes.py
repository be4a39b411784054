"""Asking the nodes (probe.py), and what their answers mean for a job."""

from __future__ import annotations

import contextlib
import json
import platform
import shlex
import tempfile
import time
import uuid
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.errors import Problem, ResourceError
from rlhf_ray.submit import probe
from rlhf_ray.submit.client import Cluster
from rlhf_ray.submit.pack import Need

SCRIPT = "rlhf_ray_probe.py"
PACKAGES = ("ray", "torch", "transformers", "peft", "deepspeed", "datasets", "pydantic", "safetensors", "tensorboard")
"""What a job needs of the nodes' Python."""
OPTIONAL = ("flash-attn", "bitsandbytes")
TIMEOUT_S = 180.0
POLL_S = 0.3
PROBE = "rlhf-ray-probe-"
FORGET_S = 60.0
"""Age at which a probe that has ended is deleted; clocks differ."""
SHOWN = 3
"""Nodes that a line names."""
Node = dict[str, Any]


def ask(
    cluster: Cluster, read: Iterable[str] = (), write: str | None = None, modules: Iterable[str] = ()
) -> list[Node]:
    """What each living node says. ResourceError if they cannot be asked.

    read: paths to be read.   write: a folder, there or not yet, that all nodes should write.   modules: names to import."""
    questions = {
        "read": sorted(set(read)),
        "write": write,
        "modules": sorted(set(modules)),
        "packages": [*PACKAGES, *OPTIONAL],
    }
    _forget_old(cluster)
    name = f"{PROBE}{uuid.uuid4().hex[:12]}"
    with tempfile.TemporaryDirectory(prefix="rlhf-ray-") as scratch:
        package = Path(scratch) / "probe.zip"
        with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(zipfile.ZipInfo(SCRIPT, (1980, 1, 1, 0, 0, 0)), Path(probe.__file__).read_text())
        entrypoint = shlex.join(["python", SCRIPT, json.dumps(questions)])
        cluster.submit(entrypoint, name, {"working_dir": str(package)}, {"rlhf_ray": "probe"})
    details = _ended(cluster, name)
    log = cluster.logs(name)
    line = next((part for part in reversed(log.splitlines()) if part.startswith(probe.MARK)), None)
    if line is None:
        raise _silent(cluster, details, log)
    nodes: list[Node] = json.loads(line.removeprefix(probe.MARK))["nodes"]
    return nodes


def _forget_old(cluster: Cluster) -> None:
    """Delete the probes of some time ago. Ray looks after a job for a second or two beyond its end: one that is deleted at once
    comes back, as a failed one without a command."""
    with contextlib.suppress(ResourceError):
        for job in cluster.jobs():
            ended = job.end_time / 1000 if job.end_time else None
            if str(job.submission_id).startswith(PROBE) and ended is not None and time.time() - ended > FORGET_S:
                cluster.delete(job.submission_id)


def _ended(cluster: Cluster, name: str) -> Any:
    deadline = time.monotonic() + TIMEOUT_S
    while not (details := cluster.details(name)).status.is_terminal():
        if time.monotonic() > deadline:
            cluster.stop(name)
            raise ResourceError.at(
                cluster.url, f"its nodes did not answer within {TIMEOUT_S:g} s", fix="rlhf-ray doctor"
            )
        time.sleep(POLL_S)
    return details


def _silent(cluster: Cluster, details: Any, log: str) -> ResourceError:
    """Why the probe said nothing."""
    lines = [line.strip() for line in log.splitlines() if line.strip() and not line.startswith("Running entrypoint")]
    told = lines[-1][:300] if lines else str(details.message or details.status)[:300]
    fix = ""
    if "not found" in told or "No module named 'ray'" in told:
        fix = "start Ray on the nodes with their environment activated, so that `python` is the one that has Ray"
    return ResourceError.at(cluster.url, "its nodes could not be checked", got=" ".join(told.split()), fix=fix)


def own_versions() -> dict[str, str | None]:
    return {"python": platform.python_version(), **probe.versions([*PACKAGES, *OPTIONAL])}


def has_package(nodes: Sequence[Node]) -> bool:
    """Whether every node has this very package installed, byte for byte."""
    mine = probe.folder_sha256(str(Path(__file__).parents[1]))
    return all(node.get("package") == mine for node in nodes)


def place(node: Node) -> str:
    return f"node {node['address']}" + (f" ({node['hostname']})" if node.get("hostname") else "")


def places(nodes: Sequence[Node]) -> str:
    """Some of them, and how many more there are."""
    counts = Counter(place(node) for node in nodes)
    told = [name if count == 1 else f"{name} x {count}" for name, count in counts.items()]
    more = len(told) - SHOWN
    return ", ".join(told[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def judge(nodes: Sequence[Node], needs: Sequence[Need], output_dir: str, warn: Callable[[str], None]) -> None:
    """ResourceError, all problems at once, if a node cannot run the job; versions that only differ are warned of."""
    problems = [p for node in nodes for p in _lacks(node)]
    problems += _unreadable(nodes, needs)
    problems += _storage(nodes, output_dir)
    ResourceError.raise_all(problems)
    for line in differences(nodes):
        warn(line)


def _lacks(node: Node) -> Iterator[Problem]:
    if "error" in node:
        yield Problem(place(node), "does not answer", got=node["error"])
        return
    missing = [name for name in PACKAGES if node["versions"].get(name) is None]
    if missing:
        fix = "install them there, e.g. with the image of cluster/Dockerfile"
        yield Problem(place(node), f"lacks {', '.join(missing)}", fix=fix)


def _unreadable(nodes: Sequence[Node], needs: Sequence[Need]) -> Iterator[Problem]:
    """One problem for all nodes that lack the same for the same reason."""
    for need in needs:
        lacking: dict[str, list[Node]] = {}
        for node in nodes:
            if need.kind == "module":
                if not node.get("modules", {}).get(need.path, True):
                    lacking.setdefault("", []).append(node)
            elif why := node.get("read", {}).get(need.path, ""):
                lacking.setdefault(why, []).append(node)
        for why, those in lacking.items():
            if need.kind == "module":
                told, fix = f"has no module {need.path}", "install it on every node"
            else:
                told = f"cannot read {need.path}: {why}"
                fix = "put it on storage that every node has under this path, or give the folder: --storage DIR"
                if need.kind == "uri":
                    fix = "its name, or the credentials in the environment of the nodes"
            yield Problem(need.field, f"{places(those)} {told}", fix=fix)


def _storage(nodes: Sequence[Node], output_dir: str) -> Iterator[Problem]:
    refused: dict[tuple[str, str], list[Node]] = {}
    for node in nodes:
        if why := node.get("writable"):
            refused.setdefault((node["folder"], why), []).append(node)
    for (folder, why), those in refused.items():
        fix = "name a folder on shared storage: output_dir=... or --storage DIR"
        yield Problem("output_dir", f"{places(those)} cannot write in {folder}: {why}", fix=fix)
    folders = {node["folder"] for node in nodes if node.get("folder")}
    apart = [node for node in nodes if node.get("shared") is False]
    if not refused and (len(folders) > 1 or apart):
        who = places(apart) if apart else "a node"
        fix = "name a folder on storage that all nodes share: output_dir=... or --storage DIR"
        yield Problem("output_dir", f"{output_dir} is not the same folder everywhere: {who} cannot see it", fix=fix)


def differences(nodes: Sequence[Node]) -> Iterator[str]:
    """A line for each package whose version is not that of this machine, or differs between nodes."""
    mine = own_versions()
    for name in ("python", *PACKAGES):
        there = {
            node["python"] if name == "python" else node["versions"].get(name) for node in nodes if "error" not in node
        }
        if there - {mine[name]}:
            told = ", ".join(sorted(str(version) for version in there))
            yield f"{name} is {told} on the cluster, {mine[name] or 'missing'} here"
