"""A new kind of reward is one class: the scorer needs to know nothing of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.batches import Rollout, Scores
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.records import Row
from rlhf_ray.rewards.protocol import Reward, RewardInputs, Texts
from rlhf_ray.rewards.sources import ModelReward
from rlhf_ray.roles.scorer import Scorer

CPU = torch.device("cpu")


class FinishedReward(Reward):
    """1 for a reply that ended by itself; drifts where it did not. Reads neither ids nor text."""

    name, weight = "finished", 0.5

    def score(self, inputs: RewardInputs) -> Tensor:
        return inputs.rollout.finished.float()

    def drift(self, inputs: RewardInputs) -> Tensor | None:
        return 1.0 - inputs.rollout.finished.float()


class LengthReward(Reward):
    """Characters of the reply."""

    name, weight = "length", 2.0

    def score(self, inputs: RewardInputs) -> Tensor:
        return torch.tensor([float(len(text)) for text in inputs.texts.completions])


def rollout() -> Rollout:
    """Three replies to prompts of one token; the second has one token, and is cut off."""
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    return Rollout(
        tokens=torch.tensor([[1, 5, 6], [1, 7, 0], [1, 8, 9]]),
        prompt_mask=torch.ones(3, 1, dtype=torch.bool),
        response_mask=mask,
        sample_logprobs=torch.zeros(3, 2),
        finished=torch.tensor([True, False, True]),
        row_id=torch.arange(3),
        adapter_version=0,
        adapter_sha256="",
    )


def rows() -> list[Row]:
    return [Row(prompt=Prompt(text="a"), completion="", where=f"row {i}") for i in range(3)]


def models(kind: str, role: str, seq: Any, *given: Any) -> Any:
    """A reward is the sum of a sequence's real ids; the reference says -1 everywhere."""
    if kind == "logprobs":
        return torch.where(seq.response_mask, -1.0, 0.0), None
    return (seq.tokens * seq.attention_mask).sum(dim=1)


def test_the_scorer_takes_any_kind_beside_the_others() -> None:
    decoded = []

    def to_texts(some: Rollout, given: Any) -> Texts:
        decoded.append(len(some))
        return Texts(["a"] * 3, ["four", "", "six..."], [[5, 6], [7], [8, 9]], [{}, {}, {}])

    ids = ModelReward("ids", 1.0, models, "ids", 2, CPU)
    scores = Scorer(models, [FinishedReward(), ids, LengthReward()], to_texts, 1.0, 2, CPU).score(rollout(), rows())
    assert scores.parts["finished"].tolist() == [1.0, 0.0, 1.0]
    assert scores.parts["ids"].tolist() == [12.0, 8.0, 18.0]
    assert scores.parts["length"].tolist() == [4.0, 0.0, 6.0]
    assert scores.reward.tolist() == [20.5, 8.0, 30.5]
    assert scores.ref_logprobs.tolist() == [[-1.0, -1.0], [-1.0, 0.0], [-1.0, -1.0]]
    assert scores.drift is not None and scores.drift.tolist() == [0.0, 1.0, 0.0]
    assert decoded == [3], "decoded once, however many rewards read text"


class Says(Reward):
    """What it was made with."""

    def __init__(self, name: str, weight: float, *scores: float) -> None:
        self.name, self.weight, self.scores = name, weight, scores

    def score(self, inputs: RewardInputs) -> Tensor:
        return torch.tensor(self.scores)


def scored(*rewards: Reward) -> Scores:
    return Scorer(models, rewards, lambda *_: None, 1.0, 2, CPU, reference=None).score(rollout(), rows())  # type: ignore[arg-type,return-value]


NONE, BROKEN = math.nan, math.inf


def test_a_reward_that_does_not_apply_abstains() -> None:
    """Two rewards for two kinds of prompt: each counts where it applies; a reply is without a reward where both abstain."""
    found = scored(Says("maths", 1.0, 2.0, NONE, NONE), Says("code", 0.5, NONE, 4.0, NONE))
    assert found.reward[:2].tolist() == [2.0, 2.0] and bool(found.reward[2].isnan())
    assert found.parts["maths"][0] == 2.0 and bool(found.parts["maths"][1:].isnan().all())


def test_a_broken_reward_costs_its_replies_and_one_that_only_watches_costs_nothing() -> None:
    found = scored(Says("maths", 1.0, 2.0, BROKEN, 3.0), Says("watcher", 0.0, BROKEN, NONE, 5.0))
    assert found.reward.tolist() == [2.0, BROKEN, 3.0]
    assert found.parts["maths"][1] == BROKEN, "named by the guard"
    assert found.parts["watcher"].isnan().tolist() == [True, True, False]
    assert scored(Says("watcher", 0.0, 1.0, 2.0, BROKEN)).reward.tolist() == [0.0, 0.0, 0.0]


def test_nothing_is_decoded_where_no_reward_reads_text() -> None:
    def never(*given: Any) -> Texts:
        raise AssertionError("nobody reads text")

    scores = Scorer(models, [FinishedReward()], never, 1.0, 2, CPU, reference=None).score(rollout(), rows())
    assert scores.reward.tolist() == [0.5, 0.0, 0.5] and not scores.ref_logprobs.any()


def test_a_rank_without_rows_joins_the_passes_of_the_others() -> None:
    """Two passes of the reference and two of the reward, as the rank that needs most makes."""
    seen: list[str] = []

    def counted(kind: str, role: str, seq: Any, *given: Any) -> Any:
        seen.append(f"{kind} {role}")
        return models(kind, role, seq)

    def most(own: int) -> int:
        return max(own, 2)

    ids = ModelReward("ids", 1.0, counted, "ids", 2, CPU, most)
    scorer = Scorer(counted, [FinishedReward(), ids], lambda *_: None, 1.0, 2, CPU, max_over_ranks=most)  # type: ignore[arg-type,return-value]
    scorer.join()
    joined = list(seen)
    seen.clear()
    scorer.score(rollout(), rows())
    assert joined == seen == ["logprobs reference"] * 2 + ["rewards ids"] * 2
