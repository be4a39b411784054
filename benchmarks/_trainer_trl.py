"""TRL's side of trainers_vs_trl.py: WORK FOLDER STEPS THREADS. Needs TRL alone (and the folder of this file for _watch).

WORK: grpo, sft, dpo or reward. Prints as JSON what `_watch.Watch` has seen."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import trl
from _watch import Watch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

work, folder, steps, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
shape: dict[str, Any] = json.loads((folder / "shape.json").read_text())[work]
torch.set_num_threads(threads)
tokenizer = AutoTokenizer.from_pretrained(str(folder / "policy"))
rows = [json.loads(line) for line in (folder / shape["rows"]).read_text().splitlines()]
common: dict[str, Any] = {
    "output_dir": str(folder / "trl"),
    "max_steps": steps,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "gradient_accumulation_steps": shape["batch"] // shape["at_once"],
    "per_device_train_batch_size": shape["at_once"],
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": steps,
    "use_cpu": True,
    "disable_tqdm": True,
}
lora: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
watch = Watch()
given: dict[str, Any] = {
    "processing_class": tokenizer,
    "train_dataset": Dataset.from_list(rows),
    "callbacks": [watch],
    "peft_config": LoraConfig(task_type="SEQ_CLS" if work == "reward" else "CAUSAL_LM", **lora),
}


def policy() -> Any:
    return AutoModelForCausalLM.from_pretrained(str(folder / "policy"), dtype=torch.float32)


def judge() -> Any:
    return AutoModelForSequenceClassification.from_pretrained(str(folder / "reward"), num_labels=1, dtype=torch.float32)


if work == "sft":  # packed rows of max_length tokens, as many tokens in a pass as the other side's rows have on average
    packed = {**common, "per_device_train_batch_size": 1, "gradient_accumulation_steps": shape["passes"]}
    args: Any = trl.SFTConfig(**packed, packing=True, max_length=shape["pass_tokens"])
    trainer: Any = trl.SFTTrainer(model=policy(), args=args, **given)
elif work == "dpo":
    trainer = trl.DPOTrainer(model=policy(), args=trl.DPOConfig(**common, max_length=512, beta=0.1), **given)
elif work == "reward":
    trainer = trl.RewardTrainer(model=judge(), args=trl.RewardConfig(**common, max_length=512), **given)
else:
    args = trl.GRPOConfig(
        **common,
        num_generations=shape["num_generations"],
        max_completion_length=shape["new_tokens"],
        temperature=0.7,
        top_k=0,
        beta=0.05,
        loss_type="dapo",
    )
    trainer = trl.GRPOTrainer(
        model=policy(), args=args, reward_funcs=judge(), reward_processing_classes=tokenizer, **given
    )
trainer.train()
logs = [row for row in trainer.state.log_history if "num_tokens" in row or "completions/mean_length" in row]
tokens = logs[-1].get("num_tokens") if logs else None
print(
    watch.told(
        trl=trl.__version__, tokens=tokens, reply_tokens=logs[-1].get("completions/mean_length") if logs else None
    )
)
