"""Reward modelling: a LoRA adapter with a scalar head that scores the chosen reply of a pair above the rejected one.

Loss: -log sigmoid(score of chosen - score of rejected - margin) (Bradley-Terry; the margin is 0 where the data have none), plus
center_rewards_coefficient x (score of chosen + score of rejected)^2. Held-out figures are those of the scores alone. Both replies
stand behind the same prompt tokens and end in the end of turn (add_eos_token), and the score is read after the last real token:
what PPO scores is what is trained here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.config import RewardConfig
from rlhf_ray.data.collate import TokenisedPair
from rlhf_ray.data.templates import Template
from rlhf_ray.errors import ConfigError, Problem
from rlhf_ray.maths.losses import centring_loss_sum, pairwise_reward_loss_sum
from rlhf_ray.maths.rng import derived_seed
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.models.heads import ScalarHead
from rlhf_ray.models.lineage import describe
from rlhf_ray.runtime.session import Session
from rlhf_ray.storage.run import Run
from rlhf_ray.supervised.pairs import PairTask, pair_tokeniser
from rlhf_ray.supervised.reward_metrics import PairScores, accuracy_line, held_out_record, score_metrics
from rlhf_ray.supervised.stage import train_supervised
from rlhf_ray.supervised.start import copy_of, fresh
from rlhf_ray.supervised.task import Recipe
from rlhf_ray.supervised.trained_model import RewardModel
from rlhf_ray.supervised.trainer import Batch, Sums


def train_reward(config: RewardConfig, session: Session) -> Run:
    """The body of the stage; every rank of the learner group runs it."""
    check_options(config)

    def build(backbone: Backbone, template: Template) -> RewardTask:
        return RewardTask(config, backbone, template, session)

    return train_supervised(config, session, Recipe("reward", "preference", "reward", pair_tokeniser(config), build))


def check_options(config: RewardConfig) -> None:
    """ConfigError for settings that would have no effect."""
    problems = []
    if config.sft is not None and config.init_from == "base":
        problems.append(Problem("sft", "has no effect with init_from: base", fix="drop one of the two"))
    if "label_smoothing_factor" in config.trainer:
        problems.append(Problem("trainer.label_smoothing_factor", "has no meaning for pairs", fix="drop it"))
    ConfigError.raise_all(problems)


class RewardTask(PairTask):
    """A copy of the SFT adapter, or a fresh one, with a scalar head."""

    model: RewardModel
    adapter = "reward"
    task_type = "SEQ_CLS"
    evaluates_at_start = False

    def __init__(self, config: RewardConfig, backbone: Backbone, template: Template, session: Session) -> None:
        if config.sft is None:
            start = fresh(backbone, config.lora, self.adapter, config.seed)
            if config.init_from == "sft" and session.is_main:
                session.console.warn("no sft is given: the reward model starts from the base, not from the SFT model")
        else:
            start = copy_of(config.sft, backbone, template, self.adapter, session, for_reward=True)
        head = ScalarHead(backbone.hidden_size, initial_head(backbone.hidden_size, config.seed)).to(backbone.device)
        lineage = [*describe(backbone.identity, start.parents, template), f"adapter    {start.told}; scalar head"]
        model = RewardModel(backbone, start.model, head, config.has_contiguous_rows)
        super().__init__(model, start.parents, lineage)
        self.config = config
        self.spread: dict[str, float] | None = None
        self.held_out: dict[str, Any] | None = None

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Sums]:
        scores = model(batch["input_ids"], batch["attention_mask"])
        chosen, rejected = (half[batch["counts"]] for half in scores.chunk(2))
        loss, _ = pairwise_reward_loss_sum(chosen, rejected, batch["margin"][batch["counts"]])
        if self.config.center_rewards_coefficient:
            loss = loss + self.config.center_rewards_coefficient * centring_loss_sum(chosen, rejected)[0]
        margin = (chosen - rejected).detach()
        return loss, {"won": (margin.sign() + 1).sum() / 2, "margin": margin.sum()}

    def log(self, sums: dict[str, float], items: float) -> dict[str, float]:
        pairs = max(items, 1.0)
        return {"accuracy": sums["won"] / pairs, "margin": sums["margin"] / pairs}

    def evaluate(self, rows: Sequence[TokenisedPair], session: Session) -> dict[str, float]:
        scored = self.score_pairs(rows, session)
        self.spread, self.held_out = scored.spread(), held_out_record(scored, self.config.seed)
        return score_metrics(scored, self.config.seed)

    def state_dict(self) -> dict[str, Any]:
        return {"spread": self.spread, "held_out": self.held_out}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.spread, self.held_out = state["spread"], state.get("held_out")  # not in checkpoints of older versions

    def score_pairs(self, rows: Sequence[TokenisedPair], session: Session) -> PairScores:
        """Scores and reply lengths of all pairs, in row order, on every rank."""
        mine: list[tuple[int, list[float]]] = []
        for part, batch in self.eval_parts(rows, self.config.per_device_eval_batch_size, session):
            scores = self.model(batch["input_ids"], batch["attention_mask"]).view(2, -1).T.tolist()
            mine += zip(part, scores)
        pairs = dict(pair for rank in session.gather(mine) for pair in rank)
        lengths = [[len(r.chosen_ids) - r.prompt_length, len(r.rejected_ids) - r.prompt_length] for r in rows]
        scores = torch.tensor([pairs[i] for i in range(len(rows))])
        return PairScores(scores, torch.tensor(lengths), [row.group for row in rows])

    def outputs(self, batch: Batch, head: Tensor | None) -> Tensor:
        if head is None:
            return self.model(batch["input_ids"], batch["attention_mask"])
        trained = self.model.head
        self.model.head = ScalarHead(head.shape[1], head).to(self.model.backbone.device)
        try:
            return self.model(batch["input_ids"], batch["attention_mask"])
        finally:
            self.model.head = trained

    def head(self) -> Tensor:
        return self.model.head.weight.detach().to("cpu", torch.float32, copy=True)

    def restore(self, tensors: dict[str, Tensor], head: Tensor | None) -> None:
        super().restore(tensors, head)
        if head is not None:
            with torch.no_grad():
                self.model.head.weight.copy_(head)

    def verdict(self, metrics: Mapping[str, float]) -> str | None:
        return accuracy_line(metrics)

    def manifest(self, rows: Sequence[TokenisedPair]) -> dict[str, Any]:
        """How replies are scored, how the model did on held-out pairs, and what any copy of it must say of a few sequences."""
        batch = self.collate([(row, True) for row in rows])
        with torch.no_grad():
            scores = self.outputs({k: t.to(self.model.backbone.device) for k, t in batch.items()}, None).tolist()
        sequences = [row.chosen_ids for row in rows] + [row.rejected_ids for row in rows]
        return {
            "reward": {
                "add_eos_token": self.config.add_eos_token,
                "precision": self.model.backbone.identity.precision,
                "held_out_scores": self.spread,
                "held_out": self.held_out,
                "fixture": [{"input_ids": ids, "score": score} for ids, score in zip(sequences, scores)],
            }
        }


def initial_head(hidden_size: int, seed: int) -> Tensor:
    """f32[1, D] drawn from N(0, 1 / (D + 1)) (arXiv:2403.17031): from zero weights no gradient would reach the adapter at first."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "reward head"))
    return torch.randn(1, hidden_size, generator=generator) / (hidden_size + 1) ** 0.5
