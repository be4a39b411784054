"""A reward over HTTP under `placement: split`: several scorer actors ask one server, each for its own chunks."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config import PPOConfig, RewardConfig, RewardSource
from rlhf_ray.console import NullConsole
from rlhf_ray.rewards.scoring_model import load_scoring_model
from rlhf_ray.stages.start import ppo, reward
from tests.runs import equal, lasting_rows, weights, yes_or_no
from tests.servers import Reply, serving

pytestmark = pytest.mark.integration


def test_two_scorers_ask_once_and_learn_what_the_run_teaches(
    two_gpus: Any, split_job: Callable[..., PPOConfig], supervised_job: Callable[..., Any], tmp_path: Path, console: Any
) -> None:
    """By run in this process, by HTTP in this process, by HTTP from two scorer actors: the same adapter, bit for bit, and as many
    requests. Every request is a chunk's, asked once."""
    trained = reward(supervised_job(RewardConfig, "reward", yes_or_no(60), max_steps=2), console).run_dir
    model = load_scoring_model(RewardSource(run=trained), "none", torch.device("cpu"), NullConsole())
    here = {"placement": "colocate", "learner": {"num_workers": 0, "num_threads": 1}, "allow_chance_rewards": True}

    def job(name: str, source: dict[str, Any], **fields: Any) -> PPOConfig:
        rewards = [{"name": "rm", **source}]
        return split_job(name, rewards=rewards, value={"init_from": "policy"}, response_length=12, **fields)

    meet, met = threading.Event(), threading.Event()

    def answer(body: Any) -> Reply:
        if server.busy > 1:
            met.set()
        if meet.is_set():
            met.wait(5)  # a busy machine may let the scorers take turns; two of them shall ask at once
        rewards = model.score(body["prompt_ids"], body["completion_ids"])
        rows = list(zip(body["ids"], rewards))[::-1]  # in another order: rewards go by id
        return Reply({"ids": [i for i, _ in rows], "rewards": [r for _, r in rows]}, wait_s=0.3)

    by_run = ppo(job("run", {"run": trained, "normalize": False}, **here), console)
    with serving(answer) as server:
        one = ppo(job("one", {"url": server.url}, **here), console)
        asked, most_busy = [json.dumps(body, sort_keys=True) for body in server.asked], server.most_busy
        server.asked.clear()
        meet.set()
        scorers = {"num_actors": 2, "num_gpus": 0.25, "num_cpus": 0.25, "num_threads": 1}
        two = ppo(job("two", {"url": server.url}, scorer=scorers), console)
    of_two = [json.dumps(body, sort_keys=True) for body in server.asked]
    assert most_busy == 1 and server.most_busy == 2, "the scorers took turns"
    assert sorted(of_two) == sorted(asked) and len(of_two) == len(set(of_two))
    chunks = 2 * 24 // 4  # of two steps; the rest are of the held-out prompts
    assert len(of_two) > chunks and {len(body["ids"]) for body in server.asked} <= {1, 2, 3, 4}
    log = (Path(two.run_dir) / "roles.log").read_text()
    assert "scorer 0: " in log and "scorer 1: " in log
    for name in ("adapter", "value"):
        assert equal(weights(by_run, name), weights(one, name)) and equal(weights(one, name), weights(two, name))
    rewards = [[row.get("reward/rm") for row in lasting_rows(run)] for run in (by_run, one, two)]
    assert rewards[0] == rewards[1] == rewards[2] and any(rewards[0])
