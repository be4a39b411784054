"""`plan`: the models it describes are those that a job loads, more work takes more memory, and its advice fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf_ray.cli import main
from rlhf_ray.config import EvaluateConfig, LoraConfig, PipelineConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_ray.config.load import load_any
from rlhf_ray.console import LocalConsole
from rlhf_ray.models import quantisation
from rlhf_ray.models.adapters import adapter_config, adapter_tensors, save_adapter, wrap
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.models.role_models import RoleModels
from rlhf_ray.plan.advice import options, recommendation, smallest_change, warnings
from rlhf_ray.plan.engine import BESIDES
from rlhf_ray.plan.estimate import Estimator, changed, with_stages
from rlhf_ray.plan.job_plan import plan, room_here, text
from rlhf_ray.plan.memory import CARDS, GIB, Process
from rlhf_ray.plan.role_models import Made, evaluation_models, generator_models, learner_models, scorer_models
from rlhf_ray.ppo.models import assemble, assemble_generator, assemble_scorer
from rlhf_ray.runtime.session import Session
from rlhf_ray.stages.evaluation_models import load_evaluation_models
from rlhf_ray.submit import probe

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048}
LLAMA |= {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "dtype": "bfloat16"}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA_7B = LLAMA | {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 2}
LLAMA_7B |= {"num_attention_heads": 32, "num_key_value_heads": 32}
"""Layers as wide as those of 7 G weights, and two of them."""


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., str]:
    """model(name, config): a folder with a config.json and nothing else."""

    def make(name: str = "model", config: dict[str, Any] = LLAMA, **changes: Any) -> str:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return str(folder)

    return make


def ppo(path: str, **fields: Any) -> PPOConfig:
    given: dict[str, Any] = {"rewards": [{"function": "f.py:score"}], "max_length": 96, "response_length": 32, **fields}
    return PPOConfig(output_dir="run", model_name_or_path=path, data={"train": "d"}, **given)  # type: ignore[arg-type]


def only(job: Any, device: Any = "cuda", **more: Any) -> Process:
    (process,) = Estimator(device, **more).processes(job)
    return process


# ---------------------------------------------------------------- who sits where


@pytest.fixture
def trained(tiny_llama: Callable[..., Path], make_backbone: Callable[..., Backbone], tmp_path: Path) -> dict[str, str]:
    """A base with an SFT adapter and a reward adapter on it, and a reward model that is a whole checkpoint."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    base = tiny_llama()
    for name, head, r in (("sft", None, 4), ("reward", torch.ones(1, 64), 2), ("other", torch.ones(1, 64), 3)):
        peft_model = wrap(make_backbone().model, LoraConfig(r=r), "x", seed=0)
        tensors = {k: t + 0.01 * r for k, t in adapter_tensors(peft_model, "x").items()}
        kind: Any = "CAUSAL_LM" if head is None else "SEQ_CLS"
        save_adapter(tmp_path / name, tensors, adapter_config(peft_model, "x"), kind, head, str(base))
    classifier = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(base, num_labels=1))
    classifier.save_pretrained(tmp_path / "judge")
    for file in base.glob("tokenizer*"):
        (tmp_path / "judge" / file.name).write_bytes(file.read_bytes())
    return {"base": str(base), **{name: str(tmp_path / name) for name in ("sft", "reward", "other", "judge")}}


JOBS: dict[str, dict[str, Any]] = {
    "fresh policy, one base": {},
    "sft and reward adapters": {"sft": "sft", "rewards": [{"run": "reward"}]},
    "reward model of its own": {"rewards": [{"model": "judge"}], "lora": {"r": 2}},
    "shared critic": {"sft": "sft", "value": {"adapter": "shared"}},
    "no critic": {"advantage_estimator": "rloo", "num_generations": 2},
    "split": {"placement": "split", "sft": "sft", "rewards": [{"run": "reward"}]},
    "ensemble": {"sft": "sft", "rewards": [{"ensemble": ["reward", "other"], "normalize": False}]},
    "split, ensemble": {
        "placement": "split",
        "rewards": [{"ensemble": ["reward", "other"], "normalize": False}],
        "value": {"init_from": "reward:reward/2"},
    },
    "resets of the reference": {"sft": "sft", "ref_model_sync_steps": 5},
    "split, resets": {"placement": "split", "ref_model_sync_steps": 5, "lora": {"r": 2}},
    "split, critic of its own": {"placement": "split", "rewards": [{"model": "judge"}], "value": {"lora": {"r": 3}}},
}


@pytest.mark.parametrize("name", JOBS)
def test_planned_models_are_those_that_are_loaded(trained: dict[str, str], name: str, tmp_path: Path) -> None:
    fields = json.loads(json.dumps(JOBS[name]))
    for holder in (fields, *fields.get("rewards", ())):
        holder.update({k: trained[v] for k, v in holder.items() if str(v) in trained})
        holder.update({k: [trained[v] for v in vs] for k, vs in holder.items() if k == "ensemble"})
    (tmp_path / "f.py").write_text("def score(completions, **_):\n    return [0.0 for _ in completions]\n")
    if "rewards" not in fields:
        fields["rewards"] = [{"function": f"{tmp_path}/f.py:score"}]
    job = ppo(trained["base"], template="none", **fields)
    cpu, made = torch.device("cpu"), Made()
    pairs = [(assemble(job, cpu)[0], learner_models(job, "cpu", made)[0])]
    if job.placement == "split":
        pairs.append((assemble_generator(job, cpu), generator_models(job, "cpu", made)[0]))
        pairs.append((assemble_scorer(job, cpu)[0], scorer_models(job, "cpu", made)[0]))
    for real, planned in pairs:
        assert planned.bindings == real.bindings
        assert parameters(planned.finish()) == parameters(real.finish())


def parameters(models: RoleModels) -> dict[str, Any]:
    return {n: (tuple(p.shape), p.dtype, p.requires_grad) for n, p in models.named_parameters()}


def test_planned_models_of_an_evaluation_are_those_that_are_loaded(trained: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("def score(completions, **_):\n    return [0.0 for _ in completions]\n")
    policies = {"base": "base", "sft": trained["sft"], "same": trained["base"]}
    both = [trained["reward"], trained["other"]]
    rewards = [{"run": both[0]}, {"model": trained["judge"]}, {"function": f"{tmp_path}/f.py:score"}]
    rewards.append({"ensemble": both, "normalize": False})  # type: ignore[dict-item]
    job = EvaluateConfig(
        output_dir="run",
        model_name_or_path=trained["base"],
        data={"train": "d"},  # type: ignore[arg-type]
        template="none",
        policies=[{"name": name, "policy": policy} for name, policy in policies.items()],  # type: ignore[arg-type]
        rewards=[{"name": f"r{i}", **reward} for i, reward in enumerate(rewards)],  # type: ignore[arg-type]
    )
    real = load_evaluation_models(job, Session(0, 1, torch.device("cpu"), 1, LocalConsole()), None)
    planned = evaluation_models(job, "cpu", Made())[1]
    assert planned.bindings == real.models.bindings
    assert parameters(planned) == parameters(real.models)
    assert [reward.name for reward in real.rewards] == ["r0", "r1", "r2", "r3"]


def test_a_pipeline_knows_the_adapters_that_it_will_make(model: Callable[..., str]) -> None:
    job = PipelineConfig(
        output_dir="runs/x",
        model_name_or_path=model(),
        sft={"data": {"train": "d"}, "lora": {"r": 4}, "max_length": 32},
        reward={"data": {"train": "d"}, "max_length": 32},
        ppo={"data": {"train": "d"}, "max_length": 64, "response_length": 16},
        evaluate={"data": {"train": "d"}, "max_length": 64, "response_length": 16},
    )
    estimator = with_stages(job, Estimator("cuda"))
    found = {stage: estimator.processes(config)[0] for stage, config in estimator.stages(job)}
    n = (
        2 * 4 * (64 * 4 + 2 * 32 + 2 * 64 + 3 * 64 + 3 * 128 + 64 + 64 - 64)
    )  # r (in + out) of q, k, v, o, gate, up, down
    per_adapter = found["sft"].phases["load"]["adapters"]
    assert per_adapter == found["reward"].phases["load"]["adapters"] > 4 * n * 0.5
    # policy, reference, reward, critic, and two scalar heads; evaluation has sft, ppo and reward, and a head
    assert found["ppo"].phases["load"]["adapters"] == 4 * per_adapter + 2 * 512
    assert found["evaluate"].phases["load"]["adapters"] == 3 * per_adapter + 512
    assert all(len(p.bases) == 1 for p in found.values())


# ---------------------------------------------------------------- how much


def test_the_key_value_cache_by_hand(model: Callable[..., str]) -> None:
    """8 rows, 65 + 32 tokens: the prompts' cache (64 columns, the last token is not read with them) stands beside the slots'
    buffer, whose columns are made at once: 97, and 63 for widths that are multiples of 64. K and V of 16 layers, 2 heads of 16,
    bfloat16: 2048 bytes a token."""
    job = ppo(model(num_hidden_layers=16), max_length=97, rollout_chunk_size=8)
    assert only(job).phases["sampling"]["kv cache"] == 2048 * 8 * (64 + 160)


def test_moments_and_masters_by_hand(model: Callable[..., str]) -> None:
    job = ppo(model(), lora={"r": 8, "target_modules": ["q_proj"]}, value={"adapter": "shared"})
    n = 2 * 8 * (64 + 64)  # two layers' A and B
    plain, sharded = only(job), only(changed(job, learner__zero_stage=2, learner__num_workers=4))
    scalars = 512  # of a head of 64 weights: the allocator's granule for each of two moments
    assert plain.phases["update"]["optimizer"] == pytest.approx(8 * n + scalars, abs=1024)
    assert sharded.phases["update"]["optimizer"] == pytest.approx(
        plain.phases["update"]["optimizer"] / 4 + n + 64, abs=4
    )
    eight_bit = only(changed(job, optim="adamw_8bit"))
    assert eight_bit.phases["update"]["optimizer"] < plain.phases["update"]["optimizer"]


@pytest.mark.parametrize(
    ("fields", "phase"),
    [
        ({"rollout_chunk_size": 128}, "sampling"),
        ({"max_length": 160}, "sampling"),
        ({"per_device_train_batch_size": 32}, "update"),
        ({"per_device_train_batch_size": 32}, "scoring"),
        ({"max_length": 160}, "evaluation"),
        ({"dtype": "float32"}, "load"),
        ({"lora": {"r": 64}}, "load"),
        ({"ref_model_sync_steps": 5}, "load"),
        ({"gradient_checkpointing": False}, "update"),
        ({"ptx_coef": 0.1, "ptx_data": {"train": "d"}}, "update"),
    ],
)
def test_more_takes_more(model: Callable[..., str], fields: dict[str, Any], phase: str) -> None:
    job = ppo(model())
    less, more = only(job).phases[phase], only(ppo(model(), **fields)).phases[phase]
    assert sum(more.values()) > sum(less.values())


def test_adapters_multiplied_in_bfloat16_keep_fewer_bytes_for_the_backward_pass(model: Callable[..., str]) -> None:
    """In float32 every adapted layer keeps its input once more, widened, and q, k and v each their own copy of the same one."""
    whole = {"gradient_checkpointing": False, "dtype": "bfloat16"}
    wide, narrow = (
        only(ppo(model(config=LLAMA_7B), lora_compute_dtype=name, **whole)).phases["update"]["activations"]
        for name in ("float32", "bfloat16")
    )
    assert narrow < 0.8 * wide


def test_a_budget_of_tokens_is_that_many_tokens_of_rows(model: Callable[..., str]) -> None:
    """Rows have 96 tokens: a budget of 4 of them takes what 4 rows take; half a row more takes more than 4 rows and less than 5."""
    path = model()

    def peaks(**fields: Any) -> dict[str, int]:
        phases = only(ppo(path, rollout_batch_size=64, num_mini_batches=1, **fields)).phases
        return {name: sum(phases[name].values()) for name in ("scoring", "evaluation", "update")}

    four, five = peaks(per_device_train_batch_size=4), peaks(per_device_train_batch_size=5)
    assert peaks(tokens_per_microbatch=4 * 96) == four and peaks(tokens_per_microbatch=95) == peaks(
        per_device_train_batch_size=1
    )
    between = peaks(tokens_per_microbatch=4 * 96 + 48)
    assert all(four[name] < between[name] < five[name] for name in four)


def test_rows_without_a_mask_take_less(model: Callable[..., str]) -> None:
    """Than the layout of older runs, which are planned as they are finished; packed rows have a mask of all pairs in those, and
    where attention cannot read them one by one."""
    path = model()
    now, unpacked, before = (sum(only(ppo(path, defaults_version=v)).phases["update"].values()) for v in (4, 3, 2))
    assert unpacked < before and now == pytest.approx(unpacked, rel=0.01), "rows of full length have no padding to lose"

    def sft(**fields: Any) -> int:
        job = SFTConfig(output_dir="run", model_name_or_path=path, data={"train": "d"}, **fields)  # type: ignore[arg-type]
        return sum(only(job).phases["update"].values())

    tokens = 8 * 512
    older: dict[str, Any] = {"defaults_version": 3}
    assert sft(packing=True, **older) > sft(**older) + tokens**2
    eager: dict[str, Any] = {"attn_implementation": "eager"}
    assert sft(packing=True, **eager) > sft(**eager) + tokens**2
    assert sft(packing=True) == sft()
    assert sft(packing=True, attn_implementation="flash_attention_2", **older) < 1.1 * sft()


def test_quantised_bases_take_less_and_a_second_base_more(model: Callable[..., str]) -> None:
    sizes = [
        only(ppo(model(), **f)).phases["load"]["bases"] for f in ({}, {"load_in_8bit": True}, {"load_in_4bit": True})
    ]
    assert sizes[0] > sizes[1] > sizes[2]
    two = only(ppo(model(), rewards=[{"model": model("judge")}]))
    assert len(two.bases) == 2 and two.phases["load"]["bases"] > 1.5 * sizes[0]


def test_split_moves_sampling_and_scoring_away(model: Callable[..., str]) -> None:
    job = ppo(model(), rewards=[{"model": model("judge")}], placement="split")
    found = {p.role: set(p.phases) for p in Estimator("cuda").processes(job)}
    assert found == {
        "learner": {"load", "evaluation", "update"},
        "generator": {"load", "sampling"},
        "scorer": {"load", "scoring"},
    }


@pytest.mark.parametrize("cls", [SFTConfig, RewardConfig])
def test_supervised_stages(model: Callable[..., str], cls: type) -> None:
    fields = {"output_dir": "r", "model_name_or_path": model(), "data": {"train": "d"}}
    small, large = (only(cls(**fields, per_device_train_batch_size=n, max_length=64)) for n in (4, 16))
    assert large.phases["update"]["activations"] > 3 * small.phases["update"]["activations"]


def test_estimating_twice_gives_the_same(model: Callable[..., str]) -> None:
    estimator, job = Estimator("cuda"), ppo(model())
    assert estimator.processes(job) == estimator.processes(job) == Estimator("cuda").processes(job)


# ---------------------------------------------------------------- advice


def test_advice_is_the_mildest_change_that_fits(model: Callable[..., str]) -> None:
    fields = {"rollout_chunk_size": 64, "max_length": 1024, "response_length": 512, "per_device_train_batch_size": 1}
    job = ppo(model("wide", LLAMA_7B), **fields)
    estimator = Estimator("cuda")
    (as_is,) = estimator.processes(job)
    assert as_is.phase == "sampling" and smallest_change(job, estimator, as_is.total).settings == ""  # type: ignore[union-attr]
    change = smallest_change(job, estimator, int(0.8 * as_is.total))
    assert (
        change is not None and change.settings.startswith("rollout_chunk_size=") and change.fullest <= 0.8 * as_is.total
    )
    (with_it,) = estimator.processes(changed(job, rollout_chunk_size=int(change.settings.split("=")[1].split()[0])))
    assert with_it.total >= change.fullest
    short = changed(job, max_length=128, response_length=64)
    base = sum(as_is.phases["load"].values())
    quantised = smallest_change(short, estimator, int(0.9 * base))
    assert quantised is not None and "load_in_" in quantised.settings
    assert smallest_change(job, estimator, GIB // 4) is None


def test_recommendation_names_a_card(model: Callable[..., str]) -> None:
    job, estimator = ppo(model()), Estimator("cuda")
    assert recommendation(job, estimator, None).startswith("GPUs of 16 GB, the smallest that hold the job as it is")
    assert recommendation(job, estimator, 24).startswith("run it as it is: its fullest GPU needs 0.")
    assert "does not fit 0.5 GiB" in recommendation(job, estimator, 0.5)


def test_more_rows_are_recommended_where_they_fit(model: Callable[..., str]) -> None:
    """The key-value cache of 256 rows, and no word of it where it has no room, or where the job says how many rows."""
    small = {"lora": LoraConfig(r=4), "max_length": 1024, "per_device_train_batch_size": 1}
    job, estimator = ppo(model("wide", LLAMA_7B), **small), Estimator("cuda")
    needed = {n: only(changed(job, rollout_chunk_size=n)).total / GIB for n in (64, 128, 256)}
    assert needed[64] < needed[128] < needed[256]
    told = recommendation(job, estimator, 80)
    assert told.endswith(f"it decodes faster with rollout_chunk_size=256 ({needed[256]:.1f} GiB)")
    between = (needed[128] + needed[256]) / 2
    assert "rollout_chunk_size=128" in recommendation(job, estimator, between)
    assert "rollout_chunk_size" not in recommendation(job, estimator, (needed[64] + needed[128]) / 2)
    assert "rollout_chunk_size" not in recommendation(changed(job, sampler_rows=64), estimator, 80)
    assert only(changed(job, rollout_chunk_size=256, sampler_rows=64)).total < needed[256] * GIB


def test_options_are_both_placements_at_every_stage_that_the_job_can_have(model: Callable[..., str]) -> None:
    found = [o.name for o in options(ppo(model()), Estimator("cuda"))]
    assert [n.split(",")[:2] for n in found] == [[p, f" ZeRO {z}"] for p in ("colocate", "split") for z in range(4)]
    quantised = [o.name for o in options(ppo(model(), load_in_4bit=True), Estimator("cuda"))]
    assert len(quantised) == 6 and not any("ZeRO 3" in name for name in quantised)
    assert len(list(options(ppo(model(), optim="adafactor"), Estimator("cuda")))) == 2


def test_zero_is_warned_of_where_it_disappoints(model: Callable[..., str]) -> None:
    estimator = Estimator("cuda")

    def told(**learner: Any) -> str:
        job = ppo(model(), learner=learner)
        return " ".join(warnings(job, estimator.processes(job), estimator))

    assert told() == ""
    assert "ZeRO 2 with 1 worker saves nothing" in told(zero_stage=2) and "bucket" not in told(zero_stage=2)
    assert "placement=split decodes with a base of its own" in told(zero_stage=3, num_workers=2)


# ---------------------------------------------------------------- the command


@pytest.fixture
def job(model: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("f.py").write_text("def score(completions, **_):\n    return [0.0]\n")
    fields = {"output_dir": "run", "model_name_or_path": model(), "data": {"train": "no.jsonl"}, "response_length": 32}
    Path("job.yaml").write_text(yaml.safe_dump({**fields, "rewards": [{"function": "f.py:score"}]}))
    return "job.yaml"


def test_the_command_prints_a_table(job: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", job, "learner.num_gpus=1"]) == 0
    out, _ = capfd.readouterr()
    for expected in (
        "GiB per process",
        "1 x learner",
        "GiB per GPU: learner",
        "what fits a card of",
        "split, ZeRO 3, 2 learners",
        "note: max_length is not set: prompts of 1024 tokens are assumed",
        "recommended: GPUs of 16 GB",
        "cannot be placed: learner.num_gpus: no node has 1 GPU",
    ):
        assert expected in out
    assert not Path("run").exists()


def test_the_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray._private.utils.get_cgroup_mem_stats", lambda: (2**26, 2**28))
    for part in ("_common", "_private"):
        monkeypatch.setattr(f"ray.{part}.utils.get_system_memory", lambda: 2**28)
    assert probe.memory() == (2**28, 2**28 - 2**26)
    assert room_here("cpu") == (3 / 16, "0.2 GiB of memory free")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: (2**30, 2**31))
    assert quantisation._own_memory(torch.device("cuda", 1)) == {1: 2**30, "cpu": 2**28 - 2**26}


def test_the_command_prints_json(job: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", job, "--json", "--prompt-tokens", "100"]) == 0
    found = json.loads(capfd.readouterr().out)
    (stage,) = found["stages"]
    (learner,) = stage["processes"]
    assert learner["peak_bytes"] == sum(learner["parts"].values()) == max(learner["phases"].values())
    assert found["device"] == "cuda" and found["placement"]["fits"] and len(stage["options"]) == 9
    assert set(found["cards_gib"]) == {str(card) for card in CARDS}


def test_check_makes_it_an_exit_code(job: str, model: Callable[..., str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", job, "--check", "--gpu", "1"]) == 0
    assert main(["plan", job, "--check", "--gpu", "1", f"model_name_or_path={model('wide', LLAMA_7B)}"]) == 3
    assert main(["plan", job, "--check", "learner.num_gpus=1"]) == 3
    assert main(["plan", job, "--check", "--device", "cpu"]) == 0
    assert "GiB of memory for all processes" in capfd.readouterr().out


def test_what_is_wrong_is_told(job: str, capfd: pytest.CaptureFixture[str]) -> None:
    for wrong, expected in (
        (["--device", "tpu"], "expected auto, cuda or cpu; got tpu"),
        (["model_name_or_path=nowhere"], "model_name_or_path"),
        (["response_length=2048"], "response_length: leaves no room for a prompt"),
    ):
        assert main(["plan", job, *wrong]) == 2
        assert expected in capfd.readouterr().err
    Path("model", "config.json").unlink()
    assert main(["plan", job]) == 2
    assert "has no config.json; expected a folder that has one, weights or not" in capfd.readouterr().err


def test_the_jobs_that_come_along(model: Callable[..., str]) -> None:
    """Their headers quote `plan`; here with two layers of their models, for speed."""
    jobs, small = Path(__file__).parents[3] / "jobs", model("wide", LLAMA_7B)
    for name in ("ppo_2xa100_split", "ppo_2xa100_colocate", "alpaca_8b_24gb"):
        file = jobs / f"{name}.yaml"
        rewards = [] if "alpaca" in name else ["rewards=[{name: reward, model: " + small + "}]"]
        _, config = load_any(file, [f"model_name_or_path={small}", *rewards])
        found = plan(config, "cuda")
        assert all(stage.processes for stage in found.stages) and "recommended" in text(found)


def test_states_do_not_grow_with_replies_and_keys_do(model: Callable[..., str]) -> None:
    """Mamba has states alone: sampling 512 tokens takes what 32 take. One of LFM2's two layers has keys and values."""
    small = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "state_size": 8}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    kinds = {"falcon_mamba": {}, "lfm2": {"layer_types": ["conv", "full_attention"]}}
    for kind, fields in kinds.items():
        path = model(kind, {"model_type": kind, **small, **fields})
        short, long = (
            sum(only(ppo(path, response_length=n, max_length=n + 24), prompt=24).phases["sampling"].values())
            for n in (32, 512)
        )
        assert short < long if kind == "lfm2" else short == long


# ---------------------------------------------------------------- vLLM


def test_an_engine_of_its_own(model: Callable[..., str]) -> None:
    """A base, a slot of the rank that vLLM has (8 for 4), keys and values of one chunk: 16 x 96 tokens x 2 layers x 2 x 2 heads of
    16 in two bytes. Beside a learner it is there in every phase; asleep, not while the learner learns."""
    fields: dict[str, Any] = {"rollout_chunk_size": 16, "rollout_batch_size": 64, "lora": {"r": 4}}
    vllm = {"engine": "vllm"}
    builtin, alone = (
        next(
            p
            for p in Estimator("cuda").processes(ppo(model(), placement="split", **fields, **more))
            if p.role == "generator"
        )
        for more in ({}, {"rollout": vllm})
    )
    parts = alone.phases["sampling"]
    assert parts["bases"] == pytest.approx(builtin.phases["sampling"]["bases"], rel=0.01)
    assert parts["adapters"] == builtin.phases["sampling"]["adapters"]  # twice the rank, half the bytes of a number
    assert parts["kv cache"] == 16 * 96 * 2 * 2 * 2 * 16 * 2
    before, awake, asleep = (
        only(ppo(model(), **fields, **more)).phases
        for more in ({}, {"rollout": vllm}, {"rollout": {**vllm, "enable_sleep_mode": True}})
    )
    engine = sum(parts[name] for name in ("bases", "adapters", "kv cache")) + BESIDES
    assert sum(awake["update"].values()) == pytest.approx(sum(before["update"].values()) + engine, rel=0.01)
    assert asleep["update"] == before["update"] and asleep["scoring"] == awake["scoring"]
    on_cpu = only(ppo(model(), **fields, rollout=vllm, dtype="float32"), device="cpu").phases["sampling"]
    assert on_cpu["kv cache"] == GIB
    assert only(ppo(model(), **fields, rollout={**vllm, "kv_cache_gb": 2.0})).phases["load"]["kv cache"] == 2 * GIB


def test_the_plan_says_what_vllm_takes(model: Callable[..., str]) -> None:
    job = ppo(model(), rollout={"engine": "vllm"})
    (note,) = [line for line in Estimator("cuda").notes(job) if line.startswith("vLLM takes 0.3 of its GPU")]
    assert "of 24 GB" in note and "of 80 GB" in note
    assert not [line for line in Estimator("cpu").notes(job) if "vLLM" in line]
    change = smallest_change(ppo(model("7b", LLAMA_7B), rollout={"engine": "vllm"}), Estimator("cuda"), 2 * GIB)
    assert change is None or "rollout.engine=builtin" in change.settings
