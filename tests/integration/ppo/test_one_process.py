"""`learner.num_workers: 0`: a whole chain in one process, where Ray cannot be imported, and where no stage keeps its models."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CHAIN = """
import gc, json, sys
sys.modules["ray"] = None  # importing it raises ModuleNotFoundError
sys.modules["datasets"] = None
import torch
from rlhf_ray import PipelineConfig, pipeline
from rlhf_ray.stages import pipeline as module

base, output, rows, pairs = sys.argv[1:]
left = {}

def counted(stage, body):
    def run(config, session):
        gc.disable()  # what is there must be gone, not be on its way
        left[stage] = sum(isinstance(thing, torch.nn.Parameter) for thing in gc.get_objects())
        return body(config, session)
    return run

module.BODIES.update({stage: counted(stage, body) for stage, body in module.BODIES.items()})
small = {"lora": {"r": 2}, "max_steps": 1, "per_device_train_batch_size": 4}
run = pipeline(PipelineConfig(
    output_dir=output, model_name_or_path=base, template="none", report_to=[], learner={"num_workers": 0, "num_threads": 1},
    gradient_checkpointing=True,
    sft={"data": {"train": rows}, "train_batch_size": 8, "max_length": 128, **small},
    reward={"data": {"train": pairs}, "train_batch_size": 8, "max_length": 128, **{k: v for k, v in small.items() if k != "lora"}},
    ppo={"data": {"train": rows, "eval_max_rows": 4}, "rollout_batch_size": 8, "num_mini_batches": 1, "num_ppo_epochs": 1,
         "response_length": 4, "allow_chance_rewards": True, **{k: v for k, v in small.items() if k != "lora"}},
    evaluate={"data": {"train": rows, "eval_max_rows": 4}},
))
left["end"] = sum(isinstance(thing, torch.nn.Parameter) for thing in gc.get_objects())
loaded = sorted({name.partition(".")[0] for name, module in sys.modules.items() if module is not None} & {"ray", "datasets"})
print(json.dumps({"stages": sorted(run.artifacts), "left": left, "loaded": loaded}))
"""


@pytest.mark.integration
def test_a_chain_without_ray_leaves_no_models_behind(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    """On a machine without Ray and datasets, as rented ones are; a second base in memory is what a GPU has no room for."""
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i * 7}."} for i in range(60)]
    pairs = [{"prompt": r["instruction"], "chosen": r["output"], "rejected": "No."} for r in rows]
    for name, some in (("rows", rows), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    arguments = [
        str(tiny_llama()),
        str(tmp_path / "chain"),
        str(tmp_path / "rows.jsonl"),
        str(tmp_path / "pairs.jsonl"),
    ]
    done = subprocess.run([sys.executable, "-c", CHAIN, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert {"sft", "reward", "ppo", "evaluate"} <= set(told["stages"]) and told["loaded"] == []
    assert told["left"] == {"sft": 0, "reward": 0, "ppo": 0, "evaluate": 0, "end": 0}
