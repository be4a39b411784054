"""TRL's side of ppo_step_vs_trl.py and ppo_step_real_lengths.py: FOLDER STEPS THREADS [NEW_TOKENS]. Needs trl==1.12.0 alone.

With NEW_TOKENS replies end at the end token, else they do not end. Prints seconds, CPU seconds and memory as JSON."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

folder, steps, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
new_tokens = int(sys.argv[4]) if len(sys.argv) > 4 else None
torch.set_num_threads(threads)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Watch(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.cpu: list[float] = []
        self.before = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = resident()
        self.on_step_end(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())
        self.cpu.append(time.process_time())


tokenizer = AutoTokenizer.from_pretrained(str(folder / "policy"), padding_side="left")
rows = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
dataset = Dataset.from_list([{"input_ids": tokenizer(row)["input_ids"]} for row in rows])
policy = AutoModelForCausalLM.from_pretrained(str(folder / "policy"), dtype=torch.float32)
reward = AutoModelForSequenceClassification.from_pretrained(str(folder / "reward"), num_labels=1, dtype=torch.float32)
value = AutoModelForSequenceClassification.from_pretrained(str(folder / "reward"), num_labels=1, dtype=torch.float32)
shape: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
value.requires_grad_(False)
inject_adapter_in_model(LoraConfig(**shape), value)
value.score.requires_grad_(True)
watch = Watch()
arguments = PPOConfig(
    output_dir=str(folder / "trl"),
    per_device_train_batch_size=16,
    gradient_accumulation_steps=4,
    num_mini_batches=1,
    num_ppo_epochs=4,
    total_episodes=64 * steps,
    local_rollout_forward_batch_size=64,
    response_length=new_tokens or 64,
    stop_token="eos" if new_tokens else None,
    temperature=0.7,
    learning_rate=1e-4,
    kl_coef=0.05,
    bf16=False,
    gradient_checkpointing=False,
    num_sample_generations=0,
    report_to=[],
    save_strategy="no",
    use_cpu=True,
    disable_tqdm=True,
    logging_strategy="no",
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
seconds, cpu = ([b - a for a, b in pairwise(times)] for times in (watch.times, watch.cpu))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak, "before_bytes": watch.before}))
