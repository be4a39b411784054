"""The user's own DeepSpeed JSON: which of its keys are taken, and which are fields of the job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_ray.errors import ConfigError, Problem

OUR_KEYS = {
    "fp16": "dtype",
    "bf16": "dtype",
    "data_types": "dtype",
    "amp": "dtype",
    "torch_autocast": "dtype",
    "train_batch_size": "rollout_batch_size and num_mini_batches",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "num_mini_batches and per_device_train_batch_size",
    "optimizer": "optim",
    "scheduler": "lr_scheduler_type",
    "gradient_clipping": "max_grad_norm",
}


def read_deepspeed_json(path: str, zero_stage: int) -> dict[str, Any]:
    """DeepSpeed's settings by name, without `zero_optimization.stage`, which learner.zero_stage says.

    Raises ConfigError, with everything that is wrong, for a file that is no JSON object, for keys that are fields of the job, and
    for a stage that contradicts `zero_stage`."""
    theirs, problems = _read(path, zero_stage)
    ConfigError.raise_all(problems)
    return theirs


def deepspeed_problems(path: str, zero_stage: int) -> list[Problem]:
    """What `read_deepspeed_json` would raise."""
    return _read(path, zero_stage)[1]


def _read(path: str, zero_stage: int) -> tuple[dict[str, Any], list[Problem]]:
    expected = "DeepSpeed settings by name"
    try:
        theirs = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        return {}, [Problem("learner.deepspeed", f"cannot read {path}: {error}", "a DeepSpeed JSON file")]
    if not isinstance(theirs, dict):
        return {}, [Problem(path, "not a JSON object", expected)]
    problems = [
        Problem(path, f"{key} is set by the job, not by the DeepSpeed file", fix=f"remove it and set {OUR_KEYS[key]}")
        for key in theirs
        if key in OUR_KEYS
    ]
    zero = theirs.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return {}, [*problems, Problem(path, "zero_optimization is not a JSON object", expected)]
    stage = zero.get("stage", zero_stage)
    if stage != zero_stage:
        problems.append(
            Problem(
                path,
                "zero_optimization.stage contradicts learner.zero_stage",
                str(zero_stage),
                str(stage),
                f"remove it, or set learner.zero_stage={stage}",
            )
        )
    rest = {key: value for key, value in zero.items() if key != "stage"}
    return {**theirs, **({"zero_optimization": rest} if "zero_optimization" in theirs else {})}, problems
