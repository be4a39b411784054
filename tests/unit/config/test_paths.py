"""Row 47: what a job names must exist before anything is loaded, and the line says what was meant."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import PPOConfig
from rlhf_ray.config.load import check_paths, load
from rlhf_ray.errors import ConfigError

JOB = "output_dir: runs/ppo\nmodel_name_or_path: base\ndata: {train: prompts.jsonl}\nrewards: [{run: runs/reward}]\n"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model_name_or_path=./basis",
            "no such folder; expected a folder or a Hub id; got ./basis; fix: did you mean base?",
        ),
        ("model_name_or_path=/no/such/model", "no such folder; expected a folder or a Hub id; got /no/such/model"),
        (
            "model_name_or_path=runs/stf",
            "no such folder; expected a folder or a Hub id; got runs/stf; fix: did you mean runs/sft?",
        ),
        ("model_name_or_path=a/b/c", "no such folder; expected a folder or a Hub id; got a/b/c"),
        (
            "model_name_or_path=~/model",
            "no such folder; expected a folder or a Hub id; got ~/model; fix: write the path without ~",
        ),
        ("model_name_or_path=job.yaml", "is a file; expected a folder or a Hub id; got job.yaml"),
        ("sft=runs/stf", "no such folder; expected a folder; got runs/stf; fix: did you mean runs/sft?"),
        ("sft=nowhere", "no such folder; expected a folder; got nowhere"),
        ("template=my.json", "no such file; got my.json"),
        ("learner.deepspeed=ds.json", "no such file; got ds.json"),
    ],
)
def test_missing_paths(override: str, message: str, complaints: Callable[..., list[str]]) -> None:
    name, _, value = override.partition("=")
    assert complaints("ppo", JOB, override) == [f"error: override {override}: {message}"]
    if name in ("sft", "template"):
        assert complaints("ppo", JOB + f"{name}: {value}\n") == [f"error: job.yaml:5: {name}: {message}"]


NAMES = {"long": "x" * 5000, "deep": "x/" * 3000, "nul": "a\0b", "line": "con\ntrol", "dots": "." * 300}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names_that_no_file_can_have(name: str, complaints: Callable[..., list[str]]) -> None:
    for override in ("sft={}", "rewards=[{{run: {}}}]", "learner.deepspeed={}"):
        (line,) = complaints("ppo", JOB, override.format(json.dumps(name)))
        assert "no such f" in line and "\n" not in line
    with pytest.raises(ConfigError):
        load(PPOConfig, name)


def test_what_can_be_a_hub_id_is_left_to_the_hub(loaded: Callable[..., Any]) -> None:
    for name in ("gpt2", "meta-llama/Llama-3.1-8B", "org/some_model.v2"):
        assert loaded("ppo", JOB, f"model_name_or_path={name}").model_name_or_path == name


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_a_hub_id_must_be_in_the_cache(
    variable: str, workdir: Path, monkeypatch: pytest.MonkeyPatch, complaints: Callable[..., list[str]]
) -> None:
    monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(workdir / "hub"))
    assert complaints("ppo", JOB, "model_name_or_path=org/model") == [
        f"error: override model_name_or_path=org/model: not found locally, and {variable} is set (offline mode); "
        f"expected a folder or a Hub id; got org/model; fix: give a folder, or unset {variable}"
    ]
    (workdir / "hub/models--org--model").mkdir(parents=True)
    assert load(PPOConfig, "job.yaml", ["model_name_or_path=org/model"]).model_name_or_path == "org/model"
    monkeypatch.setenv(variable, "0")
    assert load(PPOConfig, "job.yaml", ["model_name_or_path=org/other"])


def test_reward_functions(complaints: Callable[..., list[str]], loaded: Callable[..., Any], workdir: Path) -> None:
    Path("my_reward.py").write_text(
        "import os\nfrom math import sqrt as root\n"
        "open('ran', 'w')\n"
        "def score(prompts, completions, **columns):\n    inner = 1\n    return [0.0]\n"
        "best = score\n"
    )
    Path("broken.py").write_text("def score(:\n")
    Path("mypkg").mkdir()

    def told(function: str) -> str:
        (line,) = complaints("ppo", JOB, f"rewards=[{{function: '{function}'}}]")
        return line.split("rewards[0].function: ")[1]

    assert told("my_rewards.py:score") == "no such file; got my_rewards.py; fix: did you mean my_reward.py?"
    assert told("my_reward.py:scor") == "my_reward.py has no function scor; fix: did you mean score?"
    assert told("my_reward.py:inner") == "my_reward.py has no function inner"
    assert told("broken.py:score").startswith("broken.py is not valid Python: invalid syntax")
    assert told("no_such_pkg.mod:score").startswith("no such module; expected file.py:function or module:function")
    assert told("..x:score").startswith("no such module")
    for good in ("my_reward.py:score", "my_reward.py:best", "my_reward.py:root", "mypkg.mod:score", "json.decoder:x"):
        assert loaded("ppo", JOB, f"rewards=[{{function: '{good}'}}]").rewards[0].function == good
    assert not os.path.exists("ran"), "the file was run"


def test_runs_at_a_step_and_policies(complaints: Callable[..., list[str]], loaded: Callable[..., Any]) -> None:
    job = JOB.splitlines(keepends=True)[:3]
    text = (
        "".join(job)
        + "policies: [{name: a, policy: runs/sft@40}, {name: b, policy: base}, {name: c, policy: runs/nope@3}]\n"
    )
    assert complaints("evaluate", text) == [
        "error: job.yaml:4: policies[2].policy: no such folder; expected a folder or a Hub id; got runs/nope"
    ]
    assert loaded("evaluate", text, "policies=[{name: a, policy: runs/sft@40}]")


def test_all_missing_paths_are_told_at_once_and_fast(complaints: Callable[..., list[str]]) -> None:
    start = time.perf_counter()
    told = complaints(
        "ppo",
        JOB,
        "model_name_or_path=./x",
        "sft=./y",
        "rewards=[{run: ./z}, {name: m, model: ./m}, {name: f, function: f.py:f}]",
        "template=t.json",
    )
    assert len(told) == 6
    assert time.perf_counter() - start < 2


def test_data_files_are_not_asked_for_here(loaded: Callable[..., Any]) -> None:
    """A missing data file is exit 4, told by the reader of data."""
    assert loaded("ppo", JOB.replace("prompts.jsonl", "no/such/file.jsonl"))


def test_check_files_can_be_left_out(workdir: Path) -> None:
    Path("job.yaml").write_text(JOB.replace("base", "./nowhere"))
    config = load(PPOConfig, "job.yaml", check_files=False)
    assert [str(p) for p in check_paths(config)] == [
        "model_name_or_path: no such folder; expected a folder or a Hub id; got ./nowhere"
    ]
