"""An adapter that is more than plain LoRA answers as it does in PEFT: merged into a base of its own. Nothing is trained from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.cli import main
from rlhf_ray.config import SamplingConfig
from rlhf_ray.console import NullConsole
from rlhf_ray.errors import ArtifactError
from rlhf_ray.stages.generate import generate

Make = Callable[..., Any]
ASK = "Name the oak."
DORA = {"target_modules": ["q_proj", "v_proj"], "use_dora": True}
SAVED = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
GREEDY = SamplingConfig(do_sample=False)


def ask(policies: list[str], **fields: Any) -> list[dict[str, Any]]:
    fields = {"sampling": GREEDY, "max_new_tokens": 12, "template": "none", "num_threads": 1, **fields}
    return generate(policies=policies, instruction=ASK, console=NullConsole(), **fields)


def greedy(theirs: Any, base: Path) -> str:
    """By PEFT and transformers alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(ASK, return_tensors="pt").input_ids
    with torch.no_grad():
        said = theirs.generate(input_ids=ids, do_sample=False, max_new_tokens=12, eos_token_id=2, pad_token_id=0)
    return str(tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize(("options", "kind"), [(DORA, "use_dora"), (SAVED, "modules_to_save")])
def test_it_answers_beside_the_base_and_a_plain_adapter(
    tiny_llama: Make, saved_by_peft: Make, tmp_path: Path, options: dict[str, Any], kind: str
) -> None:
    base = tiny_llama()
    theirs = saved_by_peft(base, tmp_path / "more", std=0.4, **options)
    plain = saved_by_peft(base, tmp_path / "plain", std=0.4, target_modules=["q_proj"])
    rows = ask([str(tmp_path / "more"), str(tmp_path / "plain"), "base"])
    said = [row["completion"] for row in rows]
    assert said[:2] == [greedy(theirs, base), greedy(plain, base)]
    assert len(set(said)) == 3 and ask(["base"], model=str(base))[0]["completion"] == said[2]


def test_a_quantised_base_takes_none(tiny_llama: Make, saved_by_peft: Make, tmp_path: Path) -> None:
    saved_by_peft(tiny_llama(), tmp_path / "more", **DORA)
    with pytest.raises(ArtifactError, match=r"use_dora: is merged into its base, which cannot be done in 4bit.*merge"):
        ask([str(tmp_path / "more")], load_in_4bit=True)


def test_nothing_is_trained_from_it(
    tiny_llama: Make, saved_by_peft: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_by_peft(tiny_llama(), tmp_path / "more", **DORA)
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Name a bird.", "output": "Robin"}\n' * 4)
    given = {"output_dir": tmp_path / "out", "model_name_or_path": tiny_llama(), "sft": tmp_path / "more"}
    paths = {name: str(path) for name, path in given.items()}
    job = {**paths, "template": "none", "data": {"train": str(tmp_path / "rows.jsonl")}, "learner": {"num_workers": 0}}
    job |= {"train_batch_size": 4, "per_device_train_batch_size": 4}
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    assert main(["sft", str(tmp_path / "job.yaml")]) == 5
    told = capsys.readouterr().err
    assert "DoRA" in told and "merge it into its base" in " ".join(told.split())
