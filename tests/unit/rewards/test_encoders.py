"""Encoders as reward models: they read prompt and reply as a pair of texts, as transformers itself would be asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.cli import main
from rlhf_ray.config import EvaluateConfig, PPOConfig, RewardSource
from rlhf_ray.console import NullConsole
from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.plan.job_plan import plan
from rlhf_ray.stages.score import score
from rlhf_ray.stages.start import evaluate, ppo
from tests.encoders import KINDS, POSITIONS

ROWS = [
    {"instruction": "Name a bird.", "input": "", "output": "Robin"},
    {"instruction": "Sum up.", "input": "a tale of two cities", "output": "It was the best of times"},
    {"instruction": "Say [SEP].", "input": "", "output": "[CLS] [SEP]"},
]


def asked_of_transformers(folder: Path, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """A row at a time, without padding: the logit, or the difference of two."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, truncation_side="left")
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found = []
    for pair in pairs:
        inputs = tokenizer(
            *pair, return_tensors="pt", truncation="only_first", max_length=POSITIONS, split_special_tokens=True
        )
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        found.append(float(logits[-1] - (logits[0] if len(logits) == 2 else 0.0)))
    return found


def scores(folder: Path, rows: list[dict[str, str]], tmp_path: Path) -> list[float]:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = RewardSource(model=str(folder))
    found = score(source=source, file=str(tmp_path / "rows.jsonl"), num_threads=1, console=NullConsole())
    return [row["reward"] for row in found]


@pytest.mark.parametrize("kind", KINDS)
def test_it_scores_as_transformers_does(encoder: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    pairs = [("\n\n".join(filter(None, (r["instruction"], r["input"]))), r["output"]) for r in ROWS]
    expected = asked_of_transformers(encoder(kind), pairs)
    assert scores(encoder(kind), ROWS, tmp_path) == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 1e-3


def test_a_prompt_that_is_too_long_loses_its_start(encoder: Callable[..., Path], tmp_path: Path) -> None:
    row = {"instruction": "ab " * POSITIONS, "input": "", "output": "cd " * 10}
    expected = asked_of_transformers(encoder("roberta"), [(row["instruction"], row["output"])])
    assert scores(encoder("roberta"), [row], tmp_path) == pytest.approx(expected, abs=1e-4)
    long = {**row, "output": "cd " * POSITIONS}
    assert scores(encoder("roberta"), [long], tmp_path) == pytest.approx(
        scores(encoder("roberta"), [{**long, "instruction": "no"}], tmp_path)
    )


def test_two_labels_are_one_reward_and_three_are_none(encoder: Callable[..., Path], tmp_path: Path) -> None:
    pairs = [(row["instruction"], row["output"]) for row in ROWS if not row["input"]]
    rows = [row for row in ROWS if not row["input"]]
    expected = asked_of_transformers(encoder("bert", 2), pairs)
    assert scores(encoder("bert", 2), rows, tmp_path) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ArtifactError, match=r"several labels.*got 3"):
        scores(encoder("bert", 3), rows, tmp_path)


def test_one_without_its_head_is_no_reward_model(encoder: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(encoder("bert")).save_pretrained(tmp_path / "headless")
    AutoTokenizer.from_pretrained(encoder("bert")).save_pretrained(tmp_path / "headless")
    with pytest.raises(ArtifactError, match="score head newly initialised"):
        scores(tmp_path / "headless", ROWS, tmp_path)


@pytest.fixture
def job(tiny_llama: Callable[..., Path], encoder: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    """Its base reads 200 tokens, more than the encoder."""
    rows = [{"instruction": f"Name the number after {i}. " + "Take care. " * 8, "input": ""} for i in range(40)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "output_dir": str(tmp_path / "out"),
        "model_name_or_path": str(tiny_llama(context=200)),
        "data": {"train": str(tmp_path / "prompts.jsonl"), "held_out_fraction": 0.3},
        "template": "none",
        "learner": {"num_workers": 0, "num_threads": 1},
        "rewards": [{"name": "helpful", "model": str(encoder("deberta-v2"))}],
        "response_length": 8,
    }


def test_ppo_and_evaluate_are_scored_by_one_and_plan_counts_it(
    job: dict[str, Any], encoder: Callable[..., Path], tmp_path: Path
) -> None:
    small = {"rollout_batch_size": 8, "per_device_train_batch_size": 8, "max_steps": 1, "num_samples_logged": 8}
    planned = plan(PPOConfig(**job, **small))
    run = ppo(PPOConfig(**job, **small), NullConsole())
    samples = [json.loads(line) for line in (Path(run.run_dir) / "samples.jsonl").read_text().splitlines()]
    pairs = [(sample["prompt"], sample["reply"]) for sample in samples]
    assert len(pairs) >= 4
    assert [s["reward"] for s in samples] == pytest.approx(
        asked_of_transformers(encoder("deberta-v2"), pairs), abs=1e-3
    )
    loaded = {path for stage in planned.stages for process in stage.processes for path in process.bases}
    assert loaded == {job["model_name_or_path"], str(encoder("deberta-v2"))}
    policies = [{"name": "base", "policy": "base"}, {"name": "ppo", "policy": run.run_dir}]
    judged = EvaluateConfig(**{**job, "output_dir": str(tmp_path / "eval"), "policies": policies})
    assert plan(judged).stages
    found = evaluate(judged, NullConsole())
    assert Path(found.run_dir, "summary.json").is_file()


def test_a_value_model_cannot_start_from_one(job: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"value.init_from: reward 'helpful' .*is an encoder"):
        ppo(PPOConfig(**job, max_steps=1, value={"init_from": "reward:helpful"}), NullConsole())


def test_the_command_says_what_it_reads(encoder: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["score", "--model", str(encoder("bert", 2)), "--prompt", "Name a bird.", "--completion", "Robin"]
    assert main(words) == 0
    told = capsys.readouterr().err
    assert "prompt and reply are a pair of texts" in told
    assert "has two labels: a reward is the logit of label 1 minus that of label 0" in told
