"""The chain as a person types it: with merges between the stages, as both ancestors have it, and without."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.metrics import read_metrics

pytestmark = pytest.mark.integration

LOGITS = """
import json, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.tensor([list(range(60, 76))])
with torch.no_grad():
    before = base(ids).logits
    after = PeftModel.from_pretrained(base, sys.argv[2]).eval()(ids).logits
print(json.dumps({"moved": float((after - before).abs().max()), "sum": float(after.double().sum())}))
"""


def parents(run: str) -> dict[str, str]:
    return {p["role"]: p["path"] for p in json.loads((Path(run) / "manifest.json").read_text())["parents"]}


def test_five_steps_with_merged_checkpoints(
    jobs: dict[str, str],
    run_command: Callable[..., None],
    run_without_us: Callable[..., Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Seed 2's workflow (SFT, merge, reward model, merge, PPO): two bases, and the result stands on the merged SFT model.

    F38: its reference, the base with adapters off, is the merged SFT model, and the KL to it starts at 0."""
    run_command("sft", jobs["sft"])
    run_command("merge", "runs/sft")
    merged = str(tmp_path / "runs" / "sft-adapter-merged")
    run_command("reward", jobs["reward"], f"model_name_or_path={merged}", "sft=null", "lora.r=4")
    run_command("merge", "runs/reward")
    judge = str(tmp_path / "runs" / "reward-adapter-merged")
    rewards = f'rewards=[{{"name": "helpful", "model": "{judge}"}}]'
    run_command("ppo", jobs["ppo"], f"model_name_or_path={merged}", "sft=null", "lora.r=4", rewards)
    said = capfd.readouterr().err
    assert "2 loaded (one per distinct checkpoint)" in said and "reference  the base, adapters off" in said
    assert "value      fresh adapter on the trunk of helpful" in said
    first = read_metrics(tmp_path / "runs" / "ppo" / "metrics.jsonl")[1]
    assert abs(first["kl/k1_per_response"]) < 1e-4, "the policy starts as the merged SFT model"
    assert parents("runs/ppo")["helpful"] == judge
    found = run_without_us(LOGITS, merged, str(tmp_path / "runs" / "ppo" / "adapter"))
    assert found["moved"] > 1e-3


def test_the_same_without_merging(
    jobs: dict[str, str],
    run_command: Callable[..., None],
    run_without_us: Callable[..., Any],
    tmp_path: Path,
    tiny_llama: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One base, four adapters on it; the result is one plain adapter on the original base."""
    for stage in ("sft", "reward", "ppo"):
        run_command(stage, jobs[stage])
    said = capfd.readouterr().err
    assert "1 loaded (all roles are adapters on it)" in said
    assert parents("runs/ppo").keys() == {"policy", "reference", "helpful"}
    adapter = tmp_path / "runs" / "ppo" / "adapter"
    start = load_file(tmp_path / "runs" / "sft" / "adapter" / "adapter_model.safetensors")
    end = load_file(adapter / "adapter_model.safetensors")
    assert start.keys() == end.keys() and not all(torch.equal(start[k], end[k]) for k in start)
    assert run_without_us(LOGITS, str(tiny_llama(context=128)), str(adapter))["moved"] > 1e-3


def test_merged_and_unmerged_starts_are_the_same_policy(jobs: dict[str, str], run_command: Callable[..., None]) -> None:
    """Equal seeds, equal prompts: before any update, both forms of the SFT model earn the same held-out reward."""
    run_command("sft", jobs["sft"])
    run_command("merge", "runs/sft")
    run_command("reward", jobs["reward"])
    run_command("merge", "runs/reward")
    as_it_is = (
        'rewards=[{"name": "helpful", "run": "runs/reward", "normalize": false}]'  # a merged one has no other way
    )
    run_command("ppo", jobs["ppo"], "max_steps=1", "output_dir=runs/apart", as_it_is)
    judge = 'rewards=[{"name": "helpful", "model": "runs/reward-adapter-merged"}]'
    run_command(
        "ppo", jobs["ppo"], "max_steps=1", "output_dir=runs/merged", "model_name_or_path=runs/sft-adapter-merged",
        "sft=null", "lora.r=4", judge,
    )  # fmt: skip
    apart, merged = (read_metrics(Path(f"runs/{n}/metrics.jsonl"))[0] for n in ("apart", "merged"))
    assert merged["eval/reward"] == pytest.approx(apart["eval/reward"], rel=1e-3, abs=1e-4)
    assert merged["eval/length"] == apart["eval/length"]


def test_no_two_stages_disagree_on_who_is_held_out(jobs: dict[str, str], run_command: Callable[..., None]) -> None:
    """F29: the prompts that PPO is evaluated on are in no stage's training rows."""
    from rlhf_ray.config import STAGES
    from rlhf_ray.config.load import load
    from rlhf_ray.data.load import load_rows

    kinds: dict[str, Any] = {"sft": "sft", "reward": "preference", "ppo": "prompt"}
    rows = {s: load_rows(load(STAGES[s], jobs[s], check_files=False).data, kinds[s], s) for s in kinds}
    held_out = {row.prompt.plain() for row in rows["ppo"].held_out}
    assert held_out
    for stage, found in rows.items():
        assert not held_out & {row.prompt.plain() for row in found.train}, stage
