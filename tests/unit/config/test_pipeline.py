"""Pipeline jobs: each stage section is checked as its stage will see it, and blamed where it stands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import STAGES, PPOConfig
from rlhf_ray.config.load import load_any
from rlhf_ray.errors import ConfigError

HEAD = "output_dir: runs/all\nmodel_name_or_path: base\n"
FULL = (
    HEAD + "seed: 7\nsft:\n  data: {train: rows.jsonl}\nreward:\n  data: {train: pairs.jsonl}\n"
    "ppo:\n  data: {train: prompts.jsonl}\n  kl_coef: 0.1\n"
)


def test_stages_find_what_earlier_ones_make(loaded: Callable[..., Any]) -> None:
    job = loaded("pipeline", FULL)
    made = {stage: job.stage_config(stage) for stage in STAGES}
    assert made["reward"].sft == "runs/all/sft" and made["ppo"].sft == "runs/all/sft"
    assert made["ppo"].rewards[0].run == "runs/all/reward"
    assert [p.policy for p in made["evaluate"].policies] == ["base", "runs/all/sft", "runs/all/ppo"]
    assert {c.seed for c in made.values()} == {7} and made["ppo"].kl_coef == 0.1
    assert {s: c.output_dir for s, c in made.items()} == {s: f"runs/all/{s}" for s in STAGES}


def test_a_fault_in_a_stage_names_the_stage_and_the_line(complaints: Callable[..., list[str]]) -> None:
    text = FULL.replace("kl_coef: 0.1", "kl_coef: -1\n  kl_coeff: 1").replace("{train: rows.jsonl}", "{train: 3}")
    assert complaints("pipeline", text, "reward.max_length=0") == [
        "error: job.yaml:5: sft.data.train: wrong type; expected text or list of texts; got 3; fix: write \"3\"",
        "error: job.yaml:10: ppo.kl_coef: out of range; expected number >= 0; got -1; fix: the default is 0.05",
        "error: job.yaml:11: ppo.kl_coeff: unknown key; fix: did you mean kl_coef?",
        "error: override reward.max_length=0: out of range; expected integer >= 2; got 0; fix: the default is 512",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (HEAD + "stages: [sft]\n", "job.yaml: sft.data: missing; expected section (rows)"),
        (
            HEAD + "stages: [ppo]\nppo: {data: {train: x}}\n",
            "job.yaml:4: ppo.rewards: missing; expected list of sections (what is maximised)",
        ),
        (
            FULL + "stages: [reward, sft, ppo]\n",
            "job.yaml:11: stages: each at most once, in the order sft, dpo, reward, ppo, evaluate",
        ),
        (FULL + "stages: [sft, reward]\n", "job.yaml:8: ppo: has settings but is not among stages: sft, reward"),
        (FULL + "  output_dir: x\n", "job.yaml:11: ppo.output_dir: stages write to output_dir/<stage>; set output_dir at the top"),
        (
            FULL + "  learner: {num_workers: 2}\n",
            "job.yaml:11: ppo.learner: a pipeline has one worker group; set learner at the top",
        ),
        (FULL + "kl_coef: 0.1\n", "job.yaml:11: kl_coef: unknown key; fix: it is a field of ppo: put it under ppo"),
        (
            FULL + "  add_eos_token: true\n",
            "job.yaml:11: ppo.add_eos_token: unknown key; fix: it is a field of sft jobs; remove it",
        ),
        (FULL + "  lora: {r: 4}\n", "job.yaml:11: ppo.lora: the policy copies the SFT adapter's r, alpha and targets"),
        (FULL + "dtype: half\n", "job.yaml:11: dtype: not a choice; expected one of auto, float32, bfloat16, float16; got 'half'"),
        (
            FULL.replace("seed: 7", "learner: {num_workers: 3}"),
            "job.yaml:3: learner.num_workers: 64 rows",
        ),
    ],
)  # fmt: skip
def test_faults_of_a_pipeline(text: str, line: str, complaints: Callable[..., list[str]]) -> None:
    if "64 rows" in line:  # a shared field that does not fit a stage's own defaults is told for the stage
        told = complaints("pipeline", text)
        assert all("is not a multiple of per_device_train_batch_size 8 x 3 workers = 24" in t for t in told)
        assert [t.split(": ")[2] for t in told] == ["sft.train_batch_size", "reward.train_batch_size"]
    else:
        assert complaints("pipeline", text)[0].startswith(f"error: {line}")


def test_missing_runs_are_blamed_but_not_those_the_pipeline_makes(
    loaded: Callable[..., Any], complaints: Callable[..., list[str]]
) -> None:
    loaded("pipeline", FULL)  # runs/all/sft does not exist yet: fine
    text = FULL.replace("model_name_or_path: base", "model_name_or_path: ./nowhere")
    assert complaints("pipeline", text + "  rewards: [{run: runs/rewards}]\n") == [
        "error: job.yaml:2: model_name_or_path: no such folder; expected a folder or a Hub id; got ./nowhere",
        "error: job.yaml:11: ppo.rewards[0].run: no such folder; expected a folder; got runs/rewards; "
        "fix: did you mean runs/reward?",
    ]


# ---------------------------------------------------------------- which stage is a job file for?


@pytest.mark.parametrize(
    ("name", "text", "stage"),
    [
        ("x.yaml", FULL, "pipeline"),
        ("x.yaml", HEAD + "data: {train: x}\nrewards: [{run: runs/reward}]\n", "ppo"),
        ("x.yaml", HEAD + "data: {train: x}\npolicies: [{name: base, policy: base}]\n", "evaluate"),
        ("x.yaml", HEAD + "data: {train: x}\ntrain_on_inputs: true\n", "sft"),
        ("x.yaml", HEAD + "data: {train: x}\ninit_from: base\n", "reward"),
        ("my-reward.yaml", HEAD + "data: {train: x}\n", "reward"),
        ("sft.yaml", HEAD + "data: {train: x}\n", "sft"),
        ("x.yaml", HEAD + "ppo: {}\nspace: {kl_coef: [0.1, 0.2]}\n", "sweep"),
        ("x.yaml", HEAD + "registry: registry\n", "serve"),
    ],
)
def test_the_stage_is_seen_from_the_fields_or_the_name(name: str, text: str, stage: str, workdir: Path) -> None:
    Path(name).write_text(text)
    found, config = load_any(name)
    assert found == stage and config.output_dir == "runs/all"


def test_an_ambiguous_job_asks_for_the_stage(workdir: Path) -> None:
    Path("x.yaml").write_text(HEAD + "data: {train: x}\n")
    with pytest.raises(ConfigError) as caught:
        load_any("x.yaml")
    assert caught.value.lines() == [
        "error: x.yaml: cannot tell which stage this job is for; "
        "fix: add --stage, one of sft, dpo, reward, ppo, evaluate, pipeline, sweep, serve"
    ]
    assert load_any("x.yaml", stage="reward")[0] == "reward"
    assert isinstance(load_any("x.yaml", ["rewards=[{run: runs/reward}]"])[1], PPOConfig)


def test_stages_of_one_file_hold_out_the_same_share(
    complaints: Callable[..., list[str]], loaded: Callable[..., Any]
) -> None:
    """SFT held out 0.04 and PPO 0.1 of the same file, as a job of ours did: 60 % of the evaluated prompts had been trained on. Told
    before the first stage starts. A smaller share later, or another file, hides nothing."""
    head = "output_dir: o\nmodel_name_or_path: base\nstages: [sft, ppo, evaluate]\n"
    ppo = "ppo: {data: {train: a.jsonl}, rewards: [{function: 'r.py:f'}]}\n"
    assert complaints("pipeline", f"{head}sft: {{data: {{train: a.jsonl, held_out_fraction: 0.04}}}}\n{ppo}") == [
        "error: job.yaml:5: ppo.data: holds out 0.1 of a.jsonl, of which sft (held_out_fraction 0.04) trains on a part; expected"
        " one data.held_out_fraction along the chain; fix: set sft.data and ppo.data to the same held_out_fraction",
    ]
    Path("r.py").write_text("def f(prompts, completions):\n    return [0.0] * len(prompts)\n")
    for fine in ("a.jsonl, held_out_fraction: 0.2", "b.jsonl, held_out_fraction: 0.04", "a.jsonl"):
        assert loaded("pipeline", f"{head}sft: {{data: {{train: {fine}}}}}\n{ppo}"), fine
