"""The whole chain on real input: SFT on stories, a reward model from preference pairs, PPO on the learned reward.

    python benchmarks/stories_chain.py --output

Reads models/stories260K, text_tinystories_v1_head, pref_stories_sentiment and prompts_tinystories from the folder named by
RLHF_RAY_DATA. PPO sees only the learned reward; VADER's compound, by whose lexicon the pairs were ranked, is watched with weight 0:
what the reward model was to learn, not a judge of its own. SFT leaves out the stories that open with a held-out prompt. For each
seed: the held-out accuracy of the reward model, and VADER's compound of SFT and PPO on the same 128 held-out prompts with the same
random numbers. The baseline is the SFT model.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from _common import data_folder, emit, parser, report, spread
from stories_sentiment import REWARD

from rlhf_ray.config import PPOConfig, RewardConfig, SFTConfig
from rlhf_ray.console import LocalConsole
from rlhf_ray.stages.start import ppo, reward, sft


def jobs(folder: Path, data: Path, seed: int, threads: int) -> tuple[SFTConfig, RewardConfig, PPOConfig]:
    """The three jobs, each reading the run before it."""
    shared: dict[str, Any] = {
        "model_name_or_path": str(data / "models" / "stories260K"),
        "template": "none",
        "seed": seed,
        "learner": {"num_workers": 0, "num_threads": threads},
        "report_to": [],
        "defaults_version": 1,  # as the results were measured
    }
    batch = {"train_batch_size": 32, "per_device_train_batch_size": 32}
    first = SFTConfig(
        output_dir=str(folder / "sft"),
        data={
            "train": str(data / "text_tinystories_v1_head.jsonl.gz"),
            "held_out_prompts": str(data / "prompts_tinystories.jsonl.gz"),  # 98% of its stories open with one of these
        },
        lora={"r": 8, "lora_alpha": 16},
        max_length=256,
        max_steps=40,
        learning_rate=1e-3,
        **batch,
        **shared,
    )
    second = RewardConfig(
        output_dir=str(folder / "reward"),
        sft=str(folder / "sft"),
        data={"train": str(data / "pref_stories_sentiment.jsonl.gz")},
        add_eos_token=False,  # the pairs were cut after a fixed number of tokens: no reply is complete
        max_length=128,
        num_train_epochs=3,
        learning_rate=2e-3,
        **batch,
        **shared,
    )
    third = PPOConfig(
        output_dir=str(folder / "ppo"),
        sft=str(folder / "sft"),
        data={"train": str(data / "prompts_tinystories.jsonl.gz"), "eval_max_rows": 128},
        rewards=[
            {"name": "learned", "run": str(folder / "reward")},
            {"name": "vader", "function": REWARD, "weight": 0.0},
        ],
        rollout_batch_size=128,
        num_mini_batches=4,
        num_ppo_epochs=2,
        per_device_train_batch_size=32,
        response_length=48,
        max_steps=16,
        eval_steps=16,
        learning_rate=1e-3,
        kl_coef=0.5,
        missing_eos_penalty=None,
        **shared,
    )
    return first, second, third


def measure(data: Path, seed: int, threads: int) -> dict[str, Any]:
    """One seed's figures."""
    quiet = LocalConsole(quiet=True)
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        first, second, third = jobs(Path(scratch), data, seed, threads)
        sft(first, quiet)
        judge = reward(second, quiet).metrics
        after = ppo(third, quiet).metrics
        seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "reward_model/accuracy": judge["eval/accuracy"],
        "true_reward/sft": after["eval/reward/vader_start"],
        "true_reward/ppo": after["eval/reward/vader"],
        "learned_reward/sft": after["eval/reward/learned_start"],
        "learned_reward/ppo": after["eval/reward/learned"],
        "kl_k1_per_response/ppo": after["eval/kl_k1_per_response"],
    }


def main() -> None:
    arguments = parser(__doc__, repeats=3, threads=2).parse_args()
    data = data_folder()
    runs = [measure(data, seed, arguments.threads) for seed in range(arguments.repeats)]
    measured = {name: spread([run[name] for run in runs]) for name in runs[0]}
    settings = {
        "model": "stories260K, 260,032 parameters, float32, CPU",
        "seeds": len(runs),
        "true_reward": "VADER compound",
    }
    emit(report("stories_chain", settings, measured, len(runs), arguments.threads), arguments.output)


if __name__ == "__main__":
    main()
