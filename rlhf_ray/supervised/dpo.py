"""Direct preference optimisation: a LoRA adapter to which the chosen reply of a pair is likelier than the rejected one, compared
with a frozen reference (arXiv:2305.18290).

Loss: -log sigmoid(beta x ((log p - log p_ref)(chosen) - (log p - log p_ref)(rejected))), log-probabilities summed over the reply
and its end of turn, with label_smoothing; plus rpo_alpha x the mean of -log p over the chosen reply's tokens. The pairs are read
and tokenised as the reward stage does. Policy and reference are adapters on one loaded base; dropout is 0, or their difference
would be noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.config import DPOConfig
from rlhf_ray.data.collate import TokenisedPair
from rlhf_ray.data.templates import Template
from rlhf_ray.errors import ConfigError, Problem
from rlhf_ray.maths.losses import dpo_loss_sum
from rlhf_ray.maths.stats import wilson_interval
from rlhf_ray.models.adapters import copy_adapter
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.models.lineage import describe
from rlhf_ray.runtime.session import Session
from rlhf_ray.storage.run import Run
from rlhf_ray.supervised.pairs import PairTask, pair_tokeniser
from rlhf_ray.supervised.reward_metrics import CONFIDENCE, accuracy_line
from rlhf_ray.supervised.stage import train_supervised
from rlhf_ray.supervised.start import copy_of, fresh
from rlhf_ray.supervised.task import Recipe
from rlhf_ray.supervised.trained_model import PreferenceModel
from rlhf_ray.supervised.trainer import Batch, Sums

REFERENCE = "reference"
LOSSES = {"sigmoid": dpo_loss_sum}
"""loss_type -> the equation."""
MEANS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
"""TRL's names. Sums over pairs until they are logged; rewards are beta (log p - log p_ref)."""


def train_dpo(config: DPOConfig, session: Session) -> Run:
    """The body of the stage; every rank of the learner group runs it."""
    check_options(config)

    def build(backbone: Backbone, template: Template) -> DPOTask:
        return DPOTask(config, backbone, template, session)

    return train_supervised(config, session, Recipe("dpo", "preference", "reward", pair_tokeniser(config), build))


def check_options(config: DPOConfig) -> None:
    """ConfigError for arguments of the trainer that would not do what their name says."""
    refused = {
        "label_smoothing_factor": "smooths tokens, not pairs; set label_smoothing",
        "neftune_noise_alpha": "would shake the reference as well; drop it",
    }
    ConfigError.raise_all(
        Problem(f"trainer.{name}", why.partition("; ")[0], fix=why.partition("; ")[2])
        for name, why in refused.items()
        if name in config.trainer
    )


class DPOTask(PairTask):
    """A copy of the SFT adapter beside the frozen original, or a fresh adapter beside the base itself."""

    model: PreferenceModel
    adapter = "dpo"
    task_type = "CAUSAL_LM"

    def __init__(self, config: DPOConfig, backbone: Backbone, template: Template, session: Session) -> None:
        if config.sft is None:
            start = fresh(backbone, config.lora.model_copy(update={"lora_dropout": 0.0}), self.adapter, config.seed)
        else:
            start = copy_of(config.sft, backbone, template, self.adapter, session)
            copy_adapter(start.model, self.adapter, REFERENCE, trainable=False)
        model = PreferenceModel(backbone, start.model, None if config.sft is None else REFERENCE)
        reference = "the base itself" if config.sft is None else f"{config.sft}, frozen"
        told = [
            *describe(backbone.identity, start.parents, template),
            f"adapter    {start.told}; reference {reference}",
        ]
        super().__init__(model, start.parents, told)
        self.config = config

    def collate(self, picked: Sequence[tuple[TokenisedPair, bool]]) -> Batch:
        """As pairs, with `replies`: which tokens are the replies'."""
        batch = super().collate(picked)
        starts = torch.tensor([row.prompt_length for row, _ in picked] * 2)[:, None]
        after_prompt = torch.arange(batch["input_ids"].shape[1])[None, :] >= starts
        return {**batch, "replies": after_prompt & batch["attention_mask"].bool()}

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Sums]:
        inputs = batch["input_ids"], batch["attention_mask"], batch["replies"]
        counts = batch["counts"]
        ref_chosen, ref_rejected = (half[counts] for half in self.model.reference_logprobs(*inputs).chunk(2))
        chosen, rejected = (half[counts] for half in model(*inputs).chunk(2))
        config = self.config
        loss_of = LOSSES[config.loss_type]
        loss, _, stats = loss_of(chosen, rejected, ref_chosen, ref_rejected, config.beta, config.label_smoothing)
        if config.rpo_alpha:
            lengths = batch["replies"].sum(dim=1)[: len(counts)][counts]
            loss = loss - config.rpo_alpha * (chosen / lengths).sum()
        sums = {
            "won": stats["won"],
            "rewards/chosen": stats["chosen"],
            "rewards/rejected": stats["rejected"],
            "rewards/margins": stats["chosen"] - stats["rejected"],
            "logps/chosen": chosen.detach().sum(),
            "logps/rejected": rejected.detach().sum(),
        }
        return loss, sums

    def log(self, sums: dict[str, float], items: float) -> dict[str, float]:
        found = {name: total / max(items, 1.0) for name, total in sums.items()}
        return {"rewards/accuracies": found.pop("won"), **found}

    def evaluate(self, rows: Sequence[TokenisedPair], session: Session) -> dict[str, float]:
        totals: dict[str, float] = {}
        for _, batch in self.eval_parts(rows, self.config.per_device_eval_batch_size, session):
            loss, sums = self.loss_sum(self.model, batch)
            for name, value in {"loss": loss.detach(), **sums}.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        names = ("loss", "won", *MEANS)
        found = dict(zip(names, session.sum([totals.get(name, 0.0) for name in names])))
        low, high = wilson_interval(found["won"], len(rows), CONFIDENCE)
        means = {name: found[name] / len(rows) for name in ("loss", *MEANS)}
        told = {**means, "accuracy": found["won"] / len(rows), "accuracy_low": low, "accuracy_high": high}
        return {**{f"eval/{name}": value for name, value in told.items()}, "eval/rows": float(len(rows))}

    def outputs(self, batch: Batch, head: Tensor | None) -> Tensor:
        return self.model.next_token_logits(batch["input_ids"], batch["attention_mask"])

    def verdict(self, metrics: Mapping[str, float]) -> str | None:
        return accuracy_line(metrics)

    def manifest(self, rows: Sequence[Any]) -> dict[str, Any]:
        names = ("loss_type", "beta", "label_smoothing", "rpo_alpha", "add_eos_token")
        return {"dpo": {name: getattr(self.config, name) for name in names}}
