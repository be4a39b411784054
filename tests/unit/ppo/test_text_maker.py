"""Rollouts read back as text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from rlhf_ray.batches import Rollout
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.records import Row
from rlhf_ray.data.templates import load_template
from rlhf_ray.models.backbone import load_backbone
from rlhf_ray.ppo.models import text_maker


def test_replies_and_prompts_of_a_rollout_as_text(tiny_llama: Callable[..., Path]) -> None:
    """Prompts of other widths than replies: "ab" and "c" (after <s>, 1), answered by "xyz" and, finished by </s> (2), "w"."""
    how = {"dtype": "float32", "attn_implementation": "auto", "load_in_8bit": False, "load_in_4bit": False}
    backbone = load_backbone(path=str(tiny_llama()), revision=None, cpu_offload=False, device="cpu", **how)  # type: ignore[arg-type]
    a, b, c, w, x, y, z = (backbone.tokenizer.convert_tokens_to_ids(letter) for letter in "abcwxyz")
    response_mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    rollout = Rollout(
        tokens=torch.tensor([[1, a, b, x, y, z, 0], [0, 1, c, w, 2, 0, 0]]),
        prompt_mask=torch.tensor([[True, True, True], [False, True, True]]),
        response_mask=response_mask,
        sample_logprobs=torch.zeros(2, 4),
        finished=torch.tensor([False, True]),
        row_id=torch.arange(2),
    )
    rows = [Row("here:1", Prompt("ab"), columns={"k": 1}), Row("here:2", Prompt("c"), columns={"k": 2})]
    texts = text_maker(backbone, load_template("none", backbone.tokenizer))(rollout, rows)
    assert list(texts.completions) == ["xyz", "w"] and list(texts.prompts) == ["ab", "c"]
    assert list(texts.completion_ids) == [[x, y, z], [w, 2]] and list(texts.columns) == [{"k": 1}, {"k": 2}]
