"""`a.b=c` on the command line: read by the rules of job files, laid over the file, blamed by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rlhf_ray.config import PPOConfig, SamplingConfig
from rlhf_ray.config.load import load_dict
from rlhf_ray.config.yaml_reader import apply_overrides, parse_override
from rlhf_ray.errors import ConfigError

JOB = "output_dir: runs/ppo\nmodel_name_or_path: base\ndata: {train: prompts.jsonl}\nrewards: [{run: runs/reward}]\n"


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("kl_coef=1e-4", ("kl_coef",), 1e-4),
        ("whiten_rewards=true", ("whiten_rewards",), True),
        ("run_name=no", ("run_name",), "no"),
        ("run_name='1'", ("run_name",), "1"),
        ("lora.r=8", ("lora", "r"), 8),
        ("lora.target_modules=[q_proj, v_proj]", ("lora", "target_modules"), ["q_proj", "v_proj"]),
        ("rewards=[{run: a, weight: 2}]", ("rewards",), [{"run": "a", "weight": 2}]),
        ("sft=", ("sft",), None),
        ("sft=null", ("sft",), None),
        ("model_name_or_path=a=b", ("model_name_or_path",), "a=b"),
        ("ppo.data.train=x.jsonl", ("ppo", "data", "train"), "x.jsonl"),
    ],
)
def test_values(text: str, path: tuple[str, ...], value: object) -> None:
    parsed = parse_override(text)
    assert (parsed.path, parsed.value) == (path, value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("kl_coef", "error: override kl_coef: no value; expected field=value, e.g. kl_coef=0.1"),
        ("=3", "error: override =3: not a field name before the =; expected field=value or section.field=value"),
        (
            "lora..r=3",
            "error: override lora..r=3: not a field name before the =; expected field=value or section.field=value",
        ),
        (
            "--kl_coef=3",
            "error: override --kl_coef=3: not a field name before the =; expected field=value or section.field=value",
        ),
        ("rewards=[{run: a}", "error: override rewards=[{run: a}: not valid YAML: "),
        (
            "a=!!python/name:os.system",
            "error: override a=!!python/name:os.system: the tag !!python/name:os.system is not allowed",
        ),
    ],
)
def test_refused(text: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_override(text)
    assert caught.value.lines()[0].startswith(line)


def test_they_beat_the_file_and_the_last_one_wins(loaded: Callable[..., Any]) -> None:
    config = loaded(
        "ppo", JOB + "lam: 0.9\nlora: {r: 8, lora_alpha: 8}\n", "lam=0.8", "lora.r=4", "lam=0.7", "data.max_rows=5"
    )
    assert (config.lam, config.lora.r, config.lora.lora_alpha) == (0.7, 4, 8.0)
    assert (config.data.train, config.data.max_rows) == (("prompts.jsonl",), 5)


def test_the_values_they_are_laid_over_do_not_change() -> None:
    values = {"lora": {"r": 8}, "seed": 1}
    result = apply_overrides(
        values, [parse_override("lora.r=4"), parse_override("seed=2"), parse_override("value.adapter=shared")]
    )
    assert result == {"lora": {"r": 4}, "seed": 2, "value": {"adapter": "shared"}}
    assert values == {"lora": {"r": 8}, "seed": 1}


def test_paths_into_lists_and_single_values(complaints: Callable[..., list[str]]) -> None:
    for place in ("rewards.0.run", "rewards[0].run", "rewards.0"):
        assert complaints("ppo", JOB, f"{place}=1", "rewards.run=x", "lam.x=1")[0] == (
            f"error: override {place}=1: not a field name before the =; expected field=value or section.field=value;"
            " fix: override the list whole: rewards=..."
        )
    assert complaints("ppo", JOB + "lam: 0.9\n", "rewards.run=x", "lam.x=1") == [
        "error: override rewards.run=x: rewards is a list; fix: override it whole: rewards=...",
        "error: override lam.x=1: lam is a single value; fix: override it whole: lam=...",
    ]


def test_all_broken_overrides_are_told_together(complaints: Callable[..., list[str]]) -> None:
    assert len(complaints("ppo", JOB, "a", "b", "=c")) == 3


def test_a_fault_inside_an_override_names_the_field(complaints: Callable[..., list[str]]) -> None:
    assert complaints("ppo", JOB, "lora={r: 0, rr: 3}") == [
        "error: override lora={r: 0, rr: 3}: lora.r: out of range; expected integer from 1 to 1024; got 0; "
        "fix: the default is 16",
        "error: override lora={r: 0, rr: 3}: lora.rr: unknown key; fix: did you mean r?",
    ]


def test_a_fault_of_the_file_in_a_section_that_an_override_touches_is_the_file_s(
    complaints: Callable[..., list[str]],
) -> None:
    assert complaints("ppo", JOB + "lora:\n  r: 0\n", "lora.lora_alpha=4")[0].startswith("error: job.yaml:6: lora.r: ")


def test_load_dict_names_its_origin() -> None:
    assert load_dict(SamplingConfig, {"top_p": 1}).top_p == 1.0
    with pytest.raises(ConfigError) as caught:
        load_dict(SamplingConfig, {"top_p": 5}, "generate", ["top_k=-1", "temprature=2"])
    assert caught.value.lines() == [
        "error: generate: top_p: out of range; expected number > 0 and <= 1; got 5; fix: the default is 1",
        "error: override top_k=-1: out of range; expected integer >= 0; got -1; fix: the default is 0",
        "error: override temprature=2: unknown key; fix: did you mean temperature?",
    ]
    with pytest.raises(ConfigError, match="output_dir: missing"):
        load_dict(PPOConfig, {})
