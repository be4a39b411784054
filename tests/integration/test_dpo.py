"""Direct preference optimisation from job to run folder, on tiny models, in this process and under Ray."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config import DPOConfig, PipelineConfig, SFTConfig
from rlhf_ray.config.load import load_dict
from rlhf_ray.errors import ConfigError, Interrupted
from rlhf_ray.plan.job_plan import plan
from rlhf_ray.registry import Registry
from rlhf_ray.stages.generate import generate
from rlhf_ray.stages.start import dpo, pipeline, sft
from rlhf_ray.storage.run import Run, load_run
from rlhf_ray.supervised.state import SupervisedState
from tests.runs import lasting_rows, weights, yes_or_no

pytestmark = pytest.mark.integration
Write = Callable[[str, Iterable[dict[str, Any]]], str]
Make = Callable[..., DPOConfig]
HELD_OUT = {"held_out_fraction": 0.3}

LOGITS = """
import json, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.tensor([list(range(60, 76))])
with torch.no_grad():
    before = base(ids).logits
    after = PeftModel.from_pretrained(base, sys.argv[2]).eval()(ids).logits
print(json.dumps(float((after - before).abs().max())))
"""


@pytest.fixture
def sft_run(supervised_job: Callable[..., SFTConfig], console: Any) -> Run:
    rows = [{"instruction": f"Is {i} a number?", "input": "", "output": "maybe"} for i in range(20)]
    small = {"lora": {"r": 4, "lora_alpha": 8}, "train_batch_size": 8, "per_device_train_batch_size": 8, "max_steps": 3}
    return sft(supervised_job(SFTConfig, "sft", rows, data=HELD_OUT, eval_steps=None, **small), console)


@pytest.fixture
def make_config(supervised_job: Callable[..., DPOConfig]) -> Make:
    def make(rows: int = 120, **values: Any) -> DPOConfig:
        return supervised_job(DPOConfig, "dpo", yes_or_no(rows), **{"data": HELD_OUT, **values})

    return make


def test_it_learns_what_the_pairs_say_from_the_sft_adapter(
    make_config: Make, sft_run: Run, console: Any, run_without_us: Callable[..., Any]
) -> None:
    """From ln 2 down; the reference, which is the SFT adapter, stays what it was; plain peft loads the result."""
    config = make_config(sft=sft_run.run_dir, max_steps=12, eval_steps=6)
    run = dpo(config, console)
    found = run.metrics
    assert found["eval/loss_start"] == pytest.approx(math.log(2), rel=1e-6)
    assert found["eval/accuracy"] > 0.95 and found["eval/accuracy_low"] > 0.8 and found["eval/loss"] < 0.4
    assert found["eval/rewards/margins"] == pytest.approx(found["eval/rewards/chosen"] - found["eval/rewards/rejected"])
    rows = lasting_rows(run)
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 6, 12]
    assert {"rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"} <= rows[-1].keys()
    manifest = run.folder.manifest()
    (parent,) = manifest["parents"]
    assert (parent["role"], parent["path"]) == ("sft", str(sft_run.adapter_dir))
    assert manifest["dpo"] == {
        "loss_type": "sigmoid",
        "beta": 0.1,
        "label_smoothing": 0.0,
        "rpo_alpha": None,
        "add_eos_token": True,
    }
    config_json = json.loads((run.adapter_dir / "adapter_config.json").read_text())
    assert (config_json["r"], config_json["task_type"]) == (4, "CAUSAL_LM")
    assert weights(run).keys() == weights(sft_run).keys()
    assert f"reference {sft_run.run_dir}, frozen" in console.text and load_run(run.run_dir) == run
    assert not any("usual for full fine-tuning" in line for line in console.warnings)
    assert run_without_us(LOGITS, config.model_name_or_path, str(run.adapter_dir)) > 1e-3
    page = (Path(run.run_dir) / "report.html").read_text()
    assert "Implied rewards" in page and "Direct preference optimisation" in page


@pytest.mark.parametrize("stage", [dpo, sft])
def test_a_run_whose_every_step_is_worse_than_the_start_keeps_its_best_step(
    stage: Callable[..., Run], make_config: Make, supervised_job: Callable[..., Any], console: Any, write_jsonl: Write
) -> None:
    """The start, which is no result, used to be put back, and could not be saved; nor could it after a resume."""
    pairs = yes_or_no(24)
    names = {"user_input": "user_input", "completion_a": "completion_b", "completion_b": "completion_a"}
    opposite = write_jsonl("opposite.jsonl", [{to: pair[name] for name, to in names.items()} for pair in pairs])
    how: dict[str, Any] = {
        "max_steps": 3,
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "data": {"eval": [opposite]},
    }
    if stage is sft:
        yes, no = (
            [{"instruction": p["user_input"], "output": p[n]} for p in pairs] for n in ("completion_a", "completion_b")
        )
        how |= {"data": {"eval": [write_jsonl("no.jsonl", no)]}, "learning_rate": 1.0}
        job: Any = supervised_job(SFTConfig, "sft", yes, **how)
    else:
        job = make_config(24, **how)
    run = stage(job, console)
    evaluated = [row["eval/loss"] for row in lasting_rows(run) if "eval/loss" in row]
    assert evaluated[0] < min(evaluated[1:])
    assert run.metrics["best/eval_loss"] == min(evaluated[1:]) and run.metrics["best/step"] >= 1
    (line,) = [line for line in console.warnings if "keeping step" in line]
    assert f"no step's is below that of the start, {evaluated[0]:.4f}" in line
    state = SupervisedState()
    state.load_state_dict(
        {"step": 3, "seconds": 1.0, "first": {}, "last": {}, "best": {"step": 0, "loss": (0.5).hex()}}
    )
    assert state.best_loss == math.inf  # of a run that an older version left so


def test_rpo_holds_the_chosen_replies_up_and_a_wrong_label_is_allowed_for(
    make_config: Make, console: Any, tmp_path: Path
) -> None:
    """On the base itself, adapters off. rpo_alpha raises log p of chosen replies; label_smoothing bounds the margins."""
    fixed: dict[str, Any] = {"max_steps": 12, "eval_steps": 12}
    variants: dict[str, dict[str, Any]] = {"plain": {}, "rpo": {"rpo_alpha": 1.0}, "smooth": {"label_smoothing": 0.3}}
    found = {
        name: dpo(make_config(output_dir=str(tmp_path / name), **fixed, **values), console).metrics
        for name, values in variants.items()
    }
    assert found["rpo"]["eval/logps/chosen"] > found["plain"]["eval/logps/chosen"]
    assert found["smooth"]["eval/rewards/margins"] < found["plain"]["eval/rewards/margins"]
    assert "reference the base itself" in console.text


def test_a_stopped_run_goes_on_bit_for_bit(
    make_config: Make, sft_run: Run, console: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often: dict[str, Any] = {"sft": sft_run.run_dir, "logging_steps": 2, "save_steps": 100, "rpo_alpha": 0.5}
    whole = dpo(make_config(output_dir=str(tmp_path / "whole"), **often), console)
    with monkeypatch.context() as patch:
        patch.setenv("RLHF_RAY_FAULT", "learner:update:step=3:term")
        with pytest.raises(Interrupted, match=r"SIGTERM; step 3 is saved; fix: rlhf-ray resume"):
            dpo(make_config(**often), console)
    with pytest.raises(ConfigError, match=r"beta: .* holds a run with another value; expected 0.1; got 0.2"):
        dpo(make_config(resume="auto", beta=0.2, **often), console)
    run = dpo(make_config(resume="auto", **often), console)
    assert "dpo: resuming from step 3 " in console.text
    assert all(torch.equal(t, weights(run)[n]) for n, t in weights(whole).items())
    assert lasting_rows(whole) == lasting_rows(run)


def test_gradient_checkpointing_changes_no_number(
    make_config: Make, sft_run: Run, console: Any, tmp_path: Path
) -> None:
    """The policy's layers are computed again under the policy's adapter, after a pass under the reference's."""
    runs = [
        dpo(make_config(output_dir=str(tmp_path / str(on)), sft=sft_run.run_dir, gradient_checkpointing=on), console)
        for on in (True, False)
    ]
    for name, tensor in weights(runs[0]).items():
        torch.testing.assert_close(weights(runs[1])[name], tensor, atol=1e-6, rtol=1e-5)


def test_microbatches_change_no_number_and_the_held_out_rule_holds_along_the_chain(
    make_config: Make, sft_run: Run, console: Any, tmp_path: Path
) -> None:
    whole = dpo(make_config(output_dir=str(tmp_path / "whole"), sft=sft_run.run_dir), console)
    parts = make_config(output_dir=str(tmp_path / "parts"), sft=sft_run.run_dir, per_device_train_batch_size=4)
    run = dpo(parts, console)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(run)[name], tensor, atol=2e-5, rtol=1e-3)
    data = {"held_out_fraction": 0.6}
    with pytest.raises(ConfigError, match=r"sft \(.*\) held out by data.held_out_fraction 0.3, this stage by"):
        dpo(make_config(output_dir=str(tmp_path / "leaky"), sft=sft_run.run_dir, data=data), console)


def test_a_pipeline_trains_it_beside_the_reward_stage_and_compares_it(
    make_config: Make, write_jsonl: Write, console: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A section dpo is enough: it stands on the SFT run and on the reward stage's pairs. Then plan, generate and promote."""
    monkeypatch.chdir(tmp_path)
    Path("rule.py").write_text(
        "def score(prompts, completions, **_):\n    return [float('y' in c) for c in completions]\n"
    )
    stage = make_config()
    rows = [{"instruction": f"Is {i} a number?", "input": "", "output": "maybe"} for i in range(60)]
    training = {"max_length": 64, "train_batch_size": 16, "per_device_train_batch_size": 16, "max_steps": 4}
    training |= {"learning_rate": 1e-2, "eval_steps": 2}
    job: dict[str, Any] = {
        "output_dir": str(tmp_path / "all"),
        "model_name_or_path": stage.model_name_or_path,
        "template": "none",
        "learner": {"num_workers": 0, "num_threads": 1},
        "report_to": [],
        "sft": {"data": {"train": write_jsonl("sft.jsonl", rows), "held_out_fraction": 0.3}, **training},
        "dpo": {**training, "beta": 0.3},
        "reward": {"data": stage.data.model_dump(exclude_unset=True), **training},
        "evaluate": {
            "data": {"train": write_jsonl("prompts.jsonl", rows), "held_out_fraction": 0.3},
            "rewards": [{"name": "rule", "function": "rule.py:score"}],
            "response_length": 8,
        },
    }
    config = load_dict(PipelineConfig, {**job, "stages": ["sft", "dpo", "reward", "evaluate"]}, "job")
    assert load_dict(PipelineConfig, {**job, "ppo": {"data": job["evaluate"]["data"]}}, "job").stages == (
        "sft", "dpo", "reward", "ppo", "evaluate",
    )  # fmt: skip
    stages = [stage["stage"] for stage in plan(config, device="cpu").to_json()["stages"]]
    assert stages == ["sft", "dpo", "reward", "evaluate"]
    run = pipeline(config, console)
    assert {f"evaluate/reward/{name}" for name in ("base", "sft", "dpo")} <= run.metrics.keys()
    made = load_run(run.artifacts["dpo"])
    assert made.folder.config()["beta"] == 0.3
    assert made.folder.manifest()["parents"][0]["path"] == str(tmp_path / "all/sft/adapter")
    assert "Direct preference optimisation" in (tmp_path / "all/report.html").read_text()
    answers = generate(
        policies=["base", made.run_dir, f"{made.run_dir}@2"], instruction="Is 3 a number?", console=console
    )
    assert len(answers) == 3 and len({row["completion"] for row in answers}) > 1
    lines: list[str] = []
    Registry(tmp_path / "registry").promote(made.run_dir, "helper", log=lines.append)
    gates = {line.split()[1]: line.split()[2].rstrip(":") for line in lines if line.startswith("gate ")}
    assert (gates["loss"], gates["accuracy"], gates["kl"]) == ("passed", "passed", "not")


@pytest.mark.slow
def test_two_ray_workers_train_what_this_process_trains(
    make_config: Make, sft_run: Run, console: Any, tmp_path: Path, four_cpus: Any
) -> None:
    common: dict[str, Any] = {"sft": sft_run.run_dir, "per_device_train_batch_size": 4, "rows": 60, "rpo_alpha": 0.5}
    alone = dpo(make_config(output_dir=str(tmp_path / "alone"), **common), console)
    group = make_config(output_dir=str(tmp_path / "group"), learner={"num_workers": 2, "num_threads": 1}, **common)
    run = dpo(group, console)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(run)[name], tensor, atol=2e-5, rtol=1e-3)
    for name in ("eval/loss", "eval/rewards/margins", "rewards/margins", "logps/chosen", "loss"):
        assert run.metrics[name] == pytest.approx(alone.metrics[name], rel=1e-3), name
