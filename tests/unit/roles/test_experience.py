"""From scores to advantages: hand-worked numbers, and what padding and the options may change."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlhf_ray.batches import Rollout, Scores
from rlhf_ray.config import PPOConfig
from rlhf_ray.maths.stats import RunningMoments
from rlhf_ray.roles.experience import Evaluation, final_scores, informative_rows, make_experience

MASK = torch.tensor([[True, True, True, False], [True, True, False, False]])


def config(**changes: Any) -> PPOConfig:
    fields = {
        "output_dir": "x",
        "model_name_or_path": "m",
        "data": {"train": "p.jsonl"},
        "rewards": [{"function": "f.py:score"}],
        "whiten_advantages": False,
        "missing_eos_penalty": None,
    }
    return PPOConfig(**{**fields, **changes})


def parts() -> tuple[Rollout, Scores, Evaluation]:
    rollout = Rollout(
        tokens=torch.arange(12).view(2, 6),
        prompt_mask=torch.ones(2, 2, dtype=torch.bool),
        response_mask=MASK,
        sample_logprobs=torch.zeros(2, 4),
        finished=torch.tensor([True, False]),
        row_id=torch.arange(2),
    )
    old = torch.tensor([[0.2, -0.4, 0.4, 0.0], [0.0, 0.0, 0.0, 0.0]])
    scores = Scores(torch.tensor([1.0, 2.0]), torch.zeros(2, 4), torch.arange(2))
    values = torch.tensor([[0.5, 0.6, 0.7, 0.0], [0.0, 0.0, 0.0, 0.0]])
    return rollout, scores, Evaluation(old, torch.zeros(2, 4), values, torch.tensor([9.0, 0.5]))


def capped(*finished: bool) -> Rollout:
    """The rollout of `parts`, with other replies finished; row 1, of 2 tokens, is not."""
    return replace(parts()[0], finished=torch.tensor(finished or (True, False)))


def test_gae_by_hand() -> None:
    """Row 0: rewards -0.05 x (0.2, -0.4, 0.4) and the score 1 on the last: (-.01, .02, .98), the golden row of seeds 3.3."""
    experience, metrics = make_experience(*parts(), config(kl_coef=0.05), 0.05, RunningMoments())
    assert torch.allclose(experience.advantages[0], torch.tensor([0.4567, 0.386, 0.28, 0.0]), atol=1e-6)
    assert torch.allclose(experience.returns[0], torch.tensor([0.9567, 0.986, 0.98, 0.0]), atol=1e-6)
    assert metrics["kl/k1_per_response"] == pytest.approx(0.1)
    assert metrics["reward/mean"] == pytest.approx(1.5)


def test_a_reply_that_was_cut_off_may_take_the_critics_word_for_the_rest() -> None:
    """Its score is in that word: with a score of 2 and a value of 0.5 after it, its returns are 0.5, not 2.5."""
    plain, _ = make_experience(*parts(), config(), 0.0, RunningMoments())
    more, _ = make_experience(*parts(), config(bootstrap_truncated=True, lam=1.0), 0.0, RunningMoments())
    assert plain.returns[1].tolist() == pytest.approx([1.9, 2.0, 0.0, 0.0])
    assert more.returns[1].tolist() == pytest.approx([0.5, 0.5, 0.0, 0.0])
    assert torch.allclose(more.returns[0, 2], plain.returns[0, 2]), "a finished reply has nothing after it"


def test_a_critic_that_is_right_has_nothing_to_learn_from_a_cut_reply() -> None:
    """A reply worth 1 however it goes on, and V = 1 everywhere: the targets were 2, one for the score and one for the value."""
    rollout, _, evaluation = parts()
    scores = Scores(torch.ones(2), torch.zeros(2, 4), torch.arange(2))
    right = Evaluation(torch.zeros(2, 4), evaluation.entropy, MASK.float(), torch.ones(2))
    experience, _ = make_experience(rollout, scores, right, config(bootstrap_truncated=True), 0.0, RunningMoments())
    assert torch.equal(experience.returns, MASK.float()) and not experience.advantages.any()


def test_kl_in_the_loss_leaves_the_reward_alone() -> None:
    made = config(use_kl_loss=True, kl_penalty="squared_error")
    a, _ = make_experience(*parts(), made, 0.5, RunningMoments())
    b, _ = make_experience(*parts(), config(), 0.0, RunningMoments())
    assert torch.equal(a.advantages, b.advantages)


def test_whitening_ignores_padding() -> None:
    """F3, whitening over padding: mean 0 and variance 1 over the five real tokens, 0 on padding."""
    experience, _ = make_experience(*parts(), config(whiten_advantages=True), 0.0, RunningMoments())
    real = experience.advantages[MASK]
    assert real.mean().abs() < 1e-6 and (real.std(correction=0) - 1).abs() < 1e-5
    assert not experience.advantages[~MASK].any()


def test_scores_in_their_order_eos_penalty_baseline_scale_clip() -> None:
    made = config(missing_eos_penalty=1.0, reward_baseline=0.5, reward_clip=0.4, response_length=2)
    assert torch.allclose(final_scores(parts()[1], capped(), made, RunningMoments()), torch.tensor([0.4, 0.4]))
    scaled = config(normalize_rewards=True)
    ten = Scores(torch.tensor([10.0, 20.0]), torch.zeros(2, 4), torch.arange(2))
    one = final_scores(parts()[1], capped(True, True), scaled, RunningMoments())
    assert torch.allclose(one, final_scores(ten, capped(True, True), scaled, RunningMoments())), (
        "F4: scale of the reward"
    )


def test_rloo_by_hand() -> None:
    rollout, scores, evaluation = parts()
    made = config(advantage_estimator="rloo", num_generations=2)
    experience, _ = make_experience(
        rollout, scores, Evaluation(evaluation.logprobs, evaluation.entropy, None, None), made, 0.0, RunningMoments()
    )
    assert experience.advantages.tolist() == [[-1, -1, -1, 0], [1, 1, 0, 0]]


def group_of_two(score: float, **changes: Any) -> Any:
    """Advantages and metrics of two replies of equal score to one prompt, whose penalties are 0.2 and 0."""
    rollout, _, evaluation = parts()
    scores = Scores(torch.full((2,), score), torch.zeros(2, 4), torch.arange(2))
    made = config(num_generations=2, **changes)
    alone = Evaluation(evaluation.logprobs, evaluation.entropy, None, None)
    return make_experience(rollout, scores, alone, made, made.kl_coef, RunningMoments())


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_scores_leave_grpo_the_penalty_at_its_own_size(scale: str) -> None:
    """Row 0 is 0.2 nats from the reference, row 1 none: 0.05 x (0.1, -0.1) whatever the scaling. It was (0.70, -0.70)."""
    experience, _ = group_of_two(3.0, advantage_estimator="grpo", scale_rewards=scale, kl_coef=0.05)
    assert torch.allclose(experience.advantages[:, 0], torch.tensor([-0.005, 0.005]), atol=1e-7)


def test_a_reply_near_the_limit_is_charged_in_proportion() -> None:
    """Lengths 3 and 2 of at most 4, a buffer of 2: (3 - 2) / 2 and 0 of the penalty."""
    made = config(overlong_buffer=2, overlong_penalty=0.4, response_length=4)
    assert final_scores(parts()[1], capped(True, True), made, RunningMoments()).tolist() == pytest.approx([0.8, 2.0])


def test_groups_that_say_nothing_are_found_before_the_update() -> None:
    """By the reward with its penalties; the metric is there whether or not they are left out."""
    _, metrics = group_of_two(3.0, advantage_estimator="rloo")
    assert metrics["advantage/equal_groups"] == 1.0
    rollout, scores, _ = parts()
    made = {"advantage_estimator": "rloo", "num_generations": 2, "filter_groups": True}
    assert informative_rows(scores, rollout, config()) is None
    assert informative_rows(scores, rollout, config(**made)).tolist() == [True, True]  # type: ignore[union-attr]
    equal = Scores(torch.ones(2), torch.zeros(2, 4), torch.arange(2))
    assert informative_rows(equal, rollout, config(**made)).tolist() == [False, False]  # type: ignore[union-attr]
    charged = config(**made, missing_eos_penalty=1.0, response_length=2)
    assert informative_rows(equal, rollout, charged).tolist() == [True, True]  # type: ignore[union-attr]


def test_group_advantages_are_whitened_where_the_job_says_so() -> None:
    """The field had no effect with rloo and grpo."""
    plain, _ = group_of_two(3.0, advantage_estimator="rloo", kl_coef=0.05)
    white, _ = group_of_two(3.0, advantage_estimator="rloo", kl_coef=0.05, whiten_advantages=True)
    assert torch.allclose(plain.advantages[:, 0], torch.tensor([-0.01, 0.01]), atol=1e-7)
    real = white.advantages[MASK]
    assert real.mean().abs() < 1e-6 and (real.std(correction=0) - 1).abs() < 1e-3


def test_only_replies_that_were_cut_off_pay_the_missing_eos_penalty() -> None:
    """F9: decided by whether an end token was sampled, so a finished reply is never charged and a capped one always is."""
    scores = parts()[1]  # 1 and 2
    for finished, expected in (((True, False), [1.0, 0.5]), ((False, True), [-0.5, 2.0])):
        made = config(missing_eos_penalty=1.5, response_length=2)
        assert final_scores(scores, capped(*finished), made, RunningMoments()).tolist() == expected
    none = config(missing_eos_penalty=None, response_length=2)
    assert final_scores(scores, capped(), none, RunningMoments()).tolist() == [1.0, 2.0]


def test_a_drawn_length_is_not_the_replys_fault() -> None:
    """Row 1 was cut off after 2 of 3 tokens, by the budget that min_response_length drew for it; in the other job at the limit."""
    scores = parts()[1]
    drawn = config(missing_eos_penalty=1.5, min_response_length=1, response_length=3)
    assert final_scores(scores, capped(), drawn, RunningMoments()).tolist() == [1.0, 2.0]
    limit = config(missing_eos_penalty=1.5, min_response_length=1, response_length=2)
    assert final_scores(scores, capped(), limit, RunningMoments()).tolist() == [1.0, 0.5]


def test_the_true_kl_is_logged_whatever_the_penalty() -> None:
    """F14: the ancestor logged its penalty, clamped at 0, as "kl". Here a negative k1 is shown negative beside it."""
    rollout, scores, evaluation = parts()
    below = Evaluation(-evaluation.logprobs, evaluation.entropy, evaluation.values, evaluation.bootstrap)
    for kind in ("clamped_kl", "none", "jensen_shannon"):
        _, metrics = make_experience(rollout, scores, below, config(kl_penalty=kind), 0.05, RunningMoments())
        assert metrics["kl/k1_per_response"] == pytest.approx(
            -0.1
        )  # row 0: -0.2 + 0.4 - 0.4; row 1: 0; the mean of both
        k3 = sum(math.exp(-d) - 1 + d for d in (-0.2, 0.4, -0.4)) / 2
        assert metrics["kl/k3_per_response"] == pytest.approx(k3, rel=1e-5)
        assert metrics["kl/penalty_per_response"] >= 0.0


def test_tokens_of_an_older_adapter_count_by_their_truncated_ratio() -> None:
    """w = min(exp(old - behaviour), 2): behaviour is 0 here, so exp(.2), exp(-.4), exp(.4); with a cap of 1.3 the last is cut."""
    stale = config(placement="split", max_staleness=1, importance_sampling_cap=1.3)
    experience, metrics = make_experience(*parts(), stale, 0.0, RunningMoments())
    assert experience.token_weights is not None
    row = torch.tensor([math.exp(0.2), math.exp(-0.4), 1.3, 0.0])
    assert torch.allclose(experience.token_weights[0], row)
    assert torch.allclose(experience.token_weights[1], MASK[1].float())
    assert metrics["sampler/importance_weight"] == pytest.approx((float(row.sum()) + 2) / 5)
    assert metrics["sampler/importance_clipped"] == pytest.approx(1 / 5)
    weighted = float(row[:3] @ torch.tensor([0.2, -0.4, 0.4])) / 2
    assert metrics["kl/k1_per_response"] == pytest.approx(weighted), "k1 as the loss weighs its tokens; it was 0.1"
    other_engine = config(rollout={"engine": "vllm"}, importance_sampling_cap=1.3)
    same, _ = make_experience(*parts(), other_engine, 0.0, RunningMoments())
    assert same.token_weights is not None and torch.equal(same.token_weights, experience.token_weights)
    fresh, without = make_experience(*parts(), config(), 0.0, RunningMoments())
    assert fresh.token_weights is None and "sampler/importance_weight" not in without
    assert torch.equal(fresh.advantages, experience.advantages), "advantages are not weighted, losses are"


def test_after_a_reset_of_the_reference_the_penalty_is_against_it_and_the_start_is_measured_beside_it() -> None:
    """Row 0: old (0.2, -0.4, 0.4), the reference now equal to it, the start 0.5 lower per token: a penalty of 0, and (1.7 + 1) / 2
    nats from the start (row 1: two tokens of 0.5)."""
    rollout, scores, evaluation = parts()
    start = torch.where(MASK, evaluation.logprobs - torch.tensor([[0.5], [0.5]]), 0.0)
    start[0, 0] -= 0.2
    moved = replace(scores, ref_logprobs=evaluation.logprobs, start_logprobs=start, reference_sha256="abc")
    made = config(ref_model_sync_steps=1, kl_coef=0.05)
    experience, metrics = make_experience(rollout, moved, evaluation, made, 0.05, RunningMoments())
    free, _ = make_experience(rollout, scores, evaluation, made, 0.0, RunningMoments())
    assert metrics["kl/k1_per_response"] == metrics["kl/penalty_per_response"] == 0.0
    assert metrics["kl/start_k1_per_response"] == pytest.approx((3 * 0.5 + 0.2 + 2 * 0.5) / 2)
    assert torch.equal(experience.advantages, free.advantages), "as without a penalty"
    _, then = make_experience(rollout, scores, evaluation, made, 0.05, RunningMoments())
    assert then["kl/start_k1_per_response"] == then["kl/k1_per_response"] == pytest.approx(0.1)
