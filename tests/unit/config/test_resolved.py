"""config.yaml: what is written loads back equal, in any reader of YAML, and differences are named by field."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_ray.config import EvaluateConfig, LoraConfig, PipelineConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_ray.config.load import FieldChange, diff, dump_yaml, load_dict, to_dict, to_yaml
from rlhf_ray.config.sections import Section
from rlhf_ray.config.yaml_reader import parse

BASE: dict[str, Any] = {"output_dir": "o", "model_name_or_path": "m", "data": {"train": ["x.jsonl"]}}
REWARDS = [{"run": "r"}, {"name": "len", "function": "f.py:score", "weight": -0.5}]

EXAMPLES: list[Section] = [
    load_dict(SFTConfig, {**BASE, "trainer": {"neftune_noise_alpha": 5, "lr_scheduler_kwargs": {"a": [1, None, "no"]}}}),
    load_dict(RewardConfig, {**BASE, "sft": "s"}),
    load_dict(RewardConfig, {**BASE, "sft": "s", "init_from": "base"}),
    load_dict(RewardConfig, {**BASE, "sft": "s", "init_from": "base", "lora": {"r": 4}}),
    load_dict(PPOConfig, {**BASE, "rewards": REWARDS}),
    load_dict(PPOConfig, {**BASE, "rewards": REWARDS, "sft": "s", "save_steps": [20, 40, 80], "value": {"lora": {"r": 2}}}),
    load_dict(PPOConfig, {**BASE, "rewards": REWARDS, "lora": {"preset": "alpaca_lora_rlhf", "r": 4}}),
    load_dict(EvaluateConfig, {**BASE, "policies": [{"name": "b", "policy": "base"}], "sampling": {"do_sample": False}}),
    load_dict(PipelineConfig, {"output_dir": "o", "model_name_or_path": "m", "stages": ["sft"], "sft": {"data": {"train": "x"}}}),
]  # fmt: skip
NAMES = [f"{i}-{type(c).__name__}" for i, c in enumerate(EXAMPLES)]


def reload(config: Section) -> Section:
    return load_dict(type(config), parse(to_yaml(config), "config.yaml").values)


@pytest.mark.parametrize("config", EXAMPLES, ids=NAMES)
def test_every_stage_loads_back_equal(config: Section) -> None:
    again = reload(config)
    assert again == config
    assert to_yaml(again) == to_yaml(config)


@pytest.mark.parametrize("config", EXAMPLES, ids=NAMES)
def test_plain_dumps_and_pickles_load_back_equal_too(config: Section) -> None:
    """Stages store `model_dump`, Ray sends pickles: both must keep the job, also beside an SFT adapter, where lora is not ours."""
    assert type(config)(**json.loads(json.dumps(config.model_dump(mode="json")))) == config
    again = pickle.loads(pickle.dumps(config))  # noqa: S301 (our own bytes)
    assert again == config and again.model_fields_set == config.model_fields_set


@pytest.mark.parametrize("config", EXAMPLES, ids=NAMES)
def test_every_field_is_written_in_the_order_of_the_class(config: Section) -> None:
    fields = list(type(config).model_fields)
    written = list(to_dict(config))
    assert [f for f in fields if f in written] == written
    copies_sft = getattr(config, "sft", None) == "s" and getattr(config, "init_from", "sft") == "sft"
    assert set(fields) - set(written) == ({"lora"} if copies_sft else set())


TRAPS = [
    "no",
    "on",
    "1e-4",
    "1e5",
    ".5",
    "0o17",
    "010",
    "null",
    "~",
    "true",
    "1:30",
    "2024-01-01",
    "=",
    "<<",
    "#",
    "'",
    '"',
    "!tag",
    "*a",
    "&a",
    "%",
    "@",
    "`",
    ".",
    "1_000",
    "0x",
    "0b1",
    "\ufeff",
] + ["- a", "a: b", " x ", "a\nb", "a\rb", "\ttab", "\x85", "\u2028", "\x00"]
text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20) | st.sampled_from(TRAPS)
number = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)

jobs = st.fixed_dictionaries(
    {
        "output_dir": text,
        "model_name_or_path": text,
        "data": st.fixed_dictionaries(
            {"train": text | st.lists(text, min_size=1, max_size=3)},
            optional={"columns": st.dictionaries(text, text, max_size=3), "max_rows": st.integers(1, 10**9)},
        ),
        "rewards": st.just(REWARDS),
    },
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "revision": text | st.none(),
        "kl_coef": number | st.integers(0, 2**70),
        "learning_rate": positive,
        "gamma": st.floats(0, 1),
        "whiten_rewards": st.booleans(),
        "save_steps": st.none() | st.integers(1, 100) | st.lists(st.integers(1, 100), max_size=4),
        "stop_token_ids": st.none() | st.integers() | st.lists(st.integers(), max_size=3),
        "cliprange_value": st.none() | positive,
        "report_to": st.sampled_from([[], "wandb", ["tensorboard", "wandb"]]),
        "lora": st.fixed_dictionaries({}, optional={"r": st.integers(1, 64), "lora_alpha": positive}),
    },
)


@given(jobs)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_job_loads_back_equal(values: dict[str, Any]) -> None:
    config = load_dict(PPOConfig, values)
    assert reload(config) == config


values = st.recursive(
    text | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)


@given(values)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_written_means_the_same_to_us_and_to_yaml_1_1(value: Any) -> None:
    written = dump_yaml({"a": value})
    for read in (parse(written, "x").values, yaml.safe_load(written)):
        assert read == {"a": value}
        assert repr(read["a"]) == repr(value)  # 1 is not 1.0, nor True


def test_diff_names_fields() -> None:
    old = load_dict(PPOConfig, {**BASE, "rewards": REWARDS})
    new = load_dict(PPOConfig, {**BASE, "rewards": REWARDS[:1], "kl_coef": 0.1, "lora": {"r": 4}, "max_steps": 10})
    assert diff(old, old) == []
    assert diff(old, new) == [
        FieldChange("max_steps", -1, 10),
        FieldChange("lora.r", 16, 4),
        FieldChange("rewards", to_dict(old)["rewards"], to_dict(new)["rewards"]),
        FieldChange("kl_coef", 0.05, 0.1),
    ]


def test_diff_takes_what_a_run_folder_stores() -> None:
    old = load_dict(PPOConfig, {**BASE, "rewards": REWARDS})
    assert diff(parse(to_yaml(old), "config.yaml").values, old) == []
    assert diff({"a": 1, "s": {"x": 1}}, {"b": 2, "s": None}) == [
        FieldChange("a", 1, None),
        FieldChange("s", {"x": 1}, None),
        FieldChange("b", None, 2),
    ]


def test_presets_are_resolved_and_stay() -> None:
    config = load_dict(LoraConfig, {"preset": "alpaca_farm_lora"})
    assert to_dict(config) == {
        "preset": "alpaca_farm_lora",
        "r": 8,
        "lora_alpha": 64.0,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "target_parameters": [],
        "use_rslora": False,
    }
