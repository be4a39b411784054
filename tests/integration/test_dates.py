"""A chat template that says the date says one date along the chain: SFT, PPO, evaluation, service."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config import PPOConfig, SamplingConfig, SFTConfig
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.templates import load_template
from rlhf_ray.models.assembly import load_options
from rlhf_ray.models.backbone import load_backbone
from rlhf_ray.models.merge import merge_run
from rlhf_ray.serve.model_index import load_run
from rlhf_ray.stages.generate import generate
from rlhf_ray.stages.start import ppo, sft

pytestmark = pytest.mark.integration

THEN, LATER = "2020-02-03T04:05:06", "2021-01-01T00:00:00"
DATED = (
    "{{ 'Today is ' + strftime_now('%d %b %Y') + '.' }}{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
REWARD = """
def score(prompts, completions, **columns):
    with open({said!r}, "a") as file:
        file.writelines(prompt + "\\n" for prompt in prompts)
    return [float(len(text)) for text in completions]
"""


def test_one_date_from_sft_to_the_service(
    tmp_path: Path, chat_llama: Callable[..., Path], write_jsonl: Callable[..., str], console: Any
) -> None:
    """The SFT run is of 2020; everything that stands on it says so today, and PPO told another day warns."""
    base, said = str(chat_llama(chat_template=DATED)), tmp_path / "said.txt"
    (tmp_path / "r.py").write_text(REWARD.format(said=str(said)))
    rows = [{"prompt": f"Say {i}", "completion": "ok"} for i in range(32)]
    shared: dict[str, Any] = {
        "model_name_or_path": base,
        "template": "chat",
        "data": {"train": write_jsonl("rows.jsonl", rows), "held_out_fraction": 0.0},
        "learner": {"num_workers": 0, "num_threads": 1},
        "max_steps": 1,
        "report_to": [],
    }
    batch = {"train_batch_size": 8, "per_device_train_batch_size": 8, "max_length": 96}
    first = sft(SFTConfig(output_dir=str(tmp_path / "sft"), template_date=THEN, **batch, **shared))
    assert first.folder.manifest()["template"]["date"] == THEN

    rollouts: dict[str, Any] = {"rollout_batch_size": 8, "num_mini_batches": 2, "response_length": 4}
    rollouts |= {"per_device_train_batch_size": 4, "sft": str(first.run_dir)}
    rollouts |= {"rewards": [{"name": "r", "function": f"{tmp_path / 'r.py'}:score"}]}
    second = ppo(PPOConfig(output_dir=str(tmp_path / "ppo"), **rollouts, **shared), console)
    assert second.folder.manifest()["template"]["date"] == THEN
    assert second.folder.config()["template_date"] == THEN
    assert {line[:25] for line in said.read_text().splitlines()} == {"Today is 03 Feb 2020.user"}
    assert not any("date" in line for line in console.warnings)
    said.unlink()
    ppo(PPOConfig(output_dir=str(tmp_path / "other"), template_date=LATER, **rollouts, **shared), console)
    assert any(
        "say the date 2020-02-03, and is used with prompts that say 2021-01-01" in line for line in console.warnings
    )
    assert "Today is 01 Jan 2021." in said.read_text()

    merged = merge_run(str(second.run_dir), str(tmp_path / "merged"))
    greedy = SamplingConfig(do_sample=False)
    for policy in (str(second.run_dir), str(merged)):
        (answer,) = generate(policies=[policy], instruction="Hi", max_new_tokens=2, sampling=greedy, num_threads=1)
        assert answer["prompt"].startswith("Today is 03 Feb 2020.")
    job = SFTConfig(output_dir="x", **batch, **shared)
    backbone = load_backbone(path=base, revision=None, **load_options(job, torch.device("cpu")))
    for run in (first, second):
        served = load_run("one", str(run.run_dir), backbone, load_template("none"))
        assert served.template.render(Prompt("Hi")).startswith("Today is 03 Feb 2020.")
    assert json.loads((tmp_path / "merged" / "rlhf_ray.json").read_text())["template"]["date"] == THEN
