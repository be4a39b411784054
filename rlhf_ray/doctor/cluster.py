"""A cluster: who may use it, what its nodes are and have, what they can reach."""

from __future__ import annotations

import urllib.parse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rlhf_ray.config.serve import is_loopback
from rlhf_ray.doctor.checks import CheckResult, Status, gib, room
from rlhf_ray.errors import RlhfRayError
from rlhf_ray.launch.resources import Node as Machine
from rlhf_ray.plan.memory import GIB
from rlhf_ray.submit import nodes as ask_nodes
from rlhf_ray.submit.client import Cluster, check_address, connect, look
from rlhf_ray.submit.nodes import Node, place

ABOUT = "cluster"
HEAD = "node:__internal_head__"
PORTS = {6379: "GCS", 10001: "Ray client", 8000: "Serve", 8265: "dashboard"}
OPEN = "one token is full code execution: firewall the nodes, reach the dashboard by an ssh tunnel or TLS"


def access(address: str | None) -> tuple[Cluster | None, list[CheckResult]]:
    """Whether authentication is really on: asked without a token, and with ours. The cluster, if it lets us in."""
    url = check_address(address)
    found = [CheckResult(ABOUT, "address", "ok", url)]
    bare = look(url)
    if bare.status == 401:
        found.append(CheckResult(ABOUT, "authentication", "ok", "on: GET /api/jobs/ without a token answers 401"))
    elif bare.status == 200:
        told = "off: GET /api/jobs/ without a token answers 200"
        fix = "ray get-auth-token --generate, then RAY_AUTH_MODE=token on every node, driver and client"
        found.append(CheckResult(ABOUT, "authentication", "fail", told, fix))
    if urllib.parse.urlsplit(url).scheme == "http" and not is_loopback(urllib.parse.urlsplit(url).hostname or ""):
        fix = "ssh -L 8265:127.0.0.1:8265 HEAD, or TLS in front of it"
        found.append(CheckResult(ABOUT, "encryption", "warn", f"the token travels in clear to {url}", fix))
    try:
        cluster = connect(url, lambda line: None)
    except RlhfRayError as error:
        found.append(_failed("access", error))
        return None, found
    if cluster.token is not None:
        found.append(CheckResult(ABOUT, "access", "ok", f"the token of {cluster.token.where} is accepted"))
    return cluster, found


def nodes(cluster: Cluster, storage: str | None, read: Sequence[str]) -> tuple[list[Node], list[CheckResult]]:
    """What the nodes say, and what that means. storage: a folder that all should write.  read: paths that all should read."""
    try:
        answers = ask_nodes.ask(cluster, read, storage)
    except RlhfRayError as error:
        return [], [_failed("nodes", error)]
    answers.sort(key=lambda node: HEAD not in node["resources"])
    _name(answers)
    silent = [node for node in answers if "error" in node]
    found = [CheckResult(ABOUT, called(node), "fail", f"does not answer: {node['error']}") for node in silent]
    talking = [node for node in answers if "error" not in node]
    if not talking:  # nothing is known of versions, ports or storage
        return [], found
    found += _versions(talking)
    for node in talking:
        found += _node(node)
    found += _ports(talking, cluster)
    found += _storage(talking, storage, read)
    return talking, found


def _failed(name: str, error: RlhfRayError) -> CheckResult:
    problem = error.problems[0]
    return CheckResult(ABOUT, name, "fail", str(replace(problem, fix="")), problem.fix)


def machines(answers: Sequence[Node]) -> list[Machine]:
    """The nodes as a job's placement sees them."""
    return [Machine(node["address"], dict(node["resources"]), dict(node["labels"])) for node in answers]


def called(node: Node) -> str:
    return str(node.get("called") or f"{'head' if HEAD in node['resources'] else 'node'} {node['address']}")


def _name(answers: Sequence[Node]) -> None:
    """Nodes of one machine have one address: they are numbered."""
    seen: Counter[str] = Counter()
    for node in answers:
        name = called(node)
        seen[name] += 1
        node["called"] = name if seen[name] == 1 else f"{name} #{seen[name]}"


def _versions(answers: Sequence[Node]) -> Iterator[CheckResult]:
    """Side by side: here, head, nodes."""
    mine = ask_nodes.own_versions()
    for name in ("python", *ask_nodes.PACKAGES):
        there = {called(n): n["python"] if name == "python" else n["versions"].get(name) for n in answers}
        same = set(there.values()) == {mine[name]}
        told = str(mine[name]) if same else f"here {mine[name]}, " + ", ".join(f"{k} {v}" for k, v in there.items())
        status: Status = "ok" if same else "warn"
        if name == "ray" and not same:
            status = "fail"  # jobs of another version are refused, or worse, are not
        if name == "python" and len({str(v).rpartition(".")[0] for v in there.values()}) > 1:
            status = "fail"
        if None in there.values():
            status = "fail"
        fix = "the same image, or the same constraints.txt, on every node"
        yield CheckResult(ABOUT, name, status, told + (" everywhere" if same else ""), fix)


def _node(node: Node) -> Iterator[CheckResult]:
    name, declared = called(node), float(node["resources"].get("GPU", 0.0))
    cards = node["gpus"]
    models = ", ".join(f"{card['name']} {gib(card['bytes'])} (driver {card['driver']})" for card in cards) or "no GPU"
    if declared and len(cards) < declared:
        told = f"Ray has {declared:g} GPUs declared, nvidia-smi shows {len(cards)}"
        yield CheckResult(
            ABOUT, f"{name} GPU", "warn", told, "real GPUs need the driver, and in a container its runtime"
        )
    else:
        cpus = node["resources"].get("CPU", 0.0)
        yield CheckResult(ABOUT, f"{name} GPU", "ok", f"{models}; {cpus:g} CPU, {declared:g} GPU for Ray")
    fix = "end other programs, or take a larger machine"
    yield room(ABOUT, f"{name} memory", node["memory_free"], 1.5 * GIB, 4 * GIB, fix)
    yield room(ABOUT, f"{name} disk", node["disk_free"], 0.5 * GIB, 5 * GIB, "free some space")
    yield room(
        ABOUT,
        f"{name} shm",
        node["shm_free"],
        0.05 * GIB,
        1 * GIB,
        "in a container: --shm-size=2g, or an emptyDir of medium Memory",
    )
    if node["user"] == 0:
        yield CheckResult(ABOUT, f"{name} user", "warn", "Ray runs as root", "run it as an ordinary user")


def _ports(answers: Sequence[Node], cluster: Cluster) -> Iterator[CheckResult]:
    """Ray's ports that more than the loopback address reaches."""
    ports = dict(PORTS)
    own = urllib.parse.urlsplit(cluster.url).port
    if own is not None:
        ports.setdefault(own, "dashboard")
    for node in answers:
        if (gcs := str(node.get("gcs", "")).rpartition(":")[2]).isdigit():
            ports.setdefault(int(gcs), "GCS")
        is_open = sorted({(port, ports[port]) for _, port in node["listening"] if port in ports})
        told = ", ".join(f"{what} {port}" for port, what in is_open)
        status: Status = "ok"
        if is_open:
            exposed = {"dashboard", "Serve", "Ray client"} & {what for _, what in is_open}
            status = "fail" if cluster.token is None else "warn" if exposed else "ok"
        said = f"open beyond loopback: {told}" if told else "none of Ray's well-known ports is open beyond loopback"
        yield CheckResult(ABOUT, f"{called(node)} ports", status, said, OPEN)


def _storage(answers: Sequence[Node], storage: str | None, read: Sequence[str]) -> Iterator[CheckResult]:
    if storage is not None:
        refused = [f"{place(node)}: {node['writable']}" for node in answers if node["writable"]]
        apart = [place(node) for node in answers if node["shared"] is False]
        if refused:
            yield CheckResult(
                ABOUT, "storage", "fail", f"{storage} cannot be written: {', '.join(refused)}", "fix its permissions"
            )
        elif apart or len({node["folder"] for node in answers}) > 1:
            told = f"{storage} is not shared: {', '.join(apart) or 'nodes have other folders'} cannot see it"
            yield CheckResult(ABOUT, "storage", "fail", told, "mount the same NFS or volume on every node")
        else:
            yield CheckResult(ABOUT, "storage", "ok", f"every node can write and see {storage}")
    for path in read:
        missing = [f"{place(node)}: {node['read'][path]}" for node in answers if node["read"].get(path)]
        told = f"cannot be read by {', '.join(missing)}" if missing else "can be read by every node"
        yield CheckResult(ABOUT, path, "fail" if missing else "ok", told, "put it on storage that every node has")
