"""TRL's side of ppo_step_vs_trl.py, ppo_step_real_lengths.py and ppo_to_reward.py: FOLDER STEPS THREADS [SETTINGS as JSON]. Needs
trl==1.12.0 alone.

SETTINGS: new_tokens (replies then end at the end token, else they do not end), prompts, epochs, at_once, lora (peft's fields), and
`arguments`, further fields of TRL's PPOConfig. Prints as JSON what `_watch.Watch` has seen, and of each step the tokens of its
replies, their mean score and KL."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from _watch import Watch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

folder, steps, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
settings: dict[str, Any] = json.loads(sys.argv[4]) if len(sys.argv) > 4 else {}
new_tokens, prompts = settings.get("new_tokens"), settings.get("prompts", 64)
at_once = settings.get("at_once", 16)
torch.set_num_threads(threads)
replies: list[int] = []
truncate = ppo_trainer.truncate_response


def truncate_and_count(stop: int, pad: int, response: Any) -> Any:
    """TRL's own, which is called with the replies of every step; notes how many tokens they have, the end included."""
    found = truncate(stop, pad, response)
    replies.append(int((found != pad).sum()))
    return found


ppo_trainer.truncate_response = truncate_and_count


tokenizer = AutoTokenizer.from_pretrained(str(folder / "policy"), padding_side="left")
rows = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
dataset = Dataset.from_list([{"input_ids": tokenizer(row)["input_ids"]} for row in rows])
policy = AutoModelForCausalLM.from_pretrained(str(folder / "policy"), dtype=torch.float32)
reward = AutoModelForSequenceClassification.from_pretrained(str(folder / "reward"), num_labels=1, dtype=torch.float32)
value = AutoModelForSequenceClassification.from_pretrained(str(folder / "reward"), num_labels=1, dtype=torch.float32)
shape: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
shape |= settings.get("lora", {})
value.requires_grad_(False)
inject_adapter_in_model(LoraConfig(**shape), value)
value.score.requires_grad_(True)
logged: dict[str, list[float]] = {"scores": [], "kl": []}


class WatchScores(Watch):
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for name, values in logged.items():
            if f"objective/{name}" in (logs or {}):
                values.append(logs[f"objective/{name}"])


watch = WatchScores()
arguments = PPOConfig(
    **{
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": prompts // at_once,
        "num_mini_batches": 1,
        "num_ppo_epochs": settings.get("epochs", 4),
        "total_episodes": prompts * steps,
        "local_rollout_forward_batch_size": prompts,
        "response_length": new_tokens or 64,
        "stop_token": "eos" if new_tokens else None,
        "temperature": 0.7,
        "learning_rate": 1e-4,
        "kl_coef": 0.05,
        "bf16": False,
        "gradient_checkpointing": False,
        "num_sample_generations": 0,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        **settings.get("arguments", {}),
    }
)
trainer = PPOTrainer(
    args=arguments,
    processing_class=tokenizer,
    model=policy,
    ref_model=None,
    reward_model=reward,
    value_model=value,
    train_dataset=dataset,
    eval_dataset=dataset.select(range(64)),
    data_collator=DataCollatorWithPadding(tokenizer),
    peft_config=LoraConfig(task_type="CAUSAL_LM", **shape),
    callbacks=[watch],
)
trainer.train()
print(watch.told(reply_tokens=replies, **logged))
