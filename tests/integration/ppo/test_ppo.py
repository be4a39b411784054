"""PPO as a whole, on a tiny random model with a Python reward: the loop, its invariants, its artefacts, its independence of how
the work is cut up."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.config import PPOConfig
from rlhf_ray.console import LocalConsole, NullConsole
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.splits import confirms, is_held_out, prompt_hash
from rlhf_ray.errors import ConfigError, DataError, Interrupted
from rlhf_ray.metrics import METRICS, read_metrics
from rlhf_ray.stages.resume import resume
from rlhf_ray.stages.start import ppo
from rlhf_ray.storage.run import Run, load_run

pytestmark = pytest.mark.integration
Job = Callable[..., PPOConfig]

CONTRACT = """reward/mean kl/k1_per_response kl/k3_per_response kl/penalty_per_response kl/coef response/length response/finished
ratio/first_minibatch_max_deviation policy/clip_fraction policy/approx_kl policy/entropy value/explained_variance grad_norm/policy
grad_norm/value time/generate time/score time/update time/publish time/step sync/bytes tokens/generated""".split()


def run(config: PPOConfig) -> Run:
    return ppo(config, NullConsole())


def weights(folder: str | Path, name: str = "adapter") -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / name / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def deterministic(folder: str | Path) -> list[dict[str, Any]]:
    rows = read_metrics(Path(folder) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k.split("/")[0] not in ("time", "memory", "faults")} for row in rows]


def test_a_run_leaves_what_the_contract_says(ppo_job: Job) -> None:
    """Among it F15 and F38: at step 1 the KL to the reference, here the base with adapters off, is 0."""
    done = run(ppo_job("run"))
    folder = Path(done.run_dir)
    assert (done.stage, done.status, done.steps) == ("ppo", "done", 3)
    for name in ("config.yaml", "manifest.json", "summary.json", "metrics.jsonl", "samples.jsonl", "report.html"):
        assert (folder / name).is_file(), name
    last = read_metrics(folder / "metrics.jsonl")[-1]
    assert set(CONTRACT) <= last.keys()
    assert set(CONTRACT) <= METRICS.keys()
    assert last["ratio/first_minibatch_max_deviation"] == 0.0
    assert last["sync/bytes"] == sum(t.numel() * 4 for t in weights(folder).values())
    first = read_metrics(folder / "metrics.jsonl")[1]
    assert abs(first["kl/k1_per_response"]) < 1e-4, "the policy starts at its reference"
    assert last["kl/k3_per_response"] > 0.0
    assert (folder / "checkpoints" / "step_000003" / "optimizer.safetensors").is_file(), "always a final save (F7, F31)"
    assert load_run(folder).metrics == done.metrics


def test_the_result_loads_in_plain_peft(ppo_job: Job) -> None:
    config = ppo_job("plain", max_steps=1)
    folder = run(config).run_dir
    code = (
        "import sys, torch; from peft import PeftModel; from transformers import AutoModelForCausalLM as A;"
        "m = PeftModel.from_pretrained(A.from_pretrained(sys.argv[1]), sys.argv[2] + '/adapter');"
        "n = sum(bool(p.any()) for k, p in m.named_parameters() if 'lora_B' in k);"
        "assert n and 'rlhf_ray' not in sys.modules; print(n)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, config.model_name_or_path, folder], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(weights(folder)) // 2


def test_it_learns(ppo_job: Job) -> None:
    done = run(
        ppo_job("learns", max_steps=12, learning_rate=5e-3, kl_coef=0.0, rollout_batch_size=64, num_mini_batches=4)
    )
    rows = [r["reward/mean"] for r in read_metrics(Path(done.run_dir) / "metrics.jsonl") if "reward/mean" in r]
    assert sum(rows[-3:]) / 3 > sum(rows[:3]) / 3 + 0.05


def test_the_same_job_twice_gives_the_same_bits(ppo_job: Job) -> None:
    a, b = run(ppo_job("a")), run(ppo_job("b"))
    assert same(weights(a.run_dir), weights(b.run_dir))
    assert deterministic(a.run_dir) == deterministic(b.run_dir)


def test_prompts_that_confirm_are_measured_apart_and_change_nothing_else(ppo_job: Job, prompts_file: Path) -> None:
    """confirm_held_out: the same replies, told in two halves by the hash of their prompts; the means join to that of all."""
    data = {"train": str(prompts_file), "held_out_fraction": 0.2}
    whole, halves = run(ppo_job("whole", data=data)), run(ppo_job("halves", data=data, confirm_held_out=True))
    assert same(weights(whole.run_dir), weights(halves.run_dir))
    texts = [json.loads(line)["instruction"] for line in prompts_file.read_text().splitlines()]
    held_out = [h for t in texts if is_held_out(h := prompt_hash(Prompt(t)), 0.2)]
    counts = {"eval/confirm": sum(map(confirms, held_out)), "eval": sum(not confirms(h) for h in held_out)}
    assert min(counts.values()) > 0
    evaluated = [[r for r in deterministic(done.run_dir) if "eval/reward" in r] for done in (whole, halves)]
    assert len(evaluated[0]) == len(evaluated[1]) > 1
    for alone, apart in zip(*evaluated):
        assert {half: apart[f"{half}/rows"] for half in counts} == counts and alone["eval/rows"] == len(held_out)
        for name in ("reward", "reward/ascii", "kl_k1_per_response", "length"):
            joined = sum(n * apart[f"{half}/{name}"] for half, n in counts.items()) / len(held_out)
            assert joined == pytest.approx(alone[f"eval/{name}"], abs=1e-6)


def test_too_few_held_out_prompts_to_set_some_apart(ppo_job: Job, prompts_file: Path) -> None:
    """One prompt can only choose: that is told, and eval/* is as ever."""
    console = io.StringIO()
    job = ppo_job("few", data={"train": str(prompts_file), "eval_max_rows": 1}, confirm_held_out=True)
    done = ppo(job, LocalConsole(file=console))
    assert "confirm_held_out: 1 held-out prompts are too few to set some apart" in console.getvalue()
    assert "eval/reward" in done.metrics and not [name for name in done.metrics if "confirm" in name]


def test_rows_per_forward_is_memory_only(ppo_job: Job, ptx: dict[str, Any]) -> None:
    """F1: microbatches hold different rows and share one normaliser, so how many there are changes nothing but rounding."""
    a = run(ppo_job("eight", per_device_train_batch_size=8, **ptx))
    b = run(ppo_job("one", per_device_train_batch_size=1, **ptx))
    assert difference(weights(a.run_dir), weights(b.run_dir)) < 1e-5
    assert difference(weights(a.run_dir, "value"), weights(b.run_dir, "value")) < 1e-5


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_stages_agree(ppo_job: Job, ptx: dict[str, Any], stage: int) -> None:
    plain = run(ppo_job("plain", **ptx))
    sharded = run(ppo_job("sharded", learner={"num_workers": 0, "num_threads": 1, "zero_stage": stage}, **ptx))
    assert difference(weights(plain.run_dir), weights(sharded.run_dir)) < 1e-6
    assert difference(weights(plain.run_dir, "value"), weights(sharded.run_dir, "value")) < 1e-6


@pytest.mark.parametrize("stage", [0, 2])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    ppo_job: Job, ptx: dict[str, Any], stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F7: a checkpoint is the whole state after its update: optimizer, KL coefficient, reward statistics, counters, logs, and the
    reference, which was reset in the step before. Rows of ptx_data have no cursor."""
    learner = {"num_workers": 0, "num_threads": 1, "zero_stage": stage}
    common: dict[str, Any] = {
        "learner": learner,
        "max_steps": 4,
        "save_steps": 1,
        "kl_controller": "adaptive",
        "normalize_rewards": True,
        "eval_steps": 2,
        "ref_model_sync_steps": 2,
        "ref_model_sync_resets_optimizer": True,
        **ptx,
    }
    straight = run(ppo_job("straight", **common))
    monkeypatch.setenv("FAIL_AT_CALL", "7")  # 1 evaluation, 2 chunks a step, an evaluation after step 2: in step 3
    broken = ppo_job("broken", **common, resume="auto")
    with pytest.raises(Interrupted, match="reward service"):
        run(broken)
    monkeypatch.delenv("FAIL_AT_CALL")
    assert load_run(broken.output_dir).status == "running"
    resumed = run(broken)
    assert same(weights(straight.run_dir), weights(resumed.run_dir))
    assert same(weights(straight.run_dir, "value"), weights(resumed.run_dir, "value"))
    assert deterministic(straight.run_dir) == deterministic(resumed.run_dir)


@pytest.mark.parametrize(
    "changes",
    [
        {"advantage_estimator": "rloo", "num_generations": 4},
        {
            "advantage_estimator": "grpo",
            "num_generations": 4,
            "use_kl_loss": True,
            "kl_penalty": "bregman",
            "ref_model_sync_steps": 1,
        },
        {
            "value": {"adapter": "shared"},
            "kl_penalty": "jensen_shannon",
            "load_best_model_at_end": True,
            "ref_model_sync_steps": 1,
        },
        {
            "value": {"warmup_steps": 1, "learning_rate": 5e-3},
            "kl_penalty": "squared_error",
            "kl_controller": "horizon",
            "ref_model_sync_steps": 2,
        },
        {
            "optim": "adafactor",
            "kl_penalty": "clamped_kl",
            "whiten_rewards": True,
            "reward_clip": 1.0,
            "ref_model_sync_steps": 1,
            "ref_model_sync_resets_optimizer": True,
        },
        {"optim": "adamw_8bit", "kl_penalty": "none", "bootstrap_truncated": True},
        {"min_response_length": 2, "target_kl": 1e-9, "save_steps": [2], "load_best_model_at_end": True},
        {"cliprange_high": 0.28, "dual_clip": 3.0, "overlong_buffer": 4, "loss_aggregation": "seq_mean_token_sum"},
        {
            "advantage_estimator": "grpo",
            "num_generations": 4,
            "ratio_level": "sequence",
            "loss_aggregation": "seq_mean_token_mean",
            "filter_groups": True,
            "entropy_coef": 0.01,
        },
        {"gradient_checkpointing": True, "dtype": "bfloat16", "lr_scheduler_type": "cosine"},
        {"dtype": "bfloat16", "lora_compute_dtype": "bfloat16"},
    ],
    ids=lambda c: "-".join(map(str, c)),
)
def test_every_variant_runs(ppo_job: Job, changes: dict[str, Any]) -> None:
    done = run(ppo_job("variant", **changes))
    last = read_metrics(Path(done.run_dir) / "metrics.jsonl")[-1]
    assert done.status == "done"
    assert last["ratio/first_minibatch_max_deviation"] == 0.0
    if "target_kl" in changes:
        assert last["policy/epochs"] == 1.0
    if "use_kl_loss" in changes:
        assert last["loss/kl"] > 0.0


@pytest.fixture
def ptx(prompts_file: Path) -> dict[str, Any]:
    """A supervised loss over answers to the very prompts."""
    rows = [json.loads(line) for line in prompts_file.read_text().splitlines()]
    answers = prompts_file.with_name("answers.jsonl")
    answers.write_text(
        "".join(json.dumps({**row, "output": "Number " * (i % 3 + 1)}) + "\n" for i, row in enumerate(rows))
    )
    return {"ptx_coef": 0.5, "ptx_data": {"train": str(answers), "held_out_fraction": 0.0}}


def test_a_supervised_loss_is_mixed_in(ppo_job: Job, ptx: dict[str, Any]) -> None:
    """Its rows are learnt, but for those that ask what is held out, which are recorded as well."""
    console = io.StringIO()
    common: dict[str, Any] = {"learning_rate": 5e-3, "max_steps": 5, "eval_on_start": False}
    job = ppo_job("mixed", **common, **{**ptx, "ptx_coef": 5.0})
    done = ppo(job, LocalConsole(file=console))
    rows = [row for row in deterministic(done.run_dir) if row["step"]]
    assert rows[-1]["loss/ptx"] < rows[0]["loss/ptx"] - 0.3
    held_out = sum(
        is_held_out(prompt_hash(Prompt(json.loads(line)["instruction"])), 0.1)
        for line in Path(ptx["ptx_data"]["train"]).read_text().splitlines()
    )
    assert held_out and f"ptx_data: {held_out} of them ask what data holds out, and are left out" in console.getvalue()
    assert f"5 x supervised loss, 8 of {80 - held_out} rows in each optimizer step" in console.getvalue()
    manifest = json.loads((Path(done.run_dir) / "manifest.json").read_text())
    assert ptx["ptx_data"]["train"] in [file["path"] for file in manifest["data"]]
    with pytest.raises(DataError, match="rows < global batch 96"):
        run(ppo_job("few", **ptx, rollout_batch_size=96, num_mini_batches=1, num_generations=2))


def test_the_reference_is_reset_to_the_policy(ppo_job: Job) -> None:
    """After every step: the next one starts at a KL of 0, the start is measured on, and Adam begins anew for the policy."""
    common: dict[str, Any] = {"learning_rate": 2e-2, "save_steps": 1, "kl_coef": 0.5, "eval_steps": 1}
    plain = run(ppo_job("plain", **common))
    reset = run(ppo_job("reset", **common, ref_model_sync_steps=1, ref_model_sync_resets_optimizer=True))
    one, two = ({row["step"]: row for row in deterministic(r.run_dir)} for r in (plain, reset))
    told = {"kl/start_k1_per_response", "kl/reference_step"}
    assert {k: v for k, v in two[1].items() if k not in told} == one[1], "nothing has been reset yet"
    assert [two[n]["kl/reference_step"] for n in (1, 2, 3)] == [0, 1, 2]
    for step in (2, 3):
        assert abs(two[step]["kl/k1_per_response"]) < 1e-4 and two[step]["kl/k3_per_response"] < 1e-4
        assert abs(two[step]["kl/start_k1_per_response"]) > 1e-2 and two[step]["eval/kl_k3_per_response"] > 1e-2
    assert two[2]["kl/start_k1_per_response"] == pytest.approx(one[2]["kl/k1_per_response"], abs=1e-6), "one policy"
    folders = [Path(reset.run_dir) / "checkpoints" / f"step_00000{n}" for n in (1, 2, 3)]
    references = [load_file(folder / "reference.safetensors") for folder in folders]
    assert same(references[0], weights(folders[0])) and same(references[1], weights(folders[1]))
    assert same(references[2], references[1]), "after the last step nobody needs another one"
    state = load_file(folders[2] / "optimizer.safetensors")
    steps = {k.split(".")[0]: float(v) for k, v in state.items() if k.endswith("::step")}
    assert steps == {"policy": 4.0, "value": 12.0}
    report = (Path(reset.run_dir) / "report.html").read_text()
    assert "nats of KL per reply from the policy it started from" in report and "k1 from the start" in report


@pytest.mark.parametrize("adapter", ["own", "shared"])
def test_while_the_value_model_warms_up_it_learns_and_the_policy_does_not(
    ppo_job: Job, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared adapter's head has its own learning rate; the two were one group, in which the warm-up trained nothing. Adam's step
    count of the policy starts with its first step."""
    value = {"adapter": adapter, "warmup_steps": 1, "learning_rate": 5e-3}
    common: dict[str, Any] = {"value": value, "save_steps": 1, "max_steps": 2, "eval_on_start": False}
    common |= {"warmup_steps": 0, "lr_scheduler_type": "constant"}
    done = run(ppo_job("warm", **common))
    rows = {row["step"]: row for row in read_metrics(Path(done.run_dir) / "metrics.jsonl")}
    assert [rows[n]["lr/policy"] for n in (1, 2)] == [0.0, 1e-3] and rows[1]["lr/value"] == 5e-3
    first, second = (Path(done.run_dir) / "checkpoints" / f"step_00000{n}" for n in (1, 2))
    policy = [{k: t for k, t in weights(folder).items() if "lora_B" in k} for folder in (first, second)]
    assert not any(bool(t.any()) for t in policy[0].values()) and any(bool(t.any()) for t in policy[1].values())
    states = [load_file(folder / "optimizer.safetensors") for folder in (first, second)]
    assert {k for k in states[0] if not k.startswith("value.")} == set(), "Adam has not heard of the policy yet"
    steps = {k.split(".")[0]: float(v) for k, v in states[1].items() if k.endswith("::step")}
    assert steps == {"policy": 4.0, "value": 8.0}
    head = "value.head.weight::exp_avg"
    assert states[0][head].any() and rows[2]["value/explained_variance"] != rows[1]["value/explained_variance"]
    monkeypatch.setenv("FAIL_AT_CALL", "4")  # in step 2: its checkpoint holds no state of the policy's
    with pytest.raises(Interrupted):
        run(ppo_job("broken", **common))
    monkeypatch.delenv("FAIL_AT_CALL")
    resumed = run(ppo_job("broken", **common, resume="auto"))
    assert same(weights(done.run_dir), weights(resumed.run_dir))
    assert same(weights(done.run_dir, "value"), weights(resumed.run_dir, "value"))


def test_evaluations_sample_as_rollouts_do_and_greedy_ones_report_no_kl(ppo_job: Job) -> None:
    """They sampled at 1 whatever the temperature of the rollouts; and k1 of greedy replies, which is no KL, was read by caps."""
    found = {}
    for name, sampling in (("rollouts'", {}), ("0.2", {"temperature": 0.2}), ("1", {"temperature": 1.0})):
        done = run(ppo_job(name, temperature=0.2, max_steps=1, eval_sampling=sampling))
        found[name] = deterministic(done.run_dir)[0]["eval/reward"]
    assert found["rollouts'"] == found["0.2"] != found["1"]
    greedy = run(ppo_job("greedy", max_steps=2, eval_sampling={"do_sample": False}, over_optimisation_patience=1))
    rows = deterministic(greedy.run_dir)
    assert all("eval/reward" in row and not any(k.startswith("eval/kl") for k in row) for row in rows)
    assert all("kl/k1_per_response" in row for row in rows[1:])


def test_the_best_step_is_that_of_the_reward_that_watches(ppo_job: Job, tmp_path: Path, reward_file: str) -> None:
    """It was that of the reward that is maximised."""
    rule = tmp_path / "gold.py"
    rule.write_text(
        "def score(prompts, completions, **k):\n    return [float(hash(len(c)) % 7) for c in completions]\n"
    )
    gold = {"name": "gold", "function": f"{rule}:score", "weight": 0.0}
    changes = {"rewards": [{"name": "ascii", "function": reward_file}, gold], "watch": "gold", "learning_rate": 2e-2}
    done = run(ppo_job("watched", **changes, max_steps=4, save_steps=1, load_best_model_at_end=True))
    rows = {row["step"]: row["eval/reward/gold"] for row in read_metrics(Path(done.run_dir) / "metrics.jsonl")}
    best = max(rows, key=lambda step: (rows[step], -step))
    assert (done.metrics["best/step"], done.metrics["best/eval_reward"]) == (best, rows[best])
    told = (Path(done.run_dir) / "report.html").read_text()
    assert "A reward that PPO did not maximise was measured" in told and "Held-out gold, not maximised" in told
    alone = run(ppo_job("alone", max_steps=1))
    assert "Nothing independent was measured" in (Path(alone.run_dir) / "report.html").read_text()


def test_an_entropy_bonus_keeps_replies_varied(ppo_job: Job) -> None:
    common: dict[str, Any] = {"learning_rate": 5e-3, "kl_penalty": "none", "max_steps": 6, "eval_on_start": False}
    ends = []
    for name, coef in (("without", 0.0), ("with", 1.0)):
        rows = read_metrics(Path(run(ppo_job(name, entropy_coef=coef, **common)).run_dir) / "metrics.jsonl")
        ends.append(rows[-1]["policy/entropy"])
    assert ends[1] > ends[0] + 0.01


def test_a_step_without_anything_to_learn_changes_nothing(ppo_job: Job, tmp_path: Path) -> None:
    """filter_groups, where all replies to every prompt score the same: the KL penalty alone would move the policy."""
    rule = tmp_path / "same.py"
    rule.write_text("def score(prompts, completions, **k):\n    return [1.0] * len(completions)\n")
    changes: dict[str, Any] = {"advantage_estimator": "grpo", "num_generations": 4, "missing_eos_penalty": None}
    changes |= {"rewards": [{"function": f"{rule}:score"}], "max_steps": 2, "filter_groups": True}
    done = run(ppo_job("nothing", **changes))
    rows = read_metrics(Path(done.run_dir) / "metrics.jsonl")
    assert all(row["advantage/equal_groups"] == 1.0 and row["policy/epochs"] == 0.0 for row in rows[1:])
    assert not any(bool(t.any()) for k, t in weights(done.run_dir).items() if "lora_B" in k)


def test_a_warm_up_that_leaves_no_step_for_the_policy_is_refused(ppo_job: Job) -> None:
    with pytest.raises(ConfigError, match=r"value.warmup_steps: the run has 3 steps.*expected less than 3; got 3"):
        run(ppo_job("idle", value={"warmup_steps": 3}))


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_a_quantised_base_trains_every_adapter_after_a_rollout(ppo_job: Job, bits: str) -> None:
    """On CPUs with bf16 units the first no-grad pass of a 4-bit model repacks it and cuts all gradients in silence: so the second
    step, after two rollouts, must still move every tensor of policy and value model."""
    done = run(ppo_job("quantised", **{bits: True}, max_steps=2, save_steps=1))
    first, second = (Path(done.run_dir) / "checkpoints" / f"step_00000{n}" for n in (1, 2))
    for role in ("adapter", "value"):
        before, after = weights(first, role), weights(second, role)
        still = [name for name in before if torch.equal(before[name], after[name])]
        assert before and not still, f"{role}: {still}"
    manifest = json.loads((Path(done.run_dir) / "manifest.json").read_text())
    assert manifest["base"]["precision"] == bits.removeprefix("load_in_")


def test_gradient_checkpointing_changes_nothing(ppo_job: Job) -> None:
    """Recomputation runs under the adapter of the forward pass, not under whichever is active in the backward."""
    a = run(ppo_job("plain", gradient_checkpointing=False))
    b = run(ppo_job("recomputed", gradient_checkpointing=True))
    assert difference(weights(a.run_dir), weights(b.run_dir)) < 1e-6
    assert difference(weights(a.run_dir, "value"), weights(b.run_dir, "value")) < 1e-6


def test_the_first_step_moves_the_policy(ppo_job: Job) -> None:
    """F6, first step with lr 0: here the warm-up starts above 0."""
    done = run(ppo_job("one", max_steps=1, warmup_steps=10))
    assert read_metrics(Path(done.run_dir) / "metrics.jsonl")[-1]["lr/policy"] > 0
    assert any(bool(t.any()) for k, t in weights(done.run_dir).items() if "lora_B" in k)


def test_dropout_of_the_sft_adapter_is_off(ppo_job: Job, tmp_path: Path, tiny_llama: Callable[..., Path]) -> None:
    """F5, dropout making ratio != 1: active in the update alone, it would. F38: the reference is the SFT adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama()),
        LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    model.save_pretrained(tmp_path / "sft")
    done = run(ppo_job("run", sft=str(tmp_path / "sft")))
    rows = read_metrics(Path(done.run_dir) / "metrics.jsonl")
    assert rows[-1]["ratio/first_minibatch_max_deviation"] == 0.0
    assert abs(rows[1]["kl/k1_per_response"]) < 1e-4, "the reference is the SFT adapter"


def test_a_folder_that_holds_a_run_is_refused_with_the_command_that_resumes_it(ppo_job: Job) -> None:
    """F7: a folder that was used before is never gone on with unasked."""
    config = ppo_job("run", max_steps=1)
    run(config)
    with pytest.raises(ConfigError, match="rlhf-ray resume"):
        run(config)


def test_a_reward_that_is_not_a_number_stops_the_run(ppo_job: Job, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("def score(prompts, completions, **k):\n    return [float('nan')] * len(prompts)\n")
    with pytest.raises(Interrupted, match=r"step 0: reward broken is not finite for 4 of 4 replies \(first row 0\)"):
        run(ppo_job("run", rewards=[{"name": "broken", "function": f"{path}:score"}]))


def test_too_few_prompts_say_so(ppo_job: Job) -> None:
    with pytest.raises(DataError, match="prompts < 200"):
        run(ppo_job("run", rollout_batch_size=200))


@pytest.mark.slow
def test_under_ray_with_one_and_two_workers(ppo_job: Job, four_cpus: Any) -> None:
    """One worker: the same bits as in this process. Two: the same rows in the same minibatches, so equal up to rounding, whether
    policy and value model go backward one after the other (ZeRO 0) or together."""
    here = run(ppo_job("here"))
    one = run(ppo_job("one", learner={"num_workers": 1, "num_threads": 1}))
    pairs = {
        stage: run(ppo_job(f"two{stage}", learner={"num_workers": 2, "num_threads": 1, "zero_stage": stage}))
        for stage in (0, 2)
    }
    assert same(weights(here.run_dir), weights(one.run_dir))
    assert deterministic(here.run_dir) == deterministic(one.run_dir)
    for two in pairs.values():
        assert difference(weights(here.run_dir), weights(two.run_dir)) < 1e-5
        assert difference(weights(here.run_dir, "value"), weights(two.run_dir, "value")) < 1e-5
        manifest = json.loads((Path(two.run_dir) / "manifest.json").read_text())
        assert manifest["world_size"] == 2


@pytest.mark.slow
def test_a_checkpoint_of_one_worker_goes_on_with_two(
    ppo_job: Job, four_cpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the run of one worker up to rounding, and says why not to its bits."""
    common: dict[str, Any] = {"save_steps": 1, "resume": "auto"}
    here = run(ppo_job("here", **common))
    with monkeypatch.context() as patch:
        patch.setenv("RLHF_RAY_FAULT", "learner:update:step=2:term")
        with pytest.raises(Interrupted):
            run(ppo_job("moved", **common))
    assert not (Path(ppo_job("moved").output_dir) / "adapter").exists()
    said = io.StringIO()
    words = ["learner.num_workers=2"]
    moved = resume(ppo_job("moved").output_dir, LocalConsole(file=said), overrides=words)
    told = [
        line
        for line in said.getvalue().splitlines()
        if "exact" in line or "resuming" in line or "continuing with" in line
    ]
    assert len(told) == 3 and told[0] == "ppo: continuing with learner.num_workers 2 (was 0)"
    assert told[1].startswith("ppo: resuming from step ")
    assert told[2] == "warning: resumes, not bit-exact: world size 1 -> 2"
    assert [row["step"] for row in deterministic(moved.run_dir)] == [row["step"] for row in deterministic(here.run_dir)]
    assert difference(weights(here.run_dir), weights(moved.run_dir)) < 1e-5
    assert difference(weights(here.run_dir, "value"), weights(moved.run_dir, "value")) < 1e-5
