"""Job files in a folder of their own, and what the loader says of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_ray.config import STAGES, PipelineConfig
from rlhf_ray.config.load import load
from rlhf_ray.config.sections import Section
from rlhf_ray.errors import ConfigError

CLASSES: dict[str, type[Section]] = {**STAGES, "pipeline": PipelineConfig}

MINIMAL = {
    "sft": "output_dir: runs/sft\nmodel_name_or_path: base\ndata: {train: rows.jsonl}\n",
    "reward": "output_dir: runs/reward\nmodel_name_or_path: base\ndata: {train: pairs.jsonl}\n",
    "ppo": "output_dir: runs/ppo\nmodel_name_or_path: base\ndata: {train: prompts.jsonl}\nrewards: [{run: runs/reward}]\n",
    "evaluate": "output_dir: runs/evaluate\nmodel_name_or_path: base\ndata: {train: prompts.jsonl}\n"
    "policies: [{name: base, policy: base}]\n",
    "pipeline": "output_dir: runs/all\nmodel_name_or_path: base\nsft: {data: {train: rows.jsonl}}\n"
    "reward: {data: {train: pairs.jsonl}}\nppo: {data: {train: prompts.jsonl}}\n",
}


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the test, with the base and the reward run that the minimal jobs name."""
    monkeypatch.chdir(tmp_path)
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    for folder in ("base", "runs/sft", "runs/reward"):
        Path(folder).mkdir(parents=True)
    return tmp_path


@pytest.fixture
def complaints(workdir: Path) -> Callable[..., list[str]]:
    """Writes `text` to job.yaml, loads it as a job of `stage`, and gives the lines of its error."""

    def told(stage: str, text: str | bytes, *overrides: str) -> list[str]:
        Path("job.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ConfigError) as caught:
            load(CLASSES[stage], "job.yaml", overrides)
        return caught.value.lines()

    return told


@pytest.fixture
def loaded(workdir: Path) -> Callable[..., Section]:
    """The same for a job that is in order."""

    def config(stage: str, text: str | bytes, *overrides: str) -> Section:
        Path("job.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return load(CLASSES[stage], "job.yaml", overrides)

    return config
