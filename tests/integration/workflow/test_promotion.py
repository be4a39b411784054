"""From a real chain to the registry: SFT, reward model and policy get names, serve as what they were, and are taken back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.cli import main
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.templates import load_template
from rlhf_ray.models.adapter_files import read_adapter
from rlhf_ray.models.lineage import parent_of
from rlhf_ray.models.specs import policy_source
from rlhf_ray.registry import Registry

pytestmark = pytest.mark.integration

LOGITS = """
import json, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.tensor([list(range(60, 76))])
with torch.no_grad():
    print(json.dumps(PeftModel.from_pretrained(base, sys.argv[2]).eval()(ids).logits[0, -1].tolist()))
"""


def test_a_chain_is_promoted_served_and_taken_back(
    jobs: dict[str, str],
    run_command: Callable[..., None],
    run_without_us: Callable[..., Any],
    tiny_llama: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    template = {"prompt_inputs": "Q: {instruction} ({input})\nA:", "prompt_noinputs": "Q: {instruction}\nA:"}
    Path("mine.json").write_text(json.dumps(template))
    for stage in ("sft", "reward", "ppo"):
        run_command(stage, jobs[stage], "template=mine.json")
    rendered = load_template("mine.json").render(Prompt("Name the wren."))
    hashes = {stage: read_adapter(f"runs/{stage}/adapter").sha256 for stage in ("sft", "reward", "ppo")}
    capfd.readouterr()

    # An SFT run, a policy under the same name, a reward model under another. Two steps of training pass no gate of the reward.
    run_command("promote", "runs/sft", "--alias", "helper")
    assert "gate kl        not applicable" in capfd.readouterr().err
    assert main(["promote", "runs/ppo", "--alias", "helper", "--min-reward", "1e9"]) == 2
    assert (
        "error: gate reward: failed; expected at least 1e+09 (--min-reward); got eval/reward " in capfd.readouterr().err
    )
    run_command("promote", "runs/ppo", "--alias", "helper", "--min-reward", "-1e9", "--max-kl", "1e9")
    run_command("promote", "runs/reward", "--alias", "judge", "--force", "--reason", "three steps of training")
    run_command("adapters")
    assert [line.split()[0] for line in capfd.readouterr().out.splitlines()][-3:] == ["name", "helper", "judge"]

    registry = Registry()
    policy, judge = registry.resolve("helper"), registry.resolve("judge")
    assert (policy.version, policy.sha256, policy.kind) == (2, hashes["ppo"], "policy")
    assert (judge.sha256, judge.kind, judge.load().head is not None) == (hashes["reward"], "reward", True)
    assert judge.manifest["reward"]["fixture"] and judge.manifest["reward"]["add_eos_token"] is True
    assert policy.stop_token_ids == (2,)
    parents = {p["role"]: p for p in policy.manifest["lineage"]["parents"]}
    assert parents["reference"]["sha256"] == hashes["sft"] and parents["helpful"]["sha256"] == hashes["reward"]
    assert {p["found"] for p in parents.values()} == {"same"}
    assert parents["helpful"]["parents"][0]["sha256"] == hashes["sft"]

    # Plain PEFT reads it, and it answers as the run's own adapter does.
    base = str(tiny_llama(context=128))
    ours, theirs = (
        run_without_us(LOGITS, base, str(folder)) for folder in (policy.path, tmp_path / "runs/ppo/adapter")
    )
    assert torch.equal(torch.tensor(ours), torch.tensor(theirs))

    # The runs and the template file may go.
    shutil.rmtree("runs")
    Path("mine.json").unlink()
    policy = Registry().resolve("helper@v2")
    assert policy.template().render(Prompt("Name the wren.")) == rendered
    assert policy.load().sha256 == hashes["ppo"]

    # Beside a job it is checked as its run would be.
    told = parent_of(policy_source(str(policy.path)), "sft")
    assert (told.stage, told.base, told.template) == ("ppo", policy.base, policy.manifest["template"])
    run_command("rollback", "helper")
    assert Registry().resolve("helper").sha256 == hashes["sft"]


def test_a_promoted_policy_answers_by_its_name(
    jobs: dict[str, str], run_command: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    """Base and template come from its manifest; a checkpoint of a step can be promoted as well."""
    run_command("sft", jobs["sft"])
    run_command("promote", "runs/sft@3", "--alias", "helper")
    asked = ("--instruction", "Name the toad.", "--greedy", "--max-new-tokens", "4", "--json", "--show-prompt")
    capfd.readouterr()
    run_command("generate", "--policy", "runs/sft", "--policy", "registry:helper", *asked)
    run, promoted = map(json.loads, capfd.readouterr().out.splitlines())
    assert (run["prompt"], run["completion"]) == (promoted["prompt"], promoted["completion"])
    assert promoted["policy"] == str(Registry().resolve("helper").path)
    shutil.rmtree("runs")
    run_command("generate", "--policy", "registry:helper", *asked)
    assert json.loads(capfd.readouterr().out)["completion"] == run["completion"]
    assert main(["generate", "--policy", "registry:../helper", *asked]) == 2
    assert "error: adapter: is not a name of an adapter" in capfd.readouterr().err
