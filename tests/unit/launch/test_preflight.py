"""Resources are checked before anything waits (faults 41, 43; exit 3): what is missing is named, with what would fit."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_ray.config import PPOConfig, SFTConfig
from rlhf_ray.errors import ResourceError
from rlhf_ray.launch.preflight import check, matches, nearest, nodes_of, place
from rlhf_ray.launch.resources import ACCELERATOR, Node, ResourceRequest, processes, role_requests


def node(cpu: float, gpu: float = 0.0, name: str = "n", labels: dict[str, str] | None = None, **other: float) -> Node:
    return Node(name, {"CPU": cpu, "GPU": gpu, **other}, labels or {})


def learner(count: int, gpu: float = 1.0) -> ResourceRequest:
    return ResourceRequest("learner", count, {"CPU": 1.0, "GPU": gpu})


def sft(**fields: Any) -> SFTConfig:
    return SFTConfig(output_dir="x", model_name_or_path="m", data={"train": "d.jsonl"}, learner=fields)


def split(**changes: Any) -> PPOConfig:
    fields: dict[str, Any] = {"placement": "split", "rewards": [{"model": "r"}], **changes}
    return PPOConfig(output_dir="x", model_name_or_path="m", data={"train": "d.jsonl"}, **fields)


def test_more_gpus_than_any_node_has() -> None:
    dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 9.0}}
    alive = {"Alive": True, "NodeManagerAddress": "a", "Resources": {"CPU": 64.0, "GPU": 1.0}, "Labels": {}}
    with pytest.raises(ResourceError, match=r"learner.num_gpus: no node has 8 GPU.*largest node has 1") as caught:
        check([learner(1, 8.0)], nodes_of([alive, dead]))
    assert caught.value.exit_code == 3 and len(caught.value.lines()) == 1


def test_more_workers_than_there_is_room_for() -> None:
    with pytest.raises(ResourceError, match=r"room for 3 workers of 1 CPU, 1 GPU.*learner.num_workers=3"):
        check([learner(4)], [node(8, 2), node(1, 4)])


def test_what_fits_is_told_by_node() -> None:
    assert check([learner(3)], [node(8, 2, "a"), node(1, 4, "b")]) == {"learner": ["a", "a", "b"]}


@pytest.mark.parametrize(
    ("shares", "gpus", "fits"),
    [([0.6, 0.6], 2, True), ([0.6, 0.6, 0.6], 2, False), ([0.5, 0.5, 1.0], 2, True), ([0.3] * 3 + [1.0], 2, True)],
)
def test_a_fraction_comes_from_one_gpu(shares: list[float], gpus: int, fits: bool) -> None:
    """Three actors of 0.6 are 1.8 GPUs, and there is room for two of them on two GPUs."""
    requests = [ResourceRequest(f"role{i}", 1, {"CPU": 0.1, "GPU": share}) for i, share in enumerate(shares)]
    assert (place(requests, [node(8, gpus)]) is not None) is fits


def test_roles_that_fit_alone_but_not_together() -> None:
    requests = [
        ResourceRequest("generator", 1, {"CPU": 0.2, "GPU": 1.0}),
        ResourceRequest("scorer", 1, {"CPU": 0.2, "GPU": 1.0}),
        learner(1),
    ]
    with pytest.raises(ResourceError) as caught:
        check(requests, [node(8, 2)])
    [line] = caught.value.lines()
    assert "do not fit together: generator 1 x (0.2 CPU, 1 GPU), scorer 1 x (0.2 CPU, 1 GPU), learner" in line
    assert "expected 3 GPU; got 8 CPU, 2 GPU on 1 node" in line
    assert line.endswith("set generator.num_gpus=0.5 scorer.num_gpus=0.5")


def actors(generators: int, generator_gpu: float = 0.0) -> list[ResourceRequest]:
    gpu = {"GPU": generator_gpu} if generator_gpu else {}
    return [ResourceRequest("generator", generators, {"CPU": 1.0, **gpu}), ResourceRequest("scorer", 1, {"CPU": 1.0})]


@pytest.mark.parametrize(
    ("requests", "there", "expected"),
    [
        ([*actors(3), learner(1, 0.0)], node(4), "generator.num_actors=2"),
        ([*actors(1, 1.0), learner(1)], node(4, 1), "placement=colocate"),
        ([*actors(1), learner(1, 0.0)], node(1), "placement=colocate"),
        ([*actors(1), learner(4, 0.0)], node(2), "placement=colocate learner.num_workers=2"),
    ],
)
def test_the_nearest_placement_that_fits(requests: list[ResourceRequest], there: Node, expected: str) -> None:
    assert nearest(requests, [there]) == f"set {expected}"


def test_labels_and_accelerators() -> None:
    nodes = [node(8, 1, "a", {"zone": "east"}, **{f"{ACCELERATOR}T4": 1.0}), node(8, 1, "b", {"zone": "west"})]
    assert check([ResourceRequest("learner", 1, {"GPU": 1.0}, {"zone": "west"})], nodes) == {"learner": ["b"]}
    with pytest.raises(
        ResourceError, match=r"learner.label_selector: no node has these labels.*zone: north.*zone: east; zone"
    ):
        check([ResourceRequest("learner", 1, {"GPU": 1.0}, {"zone": "north"})], nodes)
    with pytest.raises(ResourceError, match=r"learner.accelerator_type: no node has a A100; expected A100; got T4"):
        check([ResourceRequest("learner", 1, {"GPU": 1.0, f"{ACCELERATOR}A100": 0.001})], nodes)


@pytest.mark.parametrize(
    ("selector", "holds"),
    [
        ("east", True),
        ("west", False),
        ("!west", True),
        ("!east", False),
        ("in(west, east)", True),
        ("!in(east)", False),
    ],
)
def test_label_selectors_read_as_rays(selector: str, holds: bool) -> None:
    assert matches({"zone": "east"}, {"zone": selector}) is holds


def test_all_problems_at_once() -> None:
    requests = [ResourceRequest("generator", 1, {"CPU": 99.0, "GPU": 1.0}), learner(1, 2.0)]
    with pytest.raises(ResourceError) as caught:
        check(requests, [node(8)])
    where = [problem.where for problem in caught.value.problems]
    assert where == ["generator.num_threads", "generator.num_gpus", "learner.num_gpus"]


def test_on_our_own_ray_cpus_always_fit() -> None:
    jobs = [sft(num_workers=n, num_threads=2) for n in (1, 2, 4)]
    jobs += [split(generator={"num_actors": 3}, scorer={"num_actors": 2}, learner={"num_workers": 2})]
    for job in jobs:
        check(role_requests(job, {"CPU": 2.0}, own_ray=True), [node(2.0)])


def test_on_a_given_cluster_a_worker_asks_for_its_threads_and_a_gpu_where_there_are_some() -> None:
    def asked(**fields: Any) -> dict[str, float]:
        return role_requests(sft(**fields), {"CPU": 8.0, "GPU": 2.0}, own_ray=False)[0].each

    assert asked(num_threads=4) == {"CPU": 4.0, "GPU": 1.0}
    assert asked(num_threads=4, num_gpus=0.0) == {"CPU": 4.0}


def test_split_roles_ask_for_a_gpu_each_if_everybody_can_have_one() -> None:
    job = split(generator={"num_actors": 2}, scorer={"num_cpus": 0.5, "accelerator_type": "A100"})
    assert processes(job) == 4
    for gpus, each in ((4.0, 1.0), (3.0, 0.5), (2.0, 0.3333), (0.0, 0.0)):
        requests = role_requests(job, {"CPU": 8.0, "GPU": gpus}, own_ray=False)
        assert [a.role for a in requests] == ["generator", "scorer", "learner"]
        assert [a.each.get("GPU", 0.0) for a in requests] == [each, each, float(gpus > 0)]
        assert requests[1].each["CPU"] == 0.5 and requests[1].each[f"{ACCELERATOR}A100"] == 0.001


def test_no_role_is_on_the_cpu_by_accident() -> None:
    """Two GPUs, and a split job that says nothing of them: the CPU is for those that ask for it."""
    there = node(8, 2)
    requests = role_requests(split(), there.resources, own_ray=False)
    assert [a.each.get("GPU") for a in requests] == [0.5, 0.5, 1.0]
    assert check(requests, [there]) == {"generator": ["n"], "scorer": ["n"], "learner": ["n"]}
    told = role_requests(split(scorer={"num_gpus": 0.0}), there.resources, own_ray=False)
    assert [a.each.get("GPU") for a in told] == [1.0, None, 1.0]


@pytest.mark.parametrize(
    ("job", "gpus", "fix"),
    [(split(), 1, "set placement=colocate"), (sft(num_workers=4), 2, "set learner.num_workers=2")],
)
def test_too_few_gpus_refuse_the_job(job: Any, gpus: int, fix: str) -> None:
    there = node(8, gpus)
    with pytest.raises(ResourceError) as caught:
        check(role_requests(job, there.resources, own_ray=False), [there])
    assert fix in str(caught.value)
