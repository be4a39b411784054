"""Bad job files and the exact line that a user sees, by the rows of the fault table (28 to 60) that the loader answers.

The bad field stands on line 5 of a minimal PPO job; each is given to the command as well as an override.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_ray.cli import main

PENALTIES = "one of kl, clamped_kl, bregman, jensen_shannon, squared_error, none, k1, k2, k3"
NAME_RULE = "use 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit"

# (row, what is written on line 5, the field that the line names, the rest of the line)
FAULTS: list[tuple[str, str, str, str]] = [
    ("28", "leraning_rate: 1e-4", "leraning_rate", "unknown key; fix: did you mean learning_rate?"),
    ("28 of an ancestor", "noptepochs: 4", "noptepochs", "unknown key; fix: write num_ppo_epochs"),
    ("38 under another name", "kl_estimator: k4", "kl_estimator", "unknown key; fix: write kl_penalty"),
    ("28 in a section", "lora: {rank: 8}", "lora.rank", "unknown key; fix: remove it; fields here: preset, r, lora_alpha, "
     "lora_dropout, target_modules, target_parameters, use_rslora"),
    ("28 elsewhere", "zero_stage: 2", "zero_stage", "unknown key; fix: write learner.zero_stage: it does not belong to the top"),
    ("28 other stage", "train_on_inputs: true", "train_on_inputs", "unknown key; fix: it is a field of sft jobs; remove it"),
    ("29 text", 'kl_coef: "1e-4"', "kl_coef", "wrong type; expected number >= 0; got '1e-4'; fix: write it without quotes"),
    ("29 bool", "seed: true", "seed", "wrong type; expected integer >= 0 and < 2^63; got true; fix: the default is 0"),
    ("29 in a section", "value: {learning_rate: '1e-4'}", "value.learning_rate",
     "wrong type; expected number > 0 or null; got '1e-4'; fix: write it without quotes"),
    ("29 number for text", "run_name: 7", "run_name", 'wrong type; expected text or null; got 7; fix: write "7"'),
    ("29 underscores", "rollout_batch_size: 1_024", "rollout_batch_size",
     "wrong type; expected integer >= 8; got '1_024'; fix: write 1024"),
    ("29 no section", "lora: 8", "lora",
     "wrong type; expected a section with fields preset, r, lora_alpha, lora_dropout, ...; got 8"),
    ("30 no", "whiten_rewards: no", "whiten_rewards", "wrong type; expected true or false; got 'no'; fix: write false"),
    ("30 on", "whiten_rewards: on", "whiten_rewards", "wrong type; expected true or false; got 'on'; fix: write true"),
    ("32 lr 0", "learning_rate: 0", "learning_rate", "out of range; expected number > 0; got 0; fix: the default is 2e-5"),
    ("32 lr negative", "learning_rate: -1e-5", "learning_rate",
     "out of range; expected number > 0; got -1e-5; fix: the default is 2e-5"),
    ("32 lr nan", "learning_rate: .nan", "learning_rate",
     "out of range; expected number > 0; got nan; fix: the default is 2e-5"),
    ("32 lr inf", "learning_rate: .inf", "learning_rate",
     "out of range; expected number > 0; got inf; fix: the default is 2e-5"),
    ("32 overflow", "kl_coef: 1e999", "kl_coef", "out of range; expected number >= 0; got inf; fix: the default is 0.05"),
    ("32 clip", "cliprange: -0.2", "cliprange", "out of range; expected number > 0 and < 1; got -0.2; fix: the default is 0.2"),
    ("32 gamma", "gamma: 1.01", "gamma", "out of range; expected number from 0 to 1; got 1.01; fix: the default is 1"),
    ("32 lambda", "lam: -0.1", "lam", "out of range; expected number from 0 to 1; got -0.1; fix: the default is 0.95"),
    ("33 alpha", "lora: {lora_alpha: -4}", "lora.lora_alpha",
     "out of range; expected number > 0; got -4; fix: the default is 32"),
    ("33 dropout", "lora: {lora_dropout: -1}", "lora.lora_dropout",
     "out of range; expected number >= 0 and < 1; got -1; fix: the default is 0"),
    ("34 r 0 (F5)", "lora: {r: 0}", "lora.r", "out of range; expected integer from 1 to 1024; got 0; fix: the default is 16"),
    ("34 r -1", "lora: {r: -1}", "lora.r", "out of range; expected integer from 1 to 1024; got -1; fix: the default is 16"),
    ("34 r 8.5", "lora: {r: 8.5}", "lora.r", "wrong type; expected integer from 1 to 1024; got 8.5; fix: the default is 16"),
    ("37", "lora: {target_modules: ['.*(q|v)_proj']}", "lora.target_modules",
     "target_modules takes module names, not a regular expression: '.*(q|v)_proj'"),
    ("38 penalty", "kl_penalty: k4", "kl_penalty", f"not a choice; expected {PENALTIES}; got 'k4'"),
    ("38 controller", "kl_controller: adaptve", "kl_controller",
     "not a choice; expected one of fixed, adaptive, horizon; got 'adaptve'; fix: did you mean adaptive?"),
    ("38 in a list", "report_to: [tensorboard, wand]", "report_to[1]",
     "not a choice; expected one of tensorboard, wandb; got 'wand'; fix: did you mean wandb?"),
    ("39", "kl_target: 0", "kl_target", "out of range; expected number > 0; got 0; fix: the default is 6"),
    ("40 mini-batches", "num_mini_batches: 48", "num_mini_batches", "48 does not divide rollout_batch_size 256 (try 32 or 64)"),
    ("40 generations", "num_generations: 3", "num_generations", "3 does not divide rollout_batch_size 256 (try 2 or 4)"),
    ("40 accumulation", "gradient_accumulation_steps: 4", "gradient_accumulation_steps",
     "derived from the batch sizes; setting it is an error; got 4; fix: drop it"),
    ("43", "learner: {num_workers: -1}", "learner.num_workers",
     "out of range; expected integer >= 0; got -1; fix: the default is 1"),
    ("43 GPUs of no worker", "learner: {num_workers: 0, num_gpus: 1}", "learner.num_gpus",
     "has no effect with num_workers: 0, which runs where this process runs; drop it"),
    ("43 a shared GPU", "learner: {num_workers: 2, num_gpus: 0.5}", "learner.num_gpus",
     "0.5 lets several of 2 workers share a GPU, which NCCL refuses; set 1, a share above 0.5, or 0 for the CPU"),
    ("43 GPUs", "learner: {num_gpus: -1}", "learner.num_gpus", "out of range; expected number >= 0 or null; got -1"),
    ("32 warm-up", "warmup_steps: -1", "warmup_steps",
     "out of range; expected number >= 0; got -1; fix: the default is 0.05"),
    ("45 zero", "response_length: 0", "response_length",
     "out of range; expected integer >= 1; got 0; fix: the default is 128"),
    ("46 temperature", "temperature: 0", "temperature",
     "out of range; expected number from 0.01 to 100.0; got 0; fix: the default is 1"),
    ("46 temperature, 0 in float32", "temperature: 1e-50", "temperature",
     "out of range; expected number from 0.01 to 100.0; got 1e-50; fix: the default is 1"),
    ("46 top_p", "eval_sampling: {top_p: 5}", "eval_sampling.top_p",
     "out of range; expected number > 0 and <= 1; got 5; fix: the default is 1"),
    ("46 greedy (F20)", "eval_sampling: {do_sample: false, temperature: 0.7}", "eval_sampling.temperature",
     "temperature, top_p and top_k have no effect with do_sample: false; drop them or sample"),
    ("58 every", "save_steps: 0", "save_steps",
     "out of range; expected integer >= 1 or list of integers or null; got 0"),
    ("58 listed", "save_steps: [20, 0]", "save_steps", "steps start at 1"),
    ("58 keep", "save_total_limit: 0", "save_total_limit",
     "out of range; expected integer >= 1 or null; got 0; fix: the default is 3"),
    ("58 eval", "eval_steps: -5", "eval_steps", "out of range; expected integer >= 1 or null; got -5"),
    ("59 traversal", "run_name: ../../x", "run_name", f"{NAME_RULE}: '../../x'"),
    ("59 slash", "run_name: a/b", "run_name", f"{NAME_RULE}: 'a/b'"),
    ("59 newline", 'run_name: "a\\n"', "run_name", f"{NAME_RULE}: 'a\\n'"),
    ("59 long", f"run_name: {'a' * 300}", "run_name", f"{NAME_RULE}: '{'a' * 300}'"),
    ("60 null", "seed: null", "seed", "wrong type; expected integer >= 0 and < 2^63; got null; fix: the default is 0"),
    ("60 negative", "seed: -1", "seed", "out of range; expected integer >= 0 and < 2^63; got -1; fix: the default is 0"),
    ("60 2^64", f"seed: {2**64}", "seed",
     f"out of range; expected integer >= 0 and < 2^63; got {2**64}; fix: the default is 0"),
    ("F33 batch", "rollout_batch_size: 4", "rollout_batch_size",
     "out of range; expected integer >= 8; got 4; fix: the default is 256"),
    ("value.init_from", "value: {init_from: reward:judge}", "value.init_from", "no reward is called 'judge'; rewards: reward"),
    ("too many digits", f"kl_coef: {'9' * 400}", "kl_coef",
     f"out of range; expected number >= 0; got {'9' * 97}...; fix: the default is 0.05"),
    ("too many digits of what others follow", f"learning_rate: {'9' * 400}", "learning_rate",
     f"out of range; expected number > 0; got {'9' * 97}...; fix: the default is 2e-5"),
    ("29 list for a choice", "lora: {preset: [x]}", "lora.preset",
     "not a choice; expected one of alpaca_farm_lora, alpaca_lora_rlhf or null; got [x]"),
]  # fmt: skip
IDS = [fault[0] for fault in FAULTS]
JOB = "output_dir: runs/ppo\nmodel_name_or_path: base\ndata: {train: prompts.jsonl}\nrewards: [{run: runs/reward}]\n"


def run(*args: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines on stderr of a command that must end with exit code 2, in 2 seconds, with nothing on stdout."""
    start = time.perf_counter()
    code = main(args)
    assert time.perf_counter() - start < 2
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    return err.splitlines()


@pytest.mark.parametrize(("row", "text", "field", "message"), FAULTS, ids=IDS)
def test_a_bad_field_in_the_file(
    row: str, text: str, field: str, message: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("job.yaml").write_text(JOB + text + "\n")
    assert run("ppo", "job.yaml", capsys=capsys) == [f"error: job.yaml:5: {field}: {message}"]


@pytest.mark.parametrize(("row", "text", "field", "message"), FAULTS, ids=IDS)
def test_a_bad_override(
    row: str, text: str, field: str, message: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("job.yaml").write_text(JOB)
    name, _, value = text.partition(": ")
    override = f"{name}={value}"
    shown = override if len(override) <= 100 else override[:97] + "..."
    deeper = f": {field}" if field != name else ""
    assert run("ppo", "job.yaml", override, capsys=capsys) == [f"error: override {shown}{deeper}: {message}"]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            "max_length: 128\nresponse_length: 128",
            "job.yaml:6: response_length: 128 leaves no room for a prompt in max_length 128",
        ),
        (
            "advantage_estimator: grpo",
            "job.yaml: num_generations: grpo compares replies of one prompt; expected at least 2; got 1",
        ),
        ("min_response_length: 200", "job.yaml:5: min_response_length: 200 is over response_length 128"),
        (
            "sft: runs/sft\nlora: {r: 8}",
            "job.yaml:6: lora: the policy copies the SFT adapter's r, alpha and targets; drop lora, "
            "or merge the SFT adapter first",
        ),
        (
            "load_in_8bit: true\nload_in_4bit: true",
            "job.yaml:5: load_in_8bit: load_in_8bit and load_in_4bit exclude each other",
        ),
        ("cpu_offload: true", "job.yaml:5: cpu_offload: cpu_offload needs load_in_8bit or load_in_4bit"),
        (
            "optim: adafactor\nlearner: {zero_stage: 1}",
            "job.yaml:5: optim: adafactor loses its statistics of whole tensors when ZeRO cuts them up; "
            "expected adamw_torch, or learner.zero_stage 0; got zero_stage 1",
        ),
        (
            "optim: adamw_8bit\nlearner: {zero_stage: 3}",
            "job.yaml:5: optim: adamw_8bit loses its statistics of whole tensors when ZeRO cuts them up; "
            "expected adamw_torch, or learner.zero_stage 0; got zero_stage 3",
        ),
        (
            "load_in_4bit: true\nlearner: {zero_stage: 3}",
            "job.yaml:6: learner.zero_stage: 3 cannot cut up a quantised base; expected 0, 1 or 2",
        ),
        (
            "filter_groups: true",
            "job.yaml:5: filter_groups: compares replies to one prompt; expected num_generations of at least 2; got 1",
        ),
        (
            "ptx_coef: 0.1",
            "job.yaml:5: ptx_coef: there are no rows to learn from; set ptx_data, as data of an sft job, or ptx_coef: 0",
        ),
        (
            "ptx_coef: 0.1\nptx_data: {train: sft.jsonl, eval_max_rows: 4}",
            "job.yaml:6: ptx_data.eval_max_rows: has no effect: nothing is evaluated on ptx_data, all of it trains; drop it",
        ),
        (
            "ptx_coef: 0.1\nptx_data: {train: sft.jsonl, streaming: true}",
            "job.yaml:6: ptx_data.streaming: PPO keeps all its rows in memory; set ptx_data.max_rows, or drop it",
        ),
        ("overlong_buffer: 200", "job.yaml:5: overlong_buffer: 200 is over response_length 128"),
        ("watch: judge", "job.yaml:5: watch: no reward is called 'judge'; expected one of weight 0: none"),
        ("watch: reward", "job.yaml:5: watch: reward reward is maximised; expected one of weight 0: none"),
        ("max_steps: 0", "job.yaml:5: max_steps: expected at least 1, or -1; got 0"),
        (
            "kl_controller: adaptive\nkl_step_size: 5",
            "job.yaml:6: kl_step_size: the coefficient could turn negative in one step; expected below 5; got 5; fix: lower it"
            " (AlpacaFarm: 0.1)",
        ),
        (
            "kl_controller: horizon\nkl_horizon: 51.2\nrollout_batch_size: 256",
            "job.yaml:6: kl_horizon: the coefficient could turn negative in one step; expected above 0.2 x rollout_batch_size ="
            " 51.2; got 51.2; fix: raise it (TRL: 10000)",
        ),
    ],
)
def test_rules_across_fields(lines: str, expected: str, complaints: Callable[..., list[str]]) -> None:
    assert complaints("ppo", JOB + lines + "\n") == [f"error: {expected}"]


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ("ensemble: runs/sft", "rewards[0].ensemble: expected at least 2 reward runs; got 1; name more, or use run"),
        ("ensemble: []", "rewards[0].ensemble: expected at least 2 reward runs; got 0; name more, or use run"),
        (
            "ensemble: [runs/sft, runs/reward, ./runs/sft/]",
            "rewards[0].ensemble: runs/sft is named 2 times; expected different reward runs",
        ),
        (
            "ensemble: [runs/sft, runs/reward], aggregate: min, std_coef: 0.5",
            "rewards[0].std_coef: has no effect with aggregate min; drop it, or set aggregate: mean_minus_std",
        ),
        ("run: runs/reward, aggregate: min", "rewards[0].aggregate: only an ensemble has one; drop it"),
        ("run: runs/reward, std_coef: 1", "rewards[0].std_coef: only an ensemble has one; drop it"),
        (
            "ensemble: [runs/sft, runs/reward], aggregate: lowest",
            "rewards[0].aggregate: not a choice; expected one of mean_minus_std, min, mean or null; got 'lowest'",
        ),
        (
            "ensemble: [runs/sft, runs/reward], run: runs/sft",
            "rewards[0]: a reward needs exactly one of run, ensemble, model, function, url, llm",
        ),
        (
            "ensemble: [runs/sft, runs/reward], template: alpaca",
            "rewards[0].template: an ensemble reads the policy's own tokens; drop it",
        ),
        (
            "ensemble: [runs/sft, runs/rewrad]",
            "rewards[0].ensemble[1]: no such folder; expected a folder; got runs/rewrad; fix: did you mean runs/reward?",
        ),
    ],
)
def test_a_bad_ensemble(reward: str, expected: str, complaints: Callable[..., list[str]]) -> None:
    job = JOB.replace("{run: runs/reward}", f"{{{reward}}}")
    assert complaints("ppo", job) == [f"error: job.yaml:4: {expected}"]


def test_a_value_model_starts_from_one_member_of_an_ensemble(complaints: Callable[..., list[str]]) -> None:
    job = JOB.replace("{run: runs/reward}", "{name: rm, ensemble: [runs/sft, runs/reward]}")
    assert complaints("ppo", job + "value: {init_from: 'reward:rm'}\n") == [
        "error: job.yaml:5: value.init_from: reward 'rm' is an ensemble; expected one member of it: reward:rm/1 or reward:rm/2"
    ]
    assert complaints("ppo", job + "value: {init_from: 'reward:rm/3'}\n") == [
        "error: job.yaml:5: value.init_from: no reward is called 'rm/3'; rewards: rm/1, rm/2"
    ]


def test_a_run_folder_on_a_store_and_credentials_in_uris(
    complaints: Callable[..., list[str]], workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would end up in config.yaml and in logs; the lines that refuse them do not show them either."""
    secret = "a URI has credentials in it; they belong into the environment of each machine that uses it"
    job = JOB.replace("runs/ppo", "s3://bucket/ppo").replace("prompts.jsonl", "s3://key:hunter2@bucket/x.jsonl")
    assert complaints("ppo", job + "copy_to: s3://key:hunter2@bucket/ppo\n") == [
        "error: job.yaml:1: output_dir: is a URI; expected a folder (copy_to copies a run to an object store)",
        f"error: job.yaml:3: data.train: {secret}",
        f"error: job.yaml:5: copy_to: {secret}",
    ]
    Path("job.yaml").write_text(JOB)
    override = "copy_to=s3://key:hunter2@bucket/ppo"
    assert run("ppo", "job.yaml", override, capsys=capsys) == [f"error: override copy_to=s3://***@bucket/ppo: {secret}"]


def test_a_deepspeed_file_is_read_with_the_job(complaints: Callable[..., list[str]], workdir: Path) -> None:
    """Keys of the job in it, and a stage other than the job's, are told before anything is loaded."""
    Path("ds.json").write_text('{"bf16": {"enabled": true}, "zero_optimization": {"stage": 2}}')
    assert complaints("ppo", JOB + "learner: {deepspeed: ds.json, zero_stage: 3}\n") == [
        "error: job.yaml:5: learner.deepspeed: ds.json: bf16 is set by the job, not by the DeepSpeed file; "
        "fix: remove it and set dtype",
        "error: job.yaml:5: learner.deepspeed: ds.json: zero_optimization.stage contradicts learner.zero_stage; "
        "expected 3; got 2; fix: remove it, or set learner.zero_stage=2",
    ]


def test_values_of_a_mapping(complaints: Callable[..., list[str]]) -> None:
    assert complaints("ppo", JOB, "data.columns.prompt=3", "data.split=[a]") == [
        "error: override data.split=[a]: wrong type; expected text; got [a]; fix: the default is train",
        'error: override data.columns.prompt=3: wrong type; expected text; got 3; fix: write "3"',
    ]
    assert complaints("ppo", JOB, "data.columns=[a]") == [
        "error: override data.columns=[a]: wrong type; expected mapping; got [a]"
    ]


def test_batch_arithmetic_of_sft(complaints: Callable[..., list[str]]) -> None:
    """Row 40: the arithmetic and the nearest valid sizes."""
    text = (
        "output_dir: o\nmodel_name_or_path: base\ndata: {train: x}\ntrain_batch_size: 60\nlearner: {num_workers: 4}\n"
    )
    assert complaints("sft", text) == [
        "error: job.yaml:4: train_batch_size: 60 is not a multiple of per_device_train_batch_size 8 x 4 workers = 32; "
        "try 32 or 64"
    ]


def test_nearest_sizes_are_found_without_a_long_search(complaints: Callable[..., list[str]]) -> None:
    """A large prime-like batch must not make the error message search for minutes."""
    size = 2**61 - 1
    assert complaints("ppo", JOB, f"rollout_batch_size={size}", "num_mini_batches=1000") == [
        f"error: override num_mini_batches=1000: 1000 does not divide rollout_batch_size {size} (try 1 or {size})"
    ]


def test_required_fields_say_what_they_are(complaints: Callable[..., list[str]]) -> None:
    assert complaints("ppo", "data: {max_rows: 3}\n") == [
        "error: job.yaml:1: data.train: missing; expected text or list of texts "
        "(files (.json .jsonl .csv .parquet, each also .gz), here or on an object store (s3://bucket/rows.jsonl), or Hugging Face"
        " data set ids, or folders: all their files of data.split, or as a README.md of a Hub data set says, or what save_to_disk"
        " of datasets wrote)",
        "error: job.yaml: output_dir: missing; expected text (the run folder itself)",
        "error: job.yaml: model_name_or_path: missing; expected text "
        "(base model: folder or Hub id of a causal language model)",
        "error: job.yaml: rewards: missing; expected list of sections (what is maximised)",
    ]


def test_all_problems_at_once_in_the_order_of_the_file(complaints: Callable[..., list[str]]) -> None:
    text = JOB + "gamma: 2\nlora:\n  r: 0\n  rr: 1\nkl_penalty: kll\nsave_steps: [10, x]\nlam: 3\n"
    places = [line.split(": ")[1:3] for line in complaints("ppo", text, "seed=-1")]
    assert places == [
        ["job.yaml:5", "gamma"],
        ["job.yaml:7", "lora.r"],
        ["job.yaml:8", "lora.rr"],
        ["job.yaml:9", "kl_penalty"],
        ["job.yaml:10", "save_steps[1]"],
        ["job.yaml:11", "lam"],
        ["override seed=-1", "out of range; expected integer >= 0 and < 2^63; got -1; fix"],
    ]


def test_several_broken_rules_of_one_class_are_told_together(complaints: Callable[..., list[str]]) -> None:
    told = complaints("ppo", JOB + "num_mini_batches: 48\nnum_generations: 3\n")
    assert [line.split(": ")[1:3] for line in told] == [
        ["job.yaml:5", "num_mini_batches"],
        ["job.yaml:6", "num_generations"],
    ]


@pytest.mark.parametrize(
    ("command", "foreign"),
    [
        ("sft", "kl_coef, rewards"),
        ("reward", "kl_coef, rewards"),
        ("evaluate", "kl_coef"),
        ("pipeline", "data, kl_coef, rewards"),
    ],
)
def test_a_job_file_given_to_the_wrong_command(
    command: str, foreign: str, complaints: Callable[..., list[str]]
) -> None:
    assert complaints(command, JOB + "kl_coef: 0.1\n") == [
        f"error: job.yaml: is a job file of ppo, not of {command} (it has {foreign}); fix: run `rlhf-ray ppo` on it"
    ]


def test_defaults_run_and_ratios_of_ancestors_do_not_creep_in(loaded: Callable[..., object]) -> None:
    """F2: the bare defaults are a valid job (and a bad name of a penalty fails before loading: rows 38).

    F5: dropout 0 stays 0, even over a preset that has another value."""
    config = loaded("ppo", JOB + "lora: {preset: alpaca_farm_lora, lora_dropout: 0}\n")
    assert (config.kl_penalty, config.kl_coef) == ("kl", 0.05)  # type: ignore[attr-defined]
    lora = config.lora  # type: ignore[attr-defined]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (8, 64.0, 0.0)
    assert lora.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")


def test_a_regular_expression_cannot_hang_the_loader(complaints: Callable[..., list[str]]) -> None:
    start = time.perf_counter()
    complaints("ppo", JOB + f"lora: {{target_modules: ['(a+)+$', '{'a' * 5000}!']}}\n")
    assert time.perf_counter() - start < 2
