"""What the classes say about themselves: every field has a meaning and a reader, and hints name fields that exist."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_ray.config import STAGES, PipelineConfig
from rlhf_ray.config import pipeline as pipeline_module
from rlhf_ray.config import sections as sections_module
from rlhf_ray.config import stages as stages_module
from rlhf_ray.config.hints import RENAMED, dotted_fields, unknown_key
from rlhf_ray.config.load import describe
from rlhf_ray.config.sections import LoraConfig, Section

PACKAGE = Path(__file__).parents[3] / "rlhf_ray"
JOBS: dict[str, type[Section]] = {**STAGES, "pipeline": PipelineConfig}
CLASSES = sorted(
    {
        value
        for module in (sections_module, stages_module, pipeline_module)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Section)
    },
    key=lambda cls: cls.__name__,
)


def test_the_classes_are_found() -> None:
    assert {"PPOConfig", "SFTConfig", "DataConfig", "LoraConfig", "RewardSource"} <= {c.__name__ for c in CLASSES}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_every_field_has_a_meaning(cls: type[Section]) -> None:
    assert [name for name, info in cls.model_fields.items() if len((info.description or "").split()) < 1] == []


@pytest.mark.parametrize("stage", JOBS)
def test_describe_lists_every_field_once(stage: str) -> None:
    rows = {row.name: row for row in describe(JOBS[stage])}
    assert len(rows) == len(describe(JOBS[stage]))
    opened_elsewhere = {name for name in dotted_fields(JOBS[stage]) if name.startswith("value.lora.")}
    assert set(rows) == set(dotted_fields(JOBS[stage])) - opened_elsewhere
    assert all(row.type and row.default and row.meaning for row in rows.values())
    assert not any("value" in row.type for row in rows.values()), "a type without words"


def test_required_fields_come_first_and_defaults_read_like_yaml() -> None:
    rows = {row.name: row for row in describe(JOBS["ppo"])}
    top = [row for name, row in rows.items() if "." not in name]
    assert [r.name for r in top if r.default == "required"] == ["output_dir", "model_name_or_path", "data", "rewards"]
    assert top[:4] == [r for r in top if r.default == "required"]
    assert (rows["learning_rate"].default, rows["learning_rate"].type) == ("2e-5", "number > 0")
    assert (rows["sft"].default, rows["sft"].type) == ("null", "text or null")
    assert rows["report_to"].default == "[tensorboard]"
    assert rows["eval_on_start"].default == "true"
    assert rows["kl_penalty"].type.startswith("one of kl, clamped_kl, bregman")
    assert rows["lora.r"].type == "integer from 1 to 1024"
    assert rows["data.train"].type == "text or list of texts"
    assert rows["rewards[].weight"].default == "1"


# ---------------------------------------------------------------- hints


def test_renamed_fields_exist_and_the_old_names_do_not() -> None:
    known = {name for cls in JOBS.values() for name in dotted_fields(cls)}
    last = {name.rsplit(".", 1)[-1] for name in known}
    for old, new in RENAMED.items():
        assert set(new) <= known, old
        assert old not in last or old in ("model", "batch_size", "loss_type"), old  # fields of another stage


@pytest.mark.parametrize(
    ("stage", "key", "hint"),
    [
        ("ppo", "kl_term_variant", "write kl_penalty"),  # AlpacaFarm-LoRA
        ("ppo", "batch_size", "write rollout_batch_size"),
        ("sft", "batch_size", "write train_batch_size"),
        ("sft", "cutoff_len", "write max_length"),  # Alpaca-LoRA
        ("sft", "lora_r", "write lora.r"),
        ("reward", "eval_subset", "write data.eval_max_rows"),
        ("sft", "kl_coef", "it is a field of ppo jobs; remove it"),
        ("pipeline", "kl_coef", "it is a field of ppo: put it under ppo"),
        ("ppo", "r", "write lora.r: it does not belong to the top"),
        ("ppo", "xyzzy", "remove it; `rlhf-ray ppo --help` lists the fields"),
    ],
)
def test_hints(stage: str, key: str, hint: str) -> None:
    assert unknown_key(JOBS[stage], JOBS[stage], "", key) == hint


def test_a_top_level_field_in_a_section() -> None:
    assert unknown_key(JOBS["ppo"], LoraConfig, "lora", "kl_coef") == "write kl_coef: it does not belong to lora"


# ---------------------------------------------------------------- F32: every field has a reader

NOT_READ = {
    "gradient_accumulation_steps": "setting it is an error: the sizes of batches decide",
    "preset": "LoraConfig turns it into the four fields it stands for",
    "ppo": "PipelineConfig.stage_config reads the stages by name",
    "dpo": "as ppo",
    "reward": "as ppo",
    "evaluate": "as ppo",
}


def reads(source: str) -> Iterator[str]:
    """Names read as attributes: `config.train`, not the method of `model.train()`, not an assignment."""
    tree = ast.parse(source)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in called:
            yield node.attr


def test_what_counts_as_reading() -> None:
    assert list(reads("x = config.data.train")) == ["train", "data"]
    assert list(reads("model.train()")) == []
    assert list(reads("self.seed = 3")) == []


def test_every_field_has_a_reader() -> None:
    """F32: a field that nothing reads is a promise that nothing keeps."""
    files = [p for p in PACKAGE.rglob("*.py") if "config" not in p.relative_to(PACKAGE).parts]
    assert len(files) > 20
    read = {name for path in files for name in reads(path.read_text(encoding="utf-8"))}
    fields = {f"{cls.__name__}.{name}": name for cls in CLASSES for name in cls.model_fields}
    unread = sorted(where for where, name in fields.items() if name not in read and name not in NOT_READ)
    assert unread == []
    assert {n for n in NOT_READ if n not in fields.values()} == set(), "exceptions for fields that are gone"
