"""What the header of a run says of its job."""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.config import SFTConfig
from rlhf_ray.config.load import dump_yaml, load
from rlhf_ray.training.header import config_line


def test_a_resumed_job_says_what_it_says_when_it_begins(tmp_path: Path) -> None:
    """Its config.yaml has every field; the line listed them all."""
    config = SFTConfig(
        output_dir="runs/a",
        model_name_or_path="m",
        data={"train": "rows.jsonl"},  # type: ignore[arg-type]
        max_steps=7,
        lora={"r": 4},  # type: ignore[arg-type]
    )
    (tmp_path / "config.yaml").write_text(dump_yaml(config.model_dump(mode="json")))
    again = load(SFTConfig, tmp_path / "config.yaml", check_files=False)
    said = config_line(config)
    for field in ("output_dir=runs/a", "model_name_or_path=m", "data.train=rows.jsonl", "max_steps=7", "lora.r=4"):
        assert field in said
    assert sorted(config_line(again).removeprefix("config     ").split(", ")) == sorted(
        said.removeprefix("config     ").split(", ")
    )
