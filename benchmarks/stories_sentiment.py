"""PPO on real input: a pretrained 260 k-parameter Llama learns to end stories happily, rewarded by VADER.

    python benchmarks/stories_sentiment.py --output

Reads models/stories260K and prompts_tinystories from the folder named by RLHF_RAY_DATA. For each seed: held-out mean compound
before and after, its standard error, KL per response, seconds. The baseline is the model before PPO, on the same prompts with
the same random numbers.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from _common import data_folder, emit, parser, report, spread

from rlhf_ray.config import PPOConfig
from rlhf_ray.console import LocalConsole
from rlhf_ray.stages.start import ppo

REWARD = f"{Path(__file__).with_name('vader_reward.py')}:score"


def job(folder: Path, data: Path, seed: int, steps: int, threads: int) -> PPOConfig:
    return PPOConfig(
        output_dir=str(folder),
        model_name_or_path=str(data / "models" / "stories260K"),
        template="none",
        seed=seed,
        data={"train": str(data / "prompts_tinystories.jsonl.gz"), "eval_max_rows": 128},
        rewards=[{"name": "vader", "function": REWARD}],
        lora={"r": 8, "lora_alpha": 16},
        learner={"num_workers": 0, "num_threads": threads},
        stop_token_ids=[1],
        rollout_batch_size=128,
        num_mini_batches=4,
        num_ppo_epochs=2,
        per_device_train_batch_size=32,
        response_length=48,
        max_steps=steps,
        eval_steps=steps,
        learning_rate=1e-3,
        kl_coef=0.03,
        missing_eos_penalty=None,
        report_to=[],
        defaults_version=1,  # as the results were measured
    )


def measure(data: Path, seed: int, steps: int, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        run = ppo(job(Path(scratch) / "run", data, seed, steps, threads), LocalConsole(quiet=True))
        seconds = time.perf_counter() - started
    names = ("eval/reward_start", "eval/reward", "eval/reward_se", "eval/kl_k1_per_response", "eval/kl_k3_per_response")
    return {"seconds": seconds, **{name: run.metrics[name] for name in names}}


def main() -> None:
    options = parser(__doc__, repeats=3, threads=2)
    options.add_argument("--steps", type=int, default=24, help="PPO steps of 128 replies (default 24)")
    arguments = options.parse_args()
    data = data_folder()
    runs = [measure(data, seed, arguments.steps, arguments.threads) for seed in range(arguments.repeats)]
    measured = {name: spread([run[name] for run in runs]) for name in runs[0]}
    settings = {"model": "stories260K, 260,032 parameters, float32, CPU", "steps": arguments.steps, "seeds": len(runs)}
    emit(report("stories_sentiment", settings, measured, len(runs), arguments.threads), arguments.output)


if __name__ == "__main__":
    main()
