"""Faults of Ray itself: its control service, a node, its network; and actors that run out of memory or are handed bad weights."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf_ray.metrics import read_metrics

from .processes import ONE, SPLIT, alive, family, steps

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.long]
ONE_GENERATOR = {**SPLIT, "generator": {"num_actors": 1, "num_gpus": 0.0, "num_threads": 1, "timeout_s": 60.0}}


def retries(run: Path) -> float:
    return sum(row.get("faults/retries", 0.0) for row in read_metrics(run / "metrics.jsonl"))


def test_a_generator_that_starts_again_samples_with_the_adapter_of_the_moment(
    world: Any, untouched: Path, tmp_path: Path, note: Any, same: Any
) -> None:
    """Fault 4. Call 4 is the first chunk after the first hand-over; there is no other generator to do it."""
    child = world.start(
        "ppo", world.job("stale", **ONE_GENERATOR), fault="actor:generate_with:call=4:kill", marks=tmp_path / "marks"
    )
    assert child.wait(600) == 0, child.text
    log = (world.run("stale") / "roles.log").read_text()
    assert "generator 0: lost while sampling chunk 0 of step 2, adapter version 1" in child.text, child.text
    (line,) = [line for line in log.splitlines() if "  step 2: adapter 1 (" in line]
    assert "generator 0: 2 chunks" in line and "restarted: pid" in log
    note(4, retries(world.run("stale")) >= 1 and same(untouched, world.run("stale")), "0 samples of another adapter")


def test_weights_that_are_not_finite_are_refused_by_the_generator(
    world: Any, untouched: Path, tmp_path: Path, note: Any, same: Any
) -> None:
    """Fault 21. Nothing is sampled with them; the run ends, and goes on."""
    child = world.start("ppo", world.job("poison", **SPLIT), fault="generator:adapter:call=2:nan", marks=tmp_path / "m")
    code, text = child.wait(600), child.text
    assert "is not finite (1 of " in text and "a poisoned adapter" in text and code != 0, text
    world.finish("poison")
    note(21, same(untouched, world.run("poison")), "refused by its finite check, then same weights and metrics")


def test_the_control_service_is_killed(world: Any, untouched: Path, note: Any, same: Any, until: Any) -> None:
    """Fault 13: the cluster is lost, the run folder is not. A new cluster goes on. Step 5 outlasts the cluster."""
    child = world.start("ppo", world.job("gcs", **ONE), fault="learner:update:step=5:sleep=100")
    run = world.run("gcs")
    until(lambda: steps(run) >= 4, 400)
    (gcs,) = [pid for pid, name in family(child.pid).items() if "/gcs_server" in name.split(" ")[0]]
    others = set(family(child.pid)) - {child.pid}
    os.kill(gcs, signal.SIGKILL)
    started = time.monotonic()
    code, last = child.wait(300), child.text.splitlines()[-1]
    took = time.monotonic() - started
    assert "its control service (gcs_server) has ended" in last and last.endswith("rlhf-ray resume runs/gcs"), (
        child.text
    )
    said = world.finish("gcs")
    assert "resuming from step 4 " in said, said
    until(lambda: not alive(others), 30, "processes of the old Ray")
    held = code == 75 and same(untouched, run)
    note(13, held, "exit 75 after {} s; new cluster and resume: same weights and metrics", took)


@pytest.fixture
def nodes() -> Iterator[Callable[..., Any]]:
    """nodes(worker, worker, ...) -> a cluster of Ray nodes on this machine; each worker: arguments of `add_node`."""
    from ray.cluster_utils import Cluster

    made: list[Any] = []

    def make(*workers: dict[str, Any], **head: Any) -> Any:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **head})
        made.append(cluster)
        for worker in workers:
            cluster.add_node(**worker)
        cluster.wait_for_nodes()
        return cluster

    yield make
    for cluster in made:
        cluster.shutdown()


def test_the_control_service_of_a_given_cluster_is_killed(
    world: Any, untouched: Path, nodes: Any, note: Any, same: Any, until: Any
) -> None:
    """Fault 13, where the head is somebody else's: Ray would abort the driver after a minute without a word."""
    cluster = nodes(num_cpus=2)
    child = world.start(
        "ppo", world.job("given", **ONE), fault="learner:update:step=5:sleep=300", RAY_ADDRESS=cluster.address
    )
    run = world.run("given")
    until(lambda: steps(run) >= 4 or child.process.exitcode is not None, 400)
    gcs = cluster.head_node.all_processes["gcs_server"][0].process.pid
    os.kill(gcs, signal.SIGKILL)
    started = time.monotonic()
    code, last = child.wait(300), child.text.splitlines()[-1]
    took = time.monotonic() - started
    assert "its control service (gcs_server) has ended" in last and last.endswith("rlhf-ray resume runs/given"), (
        child.text
    )
    cluster.shutdown()
    world.finish("given")
    note(
        13,
        code == 75 and same(untouched, run),
        "of a given cluster: exit 75 after {} s, same weights and metrics",
        took,
    )


def test_a_node_with_generators_is_lost(
    world: Any, untouched: Path, nodes: Any, note: Any, same: Any, until: Any
) -> None:
    """Fault 14. Its rollouts are sampled again, by the generator of the node that is left."""
    there = {"num_cpus": 1, "labels": {"place": "rollouts"}}
    cluster = nodes(there, there, num_cpus=2)
    generator = {**SPLIT["generator"], "num_cpus": 1, "timeout_s": 60.0, "label_selector": {"place": "rollouts"}}
    split = {**SPLIT, "generator": generator, "scorer": {"num_gpus": 0.0, "num_cpus": 1, "num_threads": 1}}
    child = world.start("ppo", world.job("node", **split), RAY_ADDRESS=cluster.address)
    run = world.run("node")
    until(lambda: steps(run) >= 3 or child.process.exitcode is not None, 400)
    (line,) = [line for line in (run / "roles.log").read_text().splitlines() if "  generator 1 pid" in line]
    lost = next(n for n in cluster.worker_nodes if f"(node {n.node_id[:6]})" in line)
    cluster.remove_node(lost, allow_graceful=False)
    assert child.wait(600) == 0, child.text
    note(
        14, retries(run) >= 1 and same(untouched, run), "chunks of a lost node sampled again, same weights and metrics"
    )


def test_the_node_of_the_learner_is_drained(
    world: Any, untouched: Path, nodes: Any, note: Any, same: Any, until: Any
) -> None:
    """Fault 12, as a cloud does it to a spot node: a checkpoint that was not due is written, the group starts on another node, and
    no restart is charged."""
    cluster = nodes({"num_cpus": 1, "labels": {"spot": "yes"}}, {"num_cpus": 1, "labels": {"spot": "yes"}}, num_cpus=1)
    learner = {"num_workers": 1, "num_threads": 1, "label_selector": {"spot": "yes"}}
    job = world.job("drain", learner=learner, save_steps=10**6, max_steps=10**5, eval_steps=10**6)
    child = world.start("ppo", job, RAY_ADDRESS=cluster.address)
    run = world.run("drain")
    until(lambda: steps(run) >= 2 or child.process.exitcode is not None, 400)
    on = next(n for n in cluster.worker_nodes if f"(node {n.node_id[:6]})" in child.text)
    words = ["drain-node", "--address", cluster.address, "--node-id", on.node_id, "--deadline-remaining-seconds", "120"]
    words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *words], check=True, timeout=120, capture_output=True)
    drained = time.monotonic()
    saved = until(
        lambda: [c for c in (run / "checkpoints").glob("step_*") if "." not in c.name],
        60,
        "a checkpoint before the deadline",
    )
    took = time.monotonic() - drained
    cluster.remove_node(on, allow_graceful=False)
    step = int(saved[0].name.removeprefix("step_"))
    until(lambda: f"resuming from step {step} " in child.text or child.process.exitcode is not None, 300)
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait(120) == 75, child.text
    held = f"resuming from step {step} " in child.text
    note(12, held, "a checkpoint {} s after the notice; resumes from it on another node", took)


def test_two_percent_of_remote_calls_fail(world: Any, untouched: Path, note: Any, same: Any) -> None:
    """Fault 15: request or answer of every kind of Ray's own calls, in every process."""
    failures = {"*": {"num_failures": -1, "req_failure_prob": 1, "resp_failure_prob": 1}}
    child = world.start("ppo", world.job("network", **SPLIT), RAY_testing_rpc_failure=json.dumps(failures))
    code = child.wait(600)
    said = child.text
    if code == 75:
        said += world.finish("network")
    assert code in (0, 75), said
    note(15, same(untouched, world.run("network")), f"exit {code}, same weights and metrics")


GREEDY = '''
"""A reward that takes ever more memory."""

HELD = []


def score(prompts, completions, **columns):
    HELD.append(bytearray(b"x") * (8000 << 20))
    return [0.0] * len(completions)
'''


def test_a_scorer_that_runs_out_of_memory(world: Any, note: Any) -> None:
    """Fault 16: Ray kills it before the machine does. Tried a few times at one size, then told with its name and its megabytes."""
    (world.folder / "greedy.py").write_text(GREEDY)
    memory = psutil.virtual_memory()
    room = 5000 << 20  # for the job, not for what the reward takes
    limit = (memory.total - memory.available + room) / memory.total
    rewards = [{"name": "greedy", "function": "greedy.py:score"}]
    child = world.start(
        "ppo", world.job("memory", **SPLIT, rewards=rewards),
        RAY_memory_usage_threshold=f"{limit:.4f}", RAY_memory_monitor_refresh_ms="100",
    )  # fmt: skip
    code, last = child.wait(600), child.text.splitlines()[-1]
    print(child.text)
    # Ray picks its victims by their age, not by their size: it may take the learner as well, and then the error is of the group.
    assert last.startswith(("error: scorer 0: out of memory in 3 attempts (", "error: memory: ran out")), child.text
    assert "lower rollout_chunk_size" in last and last.endswith("rlhf-ray resume runs/memory"), last
    assert child.text.count("the chunk is done again") <= 3
    held = code == 75 and re.search(r"[\d,]+ MB in \w+, pid \d+", last) is not None
    note(16, held, "exit 75 naming the process and its megabytes, with advice")
