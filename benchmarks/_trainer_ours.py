"""Our side of trainers_vs_trl.py: WORK FOLDER STEPS THREADS. WORK: sft, dpo or reward (grpo: _ppo_step_ours.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from _watch import Watch

from rlhf_ray.config import DPOConfig, RewardConfig, SFTConfig
from rlhf_ray.console import LocalConsole
from rlhf_ray.stages.start import dpo, reward, sft
from rlhf_ray.supervised import stage

work, folder, steps, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
shape: dict[str, Any] = json.loads((folder / "shape.json").read_text())[work]
watch = Watch()


class Watched(stage.SupervisedTrainer):
    """Tells `watch` first, before anything is logged or saved."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.callback_handler.callbacks.insert(0, watch)


stage.SupervisedTrainer = Watched  # type: ignore[misc]
fields: dict[str, Any] = {
    "output_dir": str(folder / f"ours-{len(list(folder.glob('ours-*')))}"),
    "model_name_or_path": str(folder / "policy"),
    "template": "none",
    "data": {"train": str(folder / shape["rows"]), "held_out_fraction": 0.0},
    "lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]},
    "learner": {"num_workers": 0, "num_threads": threads},
    "train_batch_size": shape["batch"],
    "per_device_train_batch_size": shape["at_once"],
    "max_length": 512,
    "max_steps": steps,
    "save_steps": steps,
    "logging_steps": steps,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "report_to": [],
}
console = LocalConsole(quiet=True)
if work == "sft":
    sft(SFTConfig(**fields, packing=True), console)
elif work == "dpo":
    dpo(DPOConfig(**fields, beta=0.1), console)
else:
    reward(RewardConfig(**fields, init_from="base"), console)
print(watch.told())
