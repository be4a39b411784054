"""Which date a run's chat template says: pinned at the start, kept, inherited."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import PipelineConfig, PPOConfig, SFTConfig
from rlhf_ray.config.resolved import to_dict
from rlhf_ray.data.templates import load_template
from rlhf_ray.launch.template_date import with_template_date
from rlhf_ray.models.backbone import load_tokenizer
from rlhf_ray.storage.object_store import copy_checkpoint
from rlhf_ray.storage.run_folder import RunFolder, create_run

THEN, LATER = "2020-02-03T04:05:06", "2021-01-01T00:00:00"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SFTConfig]:
    monkeypatch.chdir(tmp_path)

    def make(**fields: Any) -> SFTConfig:
        values = {
            "output_dir": "run",
            "model_name_or_path": "nowhere",
            "template": "chat",
            "data": {"train": "x.jsonl"},
        }
        return SFTConfig(**{**values, **fields})

    return make


def ppo(**fields: Any) -> PPOConfig:
    values = {"output_dir": "ppo", "model_name_or_path": "nowhere", "template": "chat", "data": {"train": "x.jsonl"}}
    return PPOConfig(**{**values, "rewards": [{"name": "r", "function": "r.py:r"}], **fields})


def test_a_new_run_takes_the_time_of_its_start(job: Callable[..., SFTConfig]) -> None:
    found = with_template_date(job()).template_date
    assert found is not None and timedelta(0) <= datetime.now() - datetime.fromisoformat(found) < timedelta(minutes=1)
    assert with_template_date(job(template_date=THEN)).template_date == THEN
    for other in (job(template="none"), job(template="alpaca")):
        assert with_template_date(other) is other
    data = {"data": {"train": "x.jsonl"}}
    staged = PipelineConfig(
        output_dir="all",
        model_name_or_path="x",
        stages=("sft", "reward"),
        sft={**data, "template": "chat"},
        reward=data,
    )
    pinned = with_template_date(staged)
    assert {pinned.stage_config(s).template_date for s in ("sft", "reward")} == {pinned.template_date} != {None}


def test_a_run_that_goes_on_keeps_its_date(job: Callable[..., SFTConfig], tmp_path: Path) -> None:
    create_run("run", "sft", to_dict(job(template_date=THEN)), "never")
    assert with_template_date(job(resume="auto")).template_date == THEN
    older = to_dict(job(output_dir="older"))
    del older["template_date"]
    create_run("older", "sft", older, "never")
    assert with_template_date(job(output_dir="older", resume="auto")).template_date is None, "it asked the clock"


def test_a_run_that_is_restored_from_its_copy_keeps_its_date(job: Callable[..., SFTConfig], tmp_path: Path) -> None:
    copy = f"file://{tmp_path / 'copy'}"
    folder = create_run("run", "sft", to_dict(job(template_date=THEN)), "never")
    checkpoint = folder.path / "checkpoints" / "step_000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    assert copy_checkpoint(folder.path, checkpoint, copy, print)
    elsewhere = {"output_dir": "elsewhere", "copy_to": copy}
    assert with_template_date(job(**elsewhere, resume="auto")).template_date == THEN
    assert with_template_date(job(**elsewhere)).template_date != THEN, "resume: never starts afresh"


def test_a_later_stage_takes_the_date_of_what_it_starts_from(
    job: Callable[..., SFTConfig], tiny_run: Callable[..., Path], chat_llama: Callable[..., Path], tmp_path: Path
) -> None:
    dated = chat_llama(chat_template="{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}")

    def made(name: str, stage: str, date: str) -> str:
        run = tiny_run(tmp_path / name, dated, stage=stage, template="chat")
        template = load_template("chat", load_tokenizer(str(dated)), date)
        RunFolder(run).update_manifest(template=template.manifest())
        return str(run)

    sft, judge = made("sft", "sft", THEN), made("judge", "reward", LATER)
    assert with_template_date(ppo(sft=sft)).template_date == THEN
    rewards = [{"name": "r", "run": judge}]
    assert with_template_date(ppo(sft=sft, rewards=rewards)).template_date == THEN, "the policy's start comes first"
    assert with_template_date(ppo(rewards=rewards)).template_date == LATER
    assert with_template_date(ppo(sft=sft, template_date=LATER)).template_date == LATER


@pytest.mark.parametrize("date", ["yesterday", "2026-13-01", ""])
def test_a_date_that_is_none(job: Callable[..., SFTConfig], date: str) -> None:
    with pytest.raises(ValueError, match="template_date"):
        job(template_date=date)
