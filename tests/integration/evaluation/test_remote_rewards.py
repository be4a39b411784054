"""One reward model three ways: as a run, as a Python function, behind a server. PPO with each of them learns the same adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config import PPOConfig, RewardSource
from rlhf_ray.console import NullConsole
from rlhf_ray.errors import ConfigError, Interrupted
from rlhf_ray.rewards import http_client
from rlhf_ray.rewards.scoring_model import ScoringModel, load_scoring_model
from rlhf_ray.stages.start import ppo
from tests.runs import equal, weights
from tests.servers import Reply, serving

FUNCTION = """
import torch
from rlhf_ray.config import RewardSource
from rlhf_ray.console import NullConsole
from rlhf_ray.rewards.scoring_model import load_scoring_model

MODEL = load_scoring_model(RewardSource(run={run!r}), None, torch.device("cpu"), NullConsole())


async def score(prompts, completions, completion_ids, **columns):
    ids = MODEL.reader.backbone.tokenizer(prompts)["input_ids"]
    return MODEL.score(ids, completion_ids)
"""


def job(chain: Any, output_dir: Path, reward: dict[str, Any], **fields: Any) -> PPOConfig:
    values = {
        **chain.job,
        "output_dir": str(output_dir),
        "sft": chain.sft,
        "data": {"train": chain.prompts, "held_out_fraction": 0.4},
        "rewards": [{"name": "rm", **reward}],
        "value": {"init_from": "policy"},
        "rollout_batch_size": 16,
        "rollout_chunk_size": 8,
        "num_mini_batches": 2,
        "per_device_train_batch_size": 8,
        "response_length": 8,
        "max_steps": 2,
        "save_steps": 1,
        "learning_rate": 1e-3,
    }
    return PPOConfig(**{**values, **fields})


@pytest.fixture
def model(chain: Any) -> ScoringModel:
    return load_scoring_model(RewardSource(run=chain.reward), None, torch.device("cpu"), NullConsole())


@pytest.fixture
def answer(model: ScoringModel) -> Callable[[Any], Any]:
    def score(body: Any) -> Any:
        return {"ids": body["ids"], "rewards": model.score(body["prompt_ids"], body["completion_ids"])}

    return score


def test_by_run_by_function_and_by_http_the_adapter_is_the_same(
    chain: Any, tmp_path: Path, answer: Callable[[Any], Any]
) -> None:
    file = tmp_path / "by_function.py"
    file.write_text(FUNCTION.format(run=chain.reward))
    by_run = weights(ppo(job(chain, tmp_path / "run", {"run": chain.reward, "normalize": False}), NullConsole()))
    by_function = weights(ppo(job(chain, tmp_path / "function", {"function": f"{file}:score"}), NullConsole()))
    with serving(answer) as server:
        by_http = weights(ppo(job(chain, tmp_path / "http", {"url": server.url}), NullConsole()))
    assert equal(by_run, by_function) and equal(by_run, by_http)
    assert not equal(by_run, weights(chain.sft))


def test_a_run_whose_server_went_away_resumes_to_the_same_bits(
    chain: Any, tmp_path: Path, answer: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's rewards change with every request, as those of a judge that samples do. It goes away in the middle of a rollout;
    what it had said by then is not asked again, so both runs learn from the same rewards."""
    monkeypatch.setattr(http_client, "FIRST_PAUSE_S", 0.01)
    told: dict[str, list[float]] = {}

    def moody(body: Any) -> Any:
        known = told.setdefault(json.dumps(body), [])
        known.append(len(told))  # a second request with the same rows would be told another reward
        return {"rewards": [r + known[-1] + len(known) for r in answer(body)["rewards"]]}

    settings: dict[str, Any] = {"batch_size": 4, "concurrency": 1, "max_retries": 0}
    with serving(moody) as server:
        whole = ppo(job(chain, tmp_path / "whole", {"url": server.url, **settings}), NullConsole())
        requests = len(server.asked)
        first = [json.dumps(body) for body in server.asked]
        told.clear()
        server.asked.clear()
        server.answer = lambda body: moody(body) if len(server.asked) <= requests // 2 + 1 else Reply("gone", 503)
        interrupted = job(chain, tmp_path / "cut", {"url": server.url, **settings})
        with pytest.raises(Interrupted, match=r"reward rm .*: answered with status 503"):
            ppo(interrupted, NullConsole())
        refused = len(server.asked)
        with serving(moody) as moved:  # and comes back somewhere else, slower
            settings |= {"url": moved.url, "timeout_s": 90.0}
            resumed = ppo(job(chain, tmp_path / "cut", settings, resume="auto"), NullConsole())
        with pytest.raises(ConfigError, match=r"rewards: .* holds a finished run with another value"):
            ppo(job(chain, tmp_path / "cut", {**settings, "batch_size": 8}, resume="auto"), NullConsole())
    asked = [json.dumps(body) for body in (*server.asked, *moved.asked)]
    assert asked[: refused - 1] + asked[refused:] == first and len(asked) == len(set(asked)) + 1
    assert equal(weights(whole), weights(resumed))
    lines = [(Path(run.run_dir) / "metrics.jsonl").read_text().splitlines() for run in (whole, resumed)]
    rewards = [[json.loads(line).get("reward/mean") for line in part] for part in lines]
    assert rewards[0] == rewards[1]
