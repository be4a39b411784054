"""The job files of `jobs/`, end to end as they are written, on two declared GPUs: only models, data, lengths, steps and precision
are those of a tiny model, given as a user would, by `field=value`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import PipelineConfig, PPOConfig
from rlhf_ray.config.load import load
from rlhf_ray.metrics import read_metrics
from rlhf_ray.stages.start import pipeline, ppo

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.bitsandbytes]
JOBS = Path(__file__).parents[3] / "jobs"
Write = Callable[[str, Iterable[dict[str, Any]]], str]


@pytest.fixture
def reward_model(tmp_path: Path, tiny_llama: Callable[..., Path]) -> str:
    """A whole reward model, as the ancestor's are."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base, folder = tiny_llama(seed=3, context=512), tmp_path / "reward_model"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


def questions(count: int, first: int = 0) -> list[dict[str, str]]:
    return [
        {"instruction": f"Name number {i}.", "input": "", "output": f"It is {i}."} for i in range(first, first + count)
    ]


@pytest.fixture
def two_a100(
    tmp_path: Path, tiny_llama: Callable[..., Path], reward_model: str, write_jsonl: Write
) -> Callable[[str], PPOConfig]:
    """A job for two A100, on the tiny model: the full rollout of 256 replies in its 16 minibatches and 2 epochs, once."""

    def make(name: str) -> PPOConfig:
        changes = [
            f"output_dir={tmp_path / name}",
            f"model_name_or_path={tiny_llama(context=512)}",
            f"data.train={write_jsonl('train.jsonl', questions(300))}",
            f"data.eval={write_jsonl('eval.jsonl', questions(8, first=300))}",
            f"rewards=[{{name: reward, model: {reward_model}}}]",
            *("dtype=float32", "max_length=256", "response_length=8", "max_steps=1"),
        ]
        return load(PPOConfig, JOBS / f"{name}.yaml", changes)

    return make


def gpus(text: str) -> dict[str, str]:
    """Who has which GPU, from the run's header: {"generator 0": "1", "rank 0": "0"}."""
    return dict(re.findall(r"(rank \d|generator \d|scorer \d),? .*?GPU (\d+)", text))


def check(config: PPOConfig, run_dir: str) -> None:
    """Every reply of the job's step was sampled, its minibatches were taken, and the invariants held."""
    [row] = [row for row in read_metrics(Path(run_dir) / "metrics.jsonl") if row["step"] == 1]
    assert row["policy/epochs"] == config.num_ppo_epochs == 2
    assert row["tokens/generated"] / row["response/length"] == config.rollout_batch_size == 256
    assert row["ratio/first_minibatch_max_deviation"] == 0.0
    assert abs(row["kl/penalty_per_response"]) < 1e-6, "the policy starts at its reference"
    assert Path(run_dir, "adapter", "adapter_model.safetensors").is_file()


def test_split_on_two_a100(two_gpus: Any, two_a100: Callable[[str], PPOConfig], console: Any) -> None:
    """GPU for the learner alone, the other one shared by generator and scorer."""
    config = two_a100("ppo_2xa100_split")
    run = ppo(config, console)
    check(config, run.run_dir)
    found = gpus(console.text)
    assert set(found) == {"rank 0", "generator 0", "scorer 0"}
    assert found["generator 0"] == found["scorer 0"] != found["rank 0"]
    assert set(found.values()) == {"0", "1"}


def test_colocate_on_two_a100(two_gpus: Any, two_a100: Callable[[str], PPOConfig], console: Any) -> None:
    """A GPU for each of the two workers, ZeRO 2."""
    config = two_a100("ppo_2xa100_colocate")
    run = ppo(config, console)
    check(config, run.run_dir)
    found = gpus(console.text)
    assert set(found) == {"rank 0", "rank 1"} and set(found.values()) == {"0", "1"}
    assert "colocate, 2 workers, ZeRO 2" in console.text


def test_the_chain_on_24_gb(
    two_gpus: Any, tiny_llama: Callable[..., Path], tmp_path: Path, console: Any, write_jsonl: Write
) -> None:
    """SFT, reward model, PPO and comparison on one 4-bit base, with recomputed activations, by one worker on one GPU."""
    pytest.importorskip("bitsandbytes")
    rows = write_jsonl("alpaca.jsonl", questions(200))
    pairs = [
        {"user_input": q["instruction"], "completion_a": q["output"], "completion_b": "No."} for q in questions(120)
    ]
    changes = [
        f"output_dir={tmp_path / 'chain'}",
        f"model_name_or_path={tiny_llama(context=512)}",
        "dtype=float32",
        *(f"sft.data.train={rows}", "sft.max_steps=2", "sft.max_length=384"),
        *(f"reward.data.train={write_jsonl('pairs.jsonl', pairs)}", "reward.max_steps=2"),
        *(f"ppo.data.train={rows}", "ppo.response_length=16", "ppo.min_response_length=8", "ppo.max_steps=1"),
        *("ppo.data.eval_max_rows=8", "ppo.allow_chance_rewards=true"),
    ]
    config = load(PipelineConfig, JOBS / "alpaca_8b_24gb.yaml", changes)
    run = pipeline(config, console)
    assert run.status == "done"
    assert {"sft/loss", "reward/eval/accuracy", "ppo/reward/mean", "evaluate/reward/sft", "evaluate/reward/ppo"} <= set(
        run.metrics
    )
    for stage in ("sft", "reward", "ppo"):
        manifest = json.loads((tmp_path / "chain" / stage / "manifest.json").read_text())
        assert (manifest["status"], manifest["base"]["precision"]) == ("done", "4bit")
    assert gpus(console.text)["rank 0"] in ("0", "1")
