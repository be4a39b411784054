"""Our side of ppo_step_vs_trl.py: FOLDER STEPS THREADS CRITIC (own or shared). Prints seconds and memory as JSON."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from rlhf_ray.config import PPOConfig
from rlhf_ray.console import LocalConsole
from rlhf_ray.metrics import read_metrics
from rlhf_ray.ppo import loop as stage

folder, steps, threads, critic = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
before: list[int] = []


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Watched(stage.PPOLoop):
    """Notes how much memory the process holds when everything is loaded."""

    def run(self) -> None:
        before.append(resident())
        super().run()


stage.PPOLoop = Watched  # type: ignore[misc]
config = PPOConfig(
    output_dir=str(folder / f"ours-{len(list(folder.glob('ours-*')))}"),
    model_name_or_path=str(folder / "policy"),
    template="none",
    data={"train": str(folder / "prompts.jsonl"), "held_out_fraction": 0.0},
    rewards=[{"name": "judge", "model": str(folder / "reward")}],
    lora={"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    value={"adapter": critic},
    learner={"num_workers": 0, "num_threads": threads},
    rollout_batch_size=64,
    num_mini_batches=1,
    num_ppo_epochs=4,
    per_device_train_batch_size=16,
    response_length=64,
    max_steps=steps,
    save_steps=steps,
    learning_rate=1e-4,
    kl_coef=0.05,
    temperature=0.7,
    missing_eos_penalty=None,
    num_samples_logged=0,
    report_to=[],
    defaults_version=1,  # as the results were measured
)
run = stage.ppo(config, LocalConsole(quiet=True))
seconds = [row["time/step"] for row in read_metrics(Path(run.run_dir) / "metrics.jsonl") if "time/step" in row]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak_bytes": peak, "before_bytes": before[0]}))
