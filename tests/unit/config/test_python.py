"""Jobs that are written in Python: the same errors as from a file, and reward functions given as such."""

from __future__ import annotations

import os.path
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlhf_ray.config import PipelineConfig, PPOConfig, SFTConfig, SweepConfig
from rlhf_ray.config.functions import _acts_when_imported
from rlhf_ray.config.resolved import to_yaml
from rlhf_ray.config.sections import LoraConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.sources import load_function
from rlhf_ray.stages.start import ppo

HERE = Path(__file__)
JOB: dict[str, Any] = {"output_dir": "runs/x", "model_name_or_path": "m", "data": {"train": "p.jsonl"}}


def brevity(prompts: list[str], completions: list[str]) -> list[float]:
    return [-float(len(text)) for text in completions]


async def score(prompts: list[str], completions: list[str]) -> list[float]:
    return [0.0 for _ in completions]


class Judge:
    def asked(self, prompts: list[str], completions: list[str]) -> list[float]:
        return [0.0]

    def __call__(self) -> list[float]:
        return [0.0]


def test_all_problems_in_the_words_of_a_job_file() -> None:
    with pytest.raises(ConfigError) as error:
        PPOConfig(**JOB, rewards=[{"run": "r"}], learning_rat=1e-4, kl_penalty="k4", lora={"r": 0})
    assert error.value.lines() == [
        "error: PPOConfig: lora.r: out of range; expected integer from 1 to 1024; got 0; fix: the default is 16",
        "error: PPOConfig: kl_penalty: not a choice; expected one of kl, clamped_kl, bregman, jensen_shannon, squared_error, none,"
        " k1, k2, k3; got 'k4'",
        "error: PPOConfig: learning_rat: unknown key; fix: did you mean learning_rate?",
    ]
    assert error.value.exit_code == 2


def test_a_section_alone_and_a_rule_across_fields() -> None:
    with pytest.raises(ConfigError, match=r"^LoraConfig: r: out of range"):
        LoraConfig(r=0)
    with pytest.raises(ConfigError, match=r"^SFTConfig: lora.target_modules: target_modules is empty"):
        SFTConfig(**JOB, lora={"target_modules": []})
    with pytest.raises(ValidationError):  # what job files are read with
        LoraConfig.model_validate({"r": 0})


def test_a_function_is_named_as_a_job_file_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE.parent)
    monkeypatch.setitem(sys.modules, "test_python", sys.modules[__name__])
    for function in (brevity, score):
        monkeypatch.setattr(function, "__module__", "test_python")
    first, second = PPOConfig(**JOB, rewards=[brevity, {"function": score, "weight": 2.0}]).rewards
    assert (first.name, first.function) == ("brevity", "test_python.py:brevity")
    assert (second.name, second.function, second.weight) == ("reward", "test_python.py:score", 2.0)
    assert load_function(first.function)[0](["p"], ["four"]) == [-4.0]
    (named,) = PPOConfig(**JOB, rewards=[score]).rewards
    assert named.name == "reward"  # reward/score is a metric of every step


def test_a_function_of_an_installed_module_or_a_package() -> None:
    (found,) = PPOConfig(**JOB, rewards=[os.path.join]).rewards
    assert found.function == "posixpath:join"
    (found,) = PPOConfig(**JOB, rewards=[load_function]).rewards
    assert found.function == "rlhf_ray.rewards.sources:load_function"


def test_sections_of_a_pipeline_and_of_a_sweep_are_kept_as_text() -> None:
    chain = PipelineConfig(output_dir="runs/x", model_name_or_path="m", ppo={"rewards": [load_function]})
    swept = SweepConfig(
        output_dir="runs/x", model_name_or_path="m", space={"kl_coef": [0.1]}, ppo={"rewards": [load_function]}
    )
    for config in (chain, swept):
        assert "function: rlhf_ray.rewards.sources:load_function" in to_yaml(config)


@pytest.mark.parametrize(
    "function, shown",
    [
        (lambda prompts, completions: [0.0], "<lambda>"),
        (Judge().asked, "Judge.asked"),
        (Judge(), "a Judge"),
        (len, "len"),
    ],
)
@pytest.mark.parametrize("as_field", [True, False])
def test_what_no_other_process_can_import(function: Any, shown: str, as_field: bool) -> None:
    with pytest.raises(ConfigError) as error:
        PPOConfig(**JOB, rewards=[{"function": function} if as_field else function])
    assert error.value.lines() == [
        f"error: PPOConfig: rewards[0].function: other processes cannot import {shown}; expected a"
        " function defined with `def` at the top of a file"
    ]


SCRIPT = """
from rlhf_ray import PPOConfig

def own(prompts, completions):
    return [0.0]

{work}
"""
WORK = (
    'print(PPOConfig(output_dir="x", model_name_or_path="m", data={"train": "p"}, rewards=[own]).rewards[0].function)'
)


def _run(folder: Path, *command: str, script: str) -> str:
    (folder / "job.py").write_text(script)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[3])},
        input=script,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return (done.stdout + done.stderr).strip().splitlines()[-1]


def test_functions_of_the_script_that_runs(tmp_path: Path) -> None:
    guarded = SCRIPT.format(work=f'if __name__ == "__main__":\n    {WORK}')
    assert _run(tmp_path, "job.py", script=guarded) == "job.py:own"
    harmless = SCRIPT.format(
        work=f'import os\nos.environ.setdefault("A", "b")\ndef main():\n    {WORK}\nif __name__ == "__main__": main()'
    )
    assert _run(tmp_path, "job.py", script=harmless) == "job.py:own"
    said = _run(tmp_path, "job.py", script=SCRIPT.format(work=f"def main():\n    {WORK}\nmain()"))
    assert "own is in the script that runs, and workers that import it" in said and "would run line 9 again" in said
    said = _run(tmp_path, "-", script=SCRIPT.format(work=WORK))
    assert "own is in no file (an interactive session); write it to one" in said


@pytest.mark.parametrize(
    "work",
    [
        'x = rlhf_ray.ppo(c).metrics["eval/reward"]',
        "runs = [ppo(c) for c in cs]",
        "a, b = ppo(c), sft(c)",
        "best = max(ppo(c) for c in cs)",
        "try:\n    ppo(c)\nfinally:\n    pass",
        "for c in cs:\n    sweep(c)",
        "assert pipeline(c)",
        "asyncio.run(work())",
    ],
)
def test_work_that_importing_a_script_would_start_again(work: str, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(f"import rlhf_ray\n\n{work}\n")
    assert _acts_when_imported(tmp_path / "job.py") == 3


def test_a_file_that_is_imported_for_its_function_starts_no_job(tmp_path: Path) -> None:
    """Whatever the check of the script could not see: it ends there, and not in a job within a job within a job."""
    job = f"PPOConfig(**{JOB!r}, rewards=[own])"
    (tmp_path / "mine.py").write_text(SCRIPT.format(work=f"def work():\n    return {job}\nwork()"))
    with pytest.raises(ConfigError, match=r"own is of a file that is being imported for its reward function"):
        load_function(f"{tmp_path / 'mine.py'}:own")


def test_functions_that_vary_in_a_sweep() -> None:
    shared: dict[str, Any] = {"output_dir": "runs/x", "model_name_or_path": "m"}
    swept = SweepConfig(
        **shared, ppo={}, space={"rewards": [[load_function], [{"function": load_function, "weight": 2.0}]]}
    )
    first, second = swept.space["rewards"]
    assert first[0]["function"] == second[0]["function"] == "rlhf_ray.rewards.sources:load_function"
    assert "function: rlhf_ray.rewards.sources:load_function" in to_yaml(swept)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"rewards": "runs/rm"}, "rewards: wrong type; .*; fix: write \\[{run: runs/rm}\\]"),
        ({"rewards": ["runs/rm"]}, r"rewards\[0\]: wrong type; .*; fix: write {run: runs/rm}"),
        ({"rewards": brevity}, "rewards: wrong type; .*; fix: make it a list: \\[...\\]"),
        ({"data": "prompts.jsonl"}, "data: wrong type; .*; fix: write {train: prompts.jsonl}"),
        ({"kl_penalty": "jenson"}, "kl_penalty: not a choice; .*; fix: did you mean jensen_shannon"),
    ],
)
def test_what_a_text_in_a_sections_place_was_meant_to_be(values: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=f"^PPOConfig: {line}"):
        PPOConfig(**{**JOB, "rewards": [{"run": "r"}], **values})


@pytest.mark.parametrize("given", ["ppo.yaml", {"output_dir": "x"}, SFTConfig(**JOB)])
def test_a_stage_takes_its_own_configuration(given: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"^ppo: wrong type; expected a PPOConfig; got \w+; fix: ppo\(PPOConfig\(\.\.\.\)\)"
    ):
        ppo(given)
