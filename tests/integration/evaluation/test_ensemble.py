"""An ensemble of reward models of different seeds: as a judge, as PPO's reward, and as what watches it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rlhf_ray.config import EvaluateConfig, PPOConfig, RewardConfig
from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.stages.generate import generate
from rlhf_ray.stages.start import evaluate, ppo, reward
from rlhf_ray.storage.run import load_run

from .conftest import Chain

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def runs(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """runs(seed, held_out_fraction=0.4) -> a reward run on the chain's pairs."""
    from rlhf_ray.console import NullConsole

    root, made = tmp_path_factory.mktemp("seeds"), dict[str, str]()

    def train(seed: int, held_out_fraction: float = 0.4) -> str:
        name = f"seed_{seed}_{held_out_fraction}"
        if name not in made:
            fields = {"max_steps": 3, "max_length": 120, "learning_rate": 1e-2, "lora": {"r": 4, "lora_alpha": 16}}
            fields |= {"train_batch_size": 8, "per_device_train_batch_size": 8}
            data = {"train": chain.pairs, "held_out_fraction": held_out_fraction}
            config = RewardConfig(output_dir=str(root / name), data=data, seed=seed, **fields, **chain.job)
            made[name] = reward(config, NullConsole()).run_dir
        return made[name]

    return train


def replies(run_dir: str, policy: str) -> list[dict[str, float]]:
    lines = (Path(run_dir) / "results.jsonl").read_text().splitlines()
    return [json.loads(line)["replies"][policy]["rewards"] for line in lines]


def test_it_judges_by_what_its_members_say(
    runs: Callable[..., str], evaluation: Callable[..., EvaluateConfig], tmp_path: Path, console: Any
) -> None:
    """Reply by reply: a member scores what the run scores alone, and mean, std and minimum are those of three numbers."""
    members = [runs(seed) for seed in (1, 2, 3)]
    alone = [{"name": f"alone_{i}", "run": run, "normalize": True, "weight": 0.0} for i, run in enumerate(members, 1)]
    apart = {"name": "apart", "ensemble": members, "std_coef": 0.5}
    lowest = {"name": "lowest", "ensemble": members, "aggregate": "min", "weight": 0.0}
    run = evaluate(evaluation(tmp_path / "e", rewards=[apart, lowest, *alone], judge="lowest"), console)
    for row in replies(run.run_dir, "sft"):
        each = [row[f"apart/{i}"] for i in (1, 2, 3)]
        assert each == pytest.approx([row[f"alone_{i}"] for i in (1, 2, 3)], rel=1e-5)
        assert row["apart/std"] == pytest.approx(statistics.pstdev(each), rel=1e-4) and row["apart/std"] > 0.01
        assert row["apart"] == pytest.approx(statistics.fmean(each) - 0.5 * statistics.pstdev(each), rel=1e-4)
        assert row["lowest"] == min(each)
    means = [row["apart/std"] for row in replies(run.run_dir, "sft")]
    assert run.metrics["reward/apart/std/sft"] == pytest.approx(statistics.fmean(means), rel=1e-5)
    assert json.loads((Path(run.run_dir) / "comparisons.json").read_text())["judge"] == "lowest"
    assert "apart: ensemble of 3: mean minus 0.5 standard deviations over members (1/n)" in console.text
    assert "lowest: ensemble of 3: the lowest member, weight 0" in console.text
    assert console.text.count("normalised to 0 and 1") == 9
    assert "reward/apart/std" in (Path(run.run_dir) / "report.html").read_text()


def job(chain: Chain, folder: Path, *rewards: dict[str, Any], **changes: Any) -> PPOConfig:
    fields: dict[str, Any] = {
        **chain.job,
        "output_dir": str(folder),
        "data": {"train": chain.prompts, "held_out_fraction": 0.4, "eval_max_rows": 8},
        "sft": chain.sft,
        "rewards": rewards,
        "rollout_batch_size": 8,
        "per_device_train_batch_size": 8,
        "num_mini_batches": 1,
        "num_ppo_epochs": 1,
        "response_length": 8,
        "max_steps": 2,
        "learning_rate": 1e-2,
    }
    return PPOConfig(**{**fields, **changes})


def test_ppo_maximises_one_and_goes_by_another(
    chain: Chain, runs: Callable[..., str], tmp_path: Path, console: Any
) -> None:
    """One run holds every role: members are recorded as parents, the value model starts from the one that is named, best step and
    limits go by the ensemble that watches, the report draws the members, and `generate` scores by both as well."""
    config = job(
        chain,
        tmp_path / "ppo",
        {"name": "rm", "ensemble": [runs(1), runs(2)], "aggregate": "min"},
        {"name": "others", "ensemble": [runs(3), chain.reward], "weight": 0.0},
        watch="others",
        over_optimisation_patience=2,
        load_best_model_at_end=True,
        value={"init_from": "reward:rm/2", "learning_rate": 1e-12},
    )
    run = ppo(config, console)
    metrics = run.metrics
    assert metrics["reward/mean"] == pytest.approx(metrics["reward/rm"]) and metrics["reward/rm/std"] > 0
    assert metrics["reward/rm"] < min(metrics["reward/rm/1"], metrics["reward/rm/2"]) + 1e-6
    evaluated = {"others", "others/1", "others/2", "others/std", "rm", "rm/1", "rm/2", "rm/std"}
    assert {
        n.removeprefix("eval/reward/") for n in metrics if n.startswith("eval/reward/") and "_start" not in n
    } == evaluated
    parents = {
        p["role"]: Path(p["path"]).parent
        for p in json.loads((Path(run.run_dir) / "manifest.json").read_text())["parents"]
    }
    assert parents == {
        "reference": Path(chain.sft),
        "rm/1": Path(runs(1)),
        "rm/2": Path(runs(2)),
        "others/1": Path(runs(3)),
        "others/2": Path(chain.reward),
    } | {role: path for role, path in parents.items() if role == "policy"}
    start = load_file(Path(runs(2)) / "adapter/adapter_model.safetensors")
    value = load_file(Path(run.run_dir) / "value/adapter_model.safetensors")
    assert all(value[name].allclose(start[name], atol=1e-6) for name in start if "lora_" in name)
    assert "Members of ensemble rm" in (Path(run.run_dir) / "report.html").read_text()
    assert load_run(run.run_dir).metrics == metrics
    (row,) = generate(policies=[run.run_dir], instruction="Name the oak.", max_new_tokens=8, console=console)
    assert isinstance(row["reward"], float) and not [w for w in console.warnings if "rm" in w or "others" in w]


def test_a_member_of_another_chain_is_refused(
    chain: Chain, runs: Callable[..., str], tmp_path: Path, console: Any,
    tiny_run: Callable[..., Path], tiny_llama: Callable[..., Path],
) -> None:  # fmt: skip
    """One line each: a member that trained on held-out prompts, one on another base, one that is the same adapter elsewhere, one
    that is a whole checkpoint, and one that recorded no held-out scores."""

    def refused(error: type[Exception], second: str | Path) -> str:
        asked = job(chain, tmp_path / "ppo", {"name": "rm", "ensemble": [runs(1), str(second)]})
        with pytest.raises(error) as told:
            ppo(asked.model_copy(update={"allow_chance_rewards": True}), console)
        (line,) = str(told.value).splitlines()
        return line

    line = refused(ConfigError, runs(1, 0.1))
    assert (
        "reward:rm/2" in line
        and "held out by data.held_out_fraction 0.1, this stage by data.held_out_fraction 0.4" in line
    ), line
    other = tiny_run(tmp_path / "other", tiny_llama(context=128, seed=5), stage="reward")
    assert "rm/2" in refused(ArtifactError, other) and "base" in refused(ArtifactError, other)
    (tmp_path / "link").symlink_to(runs(1))
    assert "hold the same adapter" in refused(ArtifactError, tmp_path / "link")
    assert "rewards.rm.ensemble: a member is a whole checkpoint" in refused(ArtifactError, chain.base)
    plain = tiny_run(tmp_path / "plain", Path(chain.base), stage="reward")
    assert "rewards.rm/2.normalize: the reward run recorded no held-out scores" in refused(ConfigError, plain)
