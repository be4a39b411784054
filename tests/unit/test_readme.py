"""README says only what is there: every field of the migration tables exists, every metric too, and every command."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from rlhf_ray.config import PipelineConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_ray.config.load import load_dict
from rlhf_ray.metrics import METRICS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
STAGES: dict[str, type[BaseModel]] = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}


def fields_of(cls: type[BaseModel], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, info in cls.model_fields.items():
        found.add(prefix + name)
        for kind in (info.annotation, *get_args(info.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= fields_of(kind, f"{prefix}{name}.")
    return found


def tables() -> list[tuple[str, type[BaseModel], list[list[str]]]]:
    found = []
    for heading, stage, body in re.findall(r"^### (.*?`rlhf-ray (\w+)`)\n(.*?)(?=^#|\Z)", README, re.M | re.S):
        rows = [[c.strip() for c in line.strip("|").split("|")] for line in body.splitlines() if line.startswith("|")]
        fields = [r for r in rows[2:] if len(r) == 3]
        found.append((heading, STAGES[stage], fields))
    return found


def test_there_are_five_migration_tables() -> None:
    assert [len(rows) > 10 for _, _, rows in tables()] == [True] * 5


@pytest.mark.parametrize(("heading", "cls", "rows"), tables(), ids=[t[0] for t in tables()])
def test_every_field_of_a_migration_table_exists(heading: str, cls: type[BaseModel], rows: list[Any]) -> None:
    known = fields_of(cls)
    for theirs, ours, parity in rows:
        assert theirs, heading
        if ours == "dropped":
            continue
        name = ours.strip("`")
        assert name in known, f"{heading}: {theirs} -> {name}"
        for other in re.findall(r"`(\w+): [^`]*`", parity):
            if not other.startswith(("name",)):
                assert other in known or any(k.endswith(f".{other}") for k in known), f"{heading}: {theirs}: {other}"


def test_every_metric_that_readme_names_exists() -> None:
    body = README.split("| our metric | TRL's name |")[1].split("\n\n")[0]
    names = re.findall(r"^\| `([^`]+)` \| (\S+) \|", body, re.M)
    assert len(names) > 8
    for ours, trl in names:
        assert METRICS[ours].trl == trl


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", README, re.S))
def test_every_job_in_readme_is_a_job(block: str) -> None:
    values = yaml.safe_load(block)
    is_pipeline = "ppo" in values
    config: Any = load_dict(PipelineConfig if is_pipeline else PPOConfig, values, "README.md")
    if is_pipeline:
        assert [config.stage_config(stage).output_dir for stage in config.stages][-1].endswith("/evaluate")


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda p: p.stem)
def test_every_benchmark_result_is_told(path: Path) -> None:
    """README quotes each committed result, and the figures it quotes are those of the file."""
    (line,) = [line for line in README.splitlines() if f"results/{path.name}" in line]
    told = {float(x) for x in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.])", line)}
    known = set(_numbers(json.loads(path.read_text())["measured"]))
    assert len({x for x in told for k in known if abs(x - k) <= 0.006 * max(abs(k), 1.0)}) >= 2, (told, known)


def _numbers(value: Any) -> Iterator[float]:
    """Every number in a report, however deep."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)
