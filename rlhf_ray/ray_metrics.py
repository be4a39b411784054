"""A run's figures for Prometheus: where a run is on Ray, its nodes' metrics ports tell them as `ray_rlhf_ray_run_<name>`.

Few, and per role: how long each phase took, how long each role waited, tokens per second, reward and KL. All others are in
metrics.jsonl and TensorBoard.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

PREFIX = "rlhf_ray_run_"

FIGURES = {
    "reward": ("reward/mean", "raw reward of the step's replies"),
    "kl_per_response": ("kl/k1_per_response", "nats per reply against the reference"),
    "kl_coef": ("kl/coef", "coefficient of the KL penalty"),
    "reply_tokens": ("response/length", "mean reply length"),
    "clip_fraction": ("policy/clip_fraction", "tokens whose ratio was clipped"),
    "entropy": ("policy/entropy", "nats per token"),
    "loss": ("loss", "training loss of SFT, DPO and reward modelling"),
    "eval_reward": ("eval/reward", "raw reward on held-out prompts"),
    "eval_loss": ("eval/loss", "held-out loss"),
    "retries": ("faults/retries", "chunks done again in the step, because an actor was lost"),
    "published_bytes": ("sync/bytes", "size of the adapter that was published"),
}
"""name -> (metric of metrics.py, text)"""
PHASES = ("generate", "score", "update", "publish", "checkpoint", "evaluate", "step")
ROLES = ("generator", "scorer", "learner")
MEMORY = {"learner": "process_peak", "generator": "generator_process_peak", "scorer": "scorer_process_peak"}
OTHERS = {
    "step": ("steps done", ()),
    "phase_seconds": ("wall-clock time of a phase of the step", ("phase",)),
    "idle_share": ("share of the step in which a role had nothing to do", ("role",)),
    "memory_bytes": ("largest resident memory of a role's process so far", ("role",)),
    "device_memory_bytes": ("largest memory of tensors on the learner's GPU so far", ()),
    "tokens_per_second": ("reply tokens sampled per second of the step", ()),
}
"""name -> (text, tags beside the run's name)"""


def metric_tag(text: str) -> str:
    """`text` as a tag of Ray's metrics, which are ASCII: what is not stands as its escape (été is \\xe9t\\xe9)."""
    return text.encode("ascii", "backslashreplace").decode("ascii")


def on_ray() -> bool:
    """Whether this process is part of a Ray cluster. Imports nothing."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


class RunGauges:
    """A tracker like TensorBoard, for a process that is on Ray. run: its name, a tag of every figure."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        texts: dict[str, tuple[str, tuple[str, ...]]] = {
            name: (text, ()) for name, (_, text) in FIGURES.items()
        } | OTHERS
        self._run = metric_tag(run)
        self._gauges = {n: Gauge(PREFIX + n, text, tag_keys=("run", *tags)) for n, (text, tags) in texts.items()}

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Set what `row` holds; what it does not hold keeps its last value."""
        self._set("step", float(step))
        for name, (metric, _) in FIGURES.items():
            if metric in row:
                self._set(name, row[metric])
        for phase in PHASES:
            if f"time/{phase}" in row:
                self._set("phase_seconds", row[f"time/{phase}"], phase=phase)
        for role in ROLES:
            if f"time/idle_{role}" in row:
                self._set("idle_share", row[f"time/idle_{role}"], role=role)
            if f"memory/{MEMORY[role]}" in row:
                self._set("memory_bytes", row[f"memory/{MEMORY[role]}"], role=role)
        if "memory/device_peak" in row:
            self._set("device_memory_bytes", row["memory/device_peak"])
        if row.get("time/step") and "tokens/generated" in row:
            self._set("tokens_per_second", row["tokens/generated"] / row["time/step"])

    def close(self) -> None:
        pass

    def _set(self, name: str, value: float, **tags: str) -> Any:
        self._gauges[name].set(value, tags={"run": self._run, **tags})
