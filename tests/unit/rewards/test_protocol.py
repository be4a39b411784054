"""A new kind of reward is one class: the scorer needs to know nothing of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_ray.batches import Rollout, Scores
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.records import Row
from rlhf_ray.models.batching import Batching
from rlhf_ray.rewards.protocol import Reward, RewardInputs, Texts
from rlhf_ray.rewards.sources import EnsembleReward, ModelReward, NormalisedReward
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

    ids = ModelReward("ids", 1.0, models, "ids", Batching(2), CPU)
    scores = Scorer(models, [FinishedReward(), ids, LengthReward()], to_texts, 1.0, Batching(2), CPU).score(
        rollout(), rows()
    )
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
    return Scorer(models, rewards, lambda *_: None, 1.0, Batching(2), CPU, reference=None).score(rollout(), rows())  # type: ignore[arg-type,return-value]


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


def ensemble(aggregate: str, std_coef: float | None = None, weight: float = 1.0, broken: float = 6.0) -> EnsembleReward:
    """Members of other scales: the second has 10 times the first's, and 100 more; the third can be broken on the last reply."""
    members = [
        Says("rm/1", 1.0, 1.0, 2.0, 6.0),
        Says("rm/2", 1.0, 130.0, 120.0, 160.0),
        Says("rm/3", 1.0, 5.0, 2.0, broken),
    ]
    scales = [(0.0, 1.0), (100.0, 10.0), (0.0, 1.0)]
    whole = [NormalisedReward(member, *scale) for member, scale in zip(members, scales)]
    return EnsembleReward("rm", weight, whole, aggregate, std_coef)


def test_an_ensemble_is_one_reward_and_tells_its_members_and_their_disagreement() -> None:
    """Members are normalised first: 1, 3, 5 have mean 3 and variance 8/3 (1/n); 2, 2, 2 and 6, 6, 6 agree. Not normalised, the
    second would never be the lowest."""
    found = scored(ensemble("mean_minus_std", 1.0, weight=0.5))
    apart = math.sqrt(8 / 3)
    assert found.reward.tolist() == [pytest.approx(0.5 * (3 - apart)), 1.0, 3.0]
    assert found.parts["rm"].tolist() == [pytest.approx(3 - apart), 2.0, 6.0]
    assert found.parts["rm/2"].tolist() == [3.0, 2.0, 6.0] and found.parts["rm/3"].tolist() == [5.0, 2.0, 6.0]
    assert found.parts["rm/std"].tolist() == [pytest.approx(apart), 0.0, 0.0]
    assert scored(ensemble("min")).reward.tolist() == [1.0, 2.0, 6.0]
    assert scored(ensemble("mean")).reward.tolist() == [3.0, 2.0, 6.0]


@pytest.mark.parametrize("aggregate", ["mean_minus_std", "min", "mean"])
@pytest.mark.parametrize("broken", [math.inf, -math.inf])
def test_a_member_that_is_broken_breaks_the_ensemble(aggregate: str, broken: float) -> None:
    """Not even min, which would pass over an infinite one, makes a number of it; one that watches says nothing there."""
    found = scored(ensemble(aggregate, 1.0 if aggregate == "mean_minus_std" else None, broken=broken))
    assert found.reward.isinf().tolist() == [False, False, True] and found.parts["rm"].isinf()[2]
    idle = scored(ensemble(aggregate, 1.0 if aggregate == "mean_minus_std" else None, weight=0.0, broken=broken))
    assert idle.reward.tolist() == [0.0, 0.0, 0.0]
    assert all(
        part.isnan().tolist() == [False, False, name != "rm/1" and name != "rm/2"] for name, part in idle.parts.items()
    )


def test_nothing_is_decoded_where_no_reward_reads_text() -> None:
    def never(*given: Any) -> Texts:
        raise AssertionError("nobody reads text")

    scores = Scorer(models, [FinishedReward()], never, 1.0, Batching(2), CPU, reference=None).score(rollout(), rows())
    assert scores.reward.tolist() == [0.5, 0.0, 0.5] and not scores.ref_logprobs.any()


def test_a_rank_without_rows_joins_the_passes_of_the_others() -> None:
    """Two passes of the reference and two of the reward, as the rank that needs most makes."""
    seen: list[str] = []

    def counted(kind: str, role: str, seq: Any, *given: Any) -> Any:
        seen.append(f"{kind} {role}")
        return models(kind, role, seq)

    def most(own: int) -> int:
        return max(own, 2)

    ids = ModelReward("ids", 1.0, counted, "ids", Batching(2), CPU, most)
    pair = EnsembleReward(
        "pair",
        1.0,
        [ModelReward(f"pair/{i}", 1.0, counted, f"pair/{i}", Batching(2), CPU, most) for i in (1, 2)],
        "min",
        None,
    )
    scorer = Scorer(counted, [FinishedReward(), ids, pair], lambda *_: None, 1.0, Batching(2), CPU, max_over_ranks=most)  # type: ignore[arg-type,return-value]
    scorer.join()
    joined = list(seen)
    seen.clear()
    scorer.score(rollout(), rows())
    members = ["rewards pair/1"] * 2 + ["rewards pair/2"] * 2
    assert joined == seen == ["logprobs reference"] * 2 + ["rewards ids"] * 2 + members
