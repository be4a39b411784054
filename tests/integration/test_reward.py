"""Reward modelling from job to run folder, on tiny models, in this process and under Ray."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config import RewardConfig, SFTConfig
from rlhf_ray.errors import ArtifactError, ConfigError, DataError
from rlhf_ray.metrics import read_metrics
from rlhf_ray.models.adapters import HEAD_KEY
from rlhf_ray.stages.start import reward, sft
from rlhf_ray.storage.run import Run, load_run
from tests.runs import weights, yes_or_no

pytestmark = pytest.mark.integration
Write = Callable[[str, Iterable[dict[str, Any]]], str]

SCORES = """
import json, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
base, adapter, rows = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    print(json.dumps([float(model(torch.tensor([ids])).logits[0, 0]) for ids in rows]))
"""


@pytest.fixture
def make_config(supervised_job: Callable[..., RewardConfig]) -> Callable[..., RewardConfig]:
    def make(rows: int = 120, data: dict[str, Any] | None = None, **values: Any) -> RewardConfig:
        data = {"held_out_fraction": 0.3, **(data or {})}
        return supervised_job(RewardConfig, "reward", yes_or_no(rows), data=data, **values)

    return make


@pytest.fixture
def sft_run(supervised_job: Callable[..., SFTConfig], console: Any) -> Run:
    rows = [{"instruction": f"Is {i} a number?", "input": "", "output": "yes"} for i in range(20)]
    lora = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    small = {"lora": lora, "train_batch_size": 8, "per_device_train_batch_size": 8, "max_steps": 3, "eval_steps": None}
    return sft(supervised_job(SFTConfig, "sft", rows, data={"held_out_fraction": 0.3}, **small), console)


def manifest_of(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(run.run_dir) / "manifest.json").read_text())
    return found


def test_margins_of_the_data_widen_the_gap_and_centring_moves_the_scores_to_0(
    make_config: Callable[..., RewardConfig], write_jsonl: Write, console: Any, tmp_path: Path
) -> None:
    wide = write_jsonl("wide.jsonl", [{**row, "margin": 3.0} for row in yes_or_no(120)])
    common: dict[str, Any] = {"max_steps": 12, "eval_steps": 12, "learning_rate": 2e-2}
    runs = {
        "plain": make_config(output_dir=str(tmp_path / "plain"), **common),
        "wide": make_config(output_dir=str(tmp_path / "wide"), data={"train": wide}, **common),
        "centred": make_config(output_dir=str(tmp_path / "centred"), center_rewards_coefficient=1.0, **common),
    }
    done = {name: reward(config, console) for name, config in runs.items()}
    assert done["wide"].metrics["eval/margin"] > done["plain"].metrics["eval/margin"] + 0.5
    means = {name: abs(manifest_of(run)["reward"]["held_out_scores"]["mean"]) for name, run in done.items()}
    assert means["centred"] < means["plain"]


def test_a_margin_that_is_no_number_is_a_row_fault(
    make_config: Callable[..., RewardConfig], write_jsonl: Write, console: Any
) -> None:
    bad = write_jsonl("bad.jsonl", [{**row, "margin": "much"} for row in yes_or_no(40)])
    with pytest.raises(DataError, match=r"bad.jsonl:1: 'margin': expected a finite number, got 'much'"):
        reward(make_config(data={"train": bad}), console)


def test_it_starts_from_the_sft_adapter_and_says_so(
    make_config: Callable[..., RewardConfig], sft_run: Run, console: Any
) -> None:
    """Seeds F35: a reward model on the raw base. With next to no learning rate, the result is the SFT adapter."""
    run = reward(make_config(sft=sft_run.run_dir, learning_rate=1e-9), console)
    trained, start = weights(run), weights(sft_run)
    assert trained.keys() == start.keys() | {HEAD_KEY}
    assert all((trained[n] - t).abs().max() < 1e-6 for n, t in start.items())
    config = json.loads((run.adapter_dir / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 8, ["q_proj", "v_proj"])
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    (parent,) = manifest_of(run)["parents"]
    assert parent["role"] == "sft" and parent["path"] == str(sft_run.adapter_dir)
    assert f"a copy of {sft_run.adapter_dir}" in console.text


def test_plain_peft_gives_the_scores_in_the_manifest(
    make_config: Callable[..., RewardConfig], sft_run: Run, console: Any, run_without_us: Callable[..., Any]
) -> None:
    """Seeds F26: a head that is lost or newly initialised on the way."""
    config = make_config(sft=sft_run.run_dir, max_steps=20, eval_steps=10)
    run = reward(config, console)
    fixture = manifest_of(run)["reward"]["fixture"]
    assert len(fixture) == 8 and all(row["input_ids"][-1] == 2 for row in fixture)  # both replies, with eos
    expected = [row["score"] for row in fixture]
    assert max(expected) - min(expected) > 0.5
    ids = json.dumps([row["input_ids"] for row in fixture])
    scores = run_without_us(SCORES, config.model_name_or_path, str(run.adapter_dir), ids)
    assert scores == pytest.approx(expected, abs=1e-4)


def test_it_learns_to_tell_better_from_worse(make_config: Callable[..., RewardConfig], console: Any) -> None:
    run = reward(make_config(rows=240, max_steps=40, eval_steps=20, init_from="base"), console)
    found = run.metrics
    assert found["eval/accuracy"] > 0.95 and found["accuracy"] > 0.95
    assert found["eval/accuracy_low"] > 0.8 and found["eval/accuracy_low"] < found["eval/accuracy"]
    assert found["eval/accuracy"] <= found["eval/accuracy_high"] <= 1.0
    assert found["eval/margin"] > 1.0 and found["eval/loss"] < 0.3 < math.log(2) / 2
    assert 0.3 < found["eval/label_positive_rate"] < 0.7
    assert found["eval/true_positive_rate"] > 0.9 > 0.1 > found["eval/false_positive_rate"]
    score = manifest_of(run)["reward"]["held_out_scores"]
    assert score["replies"] == 2 * found["eval/rows"] and score["std"] > 0.5
    rows = read_metrics(Path(run.run_dir) / "metrics.jsonl")
    assert [r["step"] for r in rows if "eval/accuracy" in r] == [20, 40]
    assert load_run(run.run_dir) == run


def test_every_pair_is_used_once_an_epoch(make_config: Callable[..., RewardConfig], console: Any) -> None:
    """Seeds F28, F29: no cap, and what is held out is not trained on."""
    config = make_config(rows=150, max_steps=-1, per_device_train_batch_size=8)
    run = reward(config, console)
    held_out = int(run.metrics["eval/rows"])
    assert 0 < held_out < 150
    assert run.steps == -(-(150 - held_out) // 16)
    assert f"150 rows: {150 - held_out} train, {held_out} held out" in console.text


def test_without_eos_the_sequences_end_with_the_reply(make_config: Callable[..., RewardConfig], console: Any) -> None:
    run = reward(make_config(init_from="base", add_eos_token=False), console)
    entry = manifest_of(run)["reward"]
    assert entry["add_eos_token"] is False and all(row["input_ids"][-1] != 2 for row in entry["fixture"])


def test_the_best_step_is_kept_with_its_head(make_config: Callable[..., RewardConfig], console: Any) -> None:
    config = make_config(
        init_from="base", max_steps=10, eval_steps=1, learning_rate=0.3, load_best_model_at_end=True
    )  # fmt: skip
    run = reward(config, console)
    best = int(run.metrics["best/step"])
    rows = {r["step"]: r for r in read_metrics(Path(run.run_dir) / "metrics.jsonl") if "eval/loss" in r}
    assert best < 10 and run.metrics["eval/accuracy"] == rows[best]["eval/accuracy"]
    saved = weights(run, f"checkpoints/step_{best:06d}/adapter")
    assert all(torch.equal(saved[n], t) for n, t in weights(run).items())


def test_two_runs_of_a_job_are_equal_bit_for_bit(
    make_config: Callable[..., RewardConfig], console: Any, tmp_path: Path
) -> None:
    runs = [reward(make_config(output_dir=str(tmp_path / n), init_from="base"), console) for n in ("one", "two")]
    assert all(torch.equal(t, weights(runs[1])[n]) for n, t in weights(runs[0]).items())


class TestRefused:
    def test_an_sft_run_with_another_template(
        self, make_config: Callable[..., RewardConfig], sft_run: Run, console: Any
    ) -> None:
        """Seeds F34, template mismatch."""
        config = make_config(sft=sft_run.run_dir, template="alpaca_short")
        with pytest.raises(ArtifactError, match="another prompt template"):
            reward(config, console)
        assert not Path(config.output_dir).exists()

    def test_an_sft_run_on_another_base(
        self, make_config: Callable[..., RewardConfig], sft_run: Run, tiny_llama: Callable[..., Path], console: Any
    ) -> None:
        with pytest.raises(ArtifactError, match="another base"):
            reward(make_config(sft=sft_run.run_dir, model=str(tiny_llama(seed=5))), console)

    def test_a_whole_checkpoint_as_sft(
        self, make_config: Callable[..., RewardConfig], tiny_llama: Callable[..., Path], console: Any
    ) -> None:
        with pytest.raises(ConfigError, match="is not a run or an adapter"):
            reward(make_config(sft=str(tiny_llama())), console)

    def test_settings_without_an_effect(self, make_config: Callable[..., RewardConfig], console: Any) -> None:
        with pytest.raises(ConfigError) as caught:
            reward(make_config(sft="x", init_from="base", trainer={"label_smoothing_factor": 0.1}), console)
        assert len(caught.value.problems) == 2

    def test_fewer_pairs_than_a_batch(self, make_config: Callable[..., RewardConfig], console: Any) -> None:
        with pytest.raises(DataError, match="< global batch 16"):
            reward(make_config(rows=10), console)


def test_without_an_sft_model_the_header_warns(make_config: Callable[..., RewardConfig], console: Any) -> None:
    reward(make_config(), console)
    assert any("starts from the base" in line for line in console.warnings)


@pytest.mark.slow
def test_a_ray_worker_trains_what_this_process_trains(
    make_config: Callable[..., RewardConfig], console: Any, tmp_path: Path, four_cpus: Any
) -> None:
    common: dict[str, Any] = {"init_from": "base", "per_device_train_batch_size": 4, "rows": 60}
    alone = reward(make_config(output_dir=str(tmp_path / "alone"), **common), console)
    group = make_config(output_dir=str(tmp_path / "group"), learner={"num_workers": 2, "num_threads": 1}, **common)
    run = reward(group, console)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(run)[name], tensor, atol=2e-5, rtol=1e-3)
    for name in ("eval/loss", "eval/margin", "accuracy", "loss"):
        assert run.metrics[name] == pytest.approx(alone.metrics[name], rel=1e-4), name


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "rows"), [("pref_hh_helpful_base_test.jsonl.gz", 2348), ("pref_comparison_gpt4_1095.jsonl.gz", 1095)]
)
def test_reward_on_real_pairs(
    file: str, rows: int, data_dir: Path, make_config: Callable[..., RewardConfig], console: Any
) -> None:
    config = make_config(
        model=str(data_dir / "models/stories260K"),
        data={"train": str(data_dir / file), "eval_max_rows": 48, "held_out_fraction": 0.1},
        init_from="base",
        max_length=256,
        max_steps=8,
        eval_steps=8,
        per_device_train_batch_size=8,
    )
    run = reward(config, console)
    assert f"{rows:,} rows: " in console.text and "dropped: over max_length 256" in console.text
    assert run.metrics["eval/rows"] == 48
    assert 0.0 <= run.metrics["eval/accuracy_low"] <= run.metrics["eval/accuracy"] <= 1.0
    assert math.isfinite(run.metrics["eval/length_correlation"]) and run.metrics["eval/loss"] < 2.0


@pytest.mark.data
@pytest.mark.slow
def test_sentiment_pairs_are_learnt(data_dir: Path, make_config: Callable[..., RewardConfig], console: Any) -> None:
    """Stories ranked by word sentiment: a plain prototype reached 0.90 on a random split."""
    config = make_config(
        model=str(data_dir / "models/stories260K"),
        data={"train": str(data_dir / "pref_stories_sentiment.jsonl.gz"), "held_out_fraction": 0.1},
        init_from="base",
        max_length=256,
        max_steps=40,
        eval_steps=40,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
    )
    assert reward(config, console).metrics["eval/accuracy"] > 0.75
