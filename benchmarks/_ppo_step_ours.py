"""Our side of ppo_step_vs_trl.py, ppo_step_real_lengths.py, ppo_to_reward.py and grpo in trainers_vs_trl.py: FOLDER STEPS THREADS
CRITIC (own, shared or none) [FIELDS as JSON].

Prints as JSON, of each step: seconds, CPU seconds of the process, reply tokens, mean score and KL of the replies, share of real
tokens in the update; and memory."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from _watch import resident

from rlhf_ray.config import PPOConfig
from rlhf_ray.console import LocalConsole
from rlhf_ray.metrics import read_metrics
from rlhf_ray.ppo import loop as stage
from rlhf_ray.stages.start import ppo

folder, steps, threads, critic = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
fields: dict[str, Any] = json.loads(sys.argv[5]) if len(sys.argv) > 5 else {}
before: list[int] = []
cpu: list[float] = []


class Watched(stage.PPOLoop):
    """Notes how much memory the process holds when everything is loaded."""

    def run(self) -> None:
        before.append(resident())
        super().run()

    def step(self, step: int) -> dict[str, float]:
        started = time.process_time()
        found = super().step(step)
        cpu.append(time.process_time() - started)
        return found


stage.PPOLoop = Watched  # type: ignore[misc]
common: dict[str, Any] = {
    "output_dir": str(folder / f"ours-{len(list(folder.glob('ours-*')))}"),
    "model_name_or_path": str(folder / "policy"),
    "template": "none",
    "data": {"train": str(folder / "prompts.jsonl"), "held_out_fraction": 0.0},
    "rewards": [{"name": "judge", "model": str(folder / "reward")}],
    "lora": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "adam_epsilon": 1e-5,
    "learner": {"num_workers": 0, "num_threads": threads},
    "rollout_batch_size": 64,
    "num_mini_batches": 1,
    "num_ppo_epochs": 4,
    "per_device_train_batch_size": 16,
    "response_length": 64,
    "max_steps": steps,
    "save_steps": steps,
    "learning_rate": 1e-4,
    "kl_coef": 0.05,
    "temperature": 0.7,
    "missing_eos_penalty": None,
    "num_samples_logged": 0,
    "report_to": [],
}
if critic != "none":  # TRL's algorithm, whatever our defaults are
    common["value"] = {"adapter": critic, "learning_rate": 1e-4, "warmup_steps": 0}
    common["cliprange_value"] = 0.2
config = PPOConfig(**{**common, **fields})
run = ppo(config, LocalConsole(quiet=True))
rows = [row for row in read_metrics(Path(run.run_dir) / "metrics.jsonl") if "time/step" in row]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
told = {
    "seconds": [row["time/step"] for row in rows],
    "cpu_seconds": cpu,
    "reply_tokens": [row["tokens/generated"] for row in rows],
    "scores": [row["reward/mean"] for row in rows],
    "kl": [row["kl/k1_per_response"] for row in rows],
    "phases": {name: [row[f"time/{name}"] for row in rows] for name in ("generate", "score", "update")},
    "real_token_share": [row.get("update/real_token_share") for row in rows],
}
print(json.dumps({**told, "peak_bytes": peak, "before_bytes": before[0]}))
