"""One run of plan_memory.py: CASE (JSON) on stdin. Prints measured peaks above the imports, phase by phase, as JSON.

A fresh process. `/proc/self/clear_refs` resets the kernel's record of the peak (VmHWM) at the border of every phase.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  # everything that a run imports later counts as imported
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers import Trainer  # noqa: F401

from rlhf_ray.config import PPOConfig, SFTConfig
from rlhf_ray.console import LocalConsole
from rlhf_ray.ppo import loop as ppo_stage
from rlhf_ray.roles.generator import Generator
from rlhf_ray.roles.learner import Learner
from rlhf_ray.roles.scorer import Scorer
from rlhf_ray.supervised import sft as sft_stage

peaks: dict[str, int] = {}


def status(name: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def reset() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def note(phase: str) -> None:
    peaks[phase] = max(peaks.get(phase, 0), status("VmHWM"))
    reset()


def watched(phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        note("other")
        try:
            return method(*args, **kwargs)
        finally:
            note(phase)

    return call


def main() -> None:
    case = json.load(sys.stdin)
    torch.set_num_threads(case["threads"])
    torch.randn(256, 256) @ torch.randn(256, 256)  # the matrix library and its threads are imports, too
    reset()
    before = status("VmRSS")
    if case["stage"] == "ppo":
        Generator.generate = watched("sampling", Generator.generate)  # type: ignore[method-assign]
        Scorer.score_at = watched("scoring", Scorer.score_at)  # type: ignore[method-assign]
        Learner.evaluate = watched("evaluation", Learner.evaluate)  # type: ignore[method-assign]
        Learner.update = watched("update", Learner.update)  # type: ignore[method-assign]
        run: Callable[[], Any] = lambda: ppo_stage.ppo(PPOConfig(**case["job"]), LocalConsole(quiet=True))  # noqa: E731
    else:
        run = lambda: sft_stage.sft(SFTConfig(**case["job"]), LocalConsole(quiet=True))  # noqa: E731
    run()
    note("other")
    peak = max(peaks.values())
    print(json.dumps({"before": before, "peak": peak - before, **{f"{k}": v - before for k, v in peaks.items()}}))


if __name__ == "__main__":
    main()
