"""Supervised fine-tuning: a LoRA adapter that answers as the data do.

Loss: mean of -log p over the reply's tokens and its end of turn, in a conversation over those of all the assistant's turns
(train_on_turns), and over the prompt's tokens with train_on_inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.config import SFTConfig
from rlhf_ray.data.collate import IGNORE_INDEX, Tokenised, TokenisedRow, collate_sft, tokenise_sft
from rlhf_ray.data.records import Row
from rlhf_ray.data.templates import Template
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.models.lineage import describe
from rlhf_ray.runtime.session import Session
from rlhf_ray.storage.run import Run
from rlhf_ray.supervised.stage import train_supervised
from rlhf_ray.supervised.start import copy_of, fresh
from rlhf_ray.supervised.task import Recipe, Task
from rlhf_ray.supervised.trained_model import LanguageModel
from rlhf_ray.supervised.trainer import Batch, Sums


def train_sft(config: SFTConfig, session: Session) -> Run:
    """The body of the stage; every rank of the learner group runs it."""

    def tokenise(rows: Sequence[Row], template: Template, tokenizer: Any, max_length: int) -> Tokenised[TokenisedRow]:
        return tokenise_sft(
            rows,
            template,
            tokenizer,
            max_length=max_length,
            too_long=config.data.too_long,
            train_on_inputs=config.train_on_inputs,
            train_on_turns=config.train_on_turns,
            add_eos_token=config.add_eos_token,
            on_bad_row=config.data.on_bad_row,
            special_tokens=config.data.special_tokens,
        )

    def build(backbone: Backbone, template: Template) -> SFTTask:
        return SFTTask(config, backbone, template, session)

    return train_supervised(config, session, Recipe("sft", "sft", None, tokenise, build))


class SFTTask(Task):
    """A fresh adapter on the base, or a copy of one that has been trained, and the cross-entropy of replies."""

    model: LanguageModel
    adapter = "sft"
    task_type = "CAUSAL_LM"

    def __init__(self, config: SFTConfig, backbone: Backbone, template: Template, session: Session) -> None:
        if config.sft is None:
            start = fresh(backbone, config.lora, self.adapter, config.seed)
        else:
            start = copy_of(config.sft, backbone, template, self.adapter, session)
        stands_on = describe(backbone.identity, start.parents, template)
        model = LanguageModel(backbone, start.model, config.has_contiguous_rows, config.packing)
        super().__init__(model, start.parents, [*stands_on, f"adapter    {start.told}"])
        self.config = config
        self.label_smoothing = float(config.trainer.get("label_smoothing_factor", 0.0))
        self._trained_tokens = 0.0

    def length(self, row: TokenisedRow) -> int:
        return len(row.input_ids)

    def collate(self, picked: Sequence[tuple[TokenisedRow, bool]]) -> Batch:
        batch = collate_sft([row for row, _ in picked], self.model.backbone.pad_id)
        counts = torch.tensor([counts for _, counts in picked])
        batch["labels"][~counts] = IGNORE_INDEX
        return batch

    def count(self, batch: Batch) -> int:
        return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Sums]:
        return model(**batch, label_smoothing=self.label_smoothing), {}

    def log(self, sums: dict[str, float], items: float) -> dict[str, float]:
        self._trained_tokens += items
        return {"tokens/train": self._trained_tokens}

    def state_dict(self) -> dict[str, Any]:
        return {"trained_tokens": self._trained_tokens}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._trained_tokens = state["trained_tokens"]

    def evaluate(self, rows: Sequence[TokenisedRow], session: Session) -> dict[str, float]:
        """Mean over the held-out rows' tokens, and its exponential."""
        loss, tokens = 0.0, 0
        for _, batch in self.eval_parts(rows, self.config.per_device_eval_batch_size, session):
            loss += float(self.model(**batch))
            tokens += self.count(batch)
        loss, total = session.sum([loss, tokens])
        mean = loss / total
        return {"eval/loss": mean, "eval/perplexity": math.exp(min(mean, 100.0)), "eval/rows": float(len(rows))}

    def outputs(self, batch: Batch, head: Tensor | None) -> Tensor:
        return self.model.next_token_logits(batch["input_ids"], batch["attention_mask"])

    def manifest(self, rows: Sequence[Any]) -> dict[str, Any]:
        names = ("add_eos_token", "train_on_inputs", "train_on_turns")
        return {"sft": {name: getattr(self.config, name) for name in names}}
