"""What looks wrong with a job before it starts."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_ray.config import SFTConfig
from rlhf_ray.supervised.header import peak_rate, warnings_about
from rlhf_ray.training.header import changed_fields


def config_of(**values: Any) -> SFTConfig:
    return SFTConfig(output_dir="run", model_name_or_path="base", data={"train": "rows.jsonl"}, **values)  # type: ignore[arg-type]


def test_a_usual_job_raises_no_warning() -> None:
    assert warnings_about(config_of(), 100) == []


@pytest.mark.parametrize(
    ("values", "steps", "words"),
    [
        ({}, 3, "only 3 optimizer steps"),
        ({}, 1, "only 1 optimizer step:"),
        ({"warmup_steps": 100, "learning_rate": 3e-4}, 7, "peaks at 2.08e-05, not at 0.0003"),
        ({"learning_rate": 1e-5}, 100, "usual for full fine-tuning"),
    ],
)
def test_each_warning(values: dict[str, Any], steps: int, words: str) -> None:
    assert any(words in line for line in warnings_about(config_of(**values), steps))


def test_the_peak_is_the_largest_rate_of_any_step() -> None:
    assert peak_rate(config_of(learning_rate=1.0, warmup_steps=2), 6) == 1.0
    assert peak_rate(config_of(learning_rate=1.0, warmup_steps=9), 5) == pytest.approx(0.5)


def test_fields_that_the_job_sets_are_told_by_dotted_name() -> None:
    values = config_of(lora={"r": 4}).model_dump(exclude_unset=True)
    assert dict(changed_fields(values))["lora.r"] == 4
    assert dict(changed_fields(values))["data.train"] == "rows.jsonl"
