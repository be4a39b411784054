"""Held-out figures of all prompts, and of those that chose nothing apart from those that chose."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_ray.batches import Rollout, Scores
from rlhf_ray.metrics import describe
from rlhf_ray.roles.collector import Collected
from rlhf_ray.roles.heldout import held_out_metrics


def collected(row_id: list[int], reward: list[float]) -> Collected:
    """Replies of two tokens; KL (k1) of a reply is 0.2 for each unit of its prompt's number."""
    rows, ids = len(row_id), torch.tensor(row_id)
    rollout = Rollout(
        tokens=torch.zeros(rows, 4, dtype=torch.int64),
        prompt_mask=torch.ones(rows, 2, dtype=torch.bool),
        response_mask=torch.ones(rows, 2, dtype=torch.bool),
        sample_logprobs=ids[:, None].expand(rows, 2) * 0.1,
        finished=torch.ones(rows, dtype=torch.bool),
        row_id=ids,
    )
    values = torch.tensor(reward)
    return Collected(rollout, Scores(values, torch.zeros(rows, 2), ids, {"judge": 10 * values}), {})


def test_the_halves_are_those_of_the_prompts_not_of_the_places() -> None:
    """Prompts 1, 3 and 4 are set apart; the reply to prompt 2 was left out for its reward."""
    found = held_out_metrics(
        collected([0, 1, 3, 4, 5], [1.0, 2.0, 4.0, 6.0, 2.0]), [False, True, False, True, True, False], True
    )
    assert found["eval/reward"] == 1.5 and found["eval/confirm/reward"] == 4.0
    assert found["eval/reward_se"] == pytest.approx(0.5)  # 1 and 2: s = 1 / sqrt(2), n = 2
    assert found["eval/confirm/reward_se"] == pytest.approx(2 / math.sqrt(3))  # 2, 4, 6: s = 2, n = 3
    assert found["eval/reward/judge"] == 15.0 and found["eval/confirm/reward/judge"] == 40.0
    assert found["eval/confirm/reward_se/judge"] == pytest.approx(20 / math.sqrt(3))
    assert found["eval/kl_k1_per_response"] == pytest.approx(0.5)  # prompts 0 and 5
    assert found["eval/confirm/kl_k1_per_response"] == pytest.approx(0.2 * (1 + 3 + 4) / 3)
    assert found["eval/rows"] == 2.0 and found["eval/confirm/rows"] == 3.0
    assert all(describe(name) for name in found)


@pytest.mark.parametrize("confirming", [[], [False, False]])
def test_without_a_half_that_is_set_apart(confirming: list[bool]) -> None:
    found = held_out_metrics(collected([0, 1], [1.0, 2.0]), confirming, True)
    assert found["eval/reward"] == 1.5 and not [name for name in found if "confirm" in name]


def test_a_half_whose_replies_were_all_left_out_is_not_told() -> None:
    found = held_out_metrics(collected([0, 2], [1.0, 3.0]), [False, True, False], True)
    assert found["eval/reward"] == 2.0 and not [name for name in found if "confirm" in name]


def test_replies_that_are_not_drawn_from_the_whole_distribution_have_no_kl() -> None:
    found = held_out_metrics(collected([0, 2], [1.0, 3.0]), [True, False, False], False)
    assert "eval/confirm/reward" in found and not [name for name in found if "kl" in name]


def test_a_reward_that_applies_to_no_reply_has_no_metric() -> None:
    """NaN stopped the run as soon as it was written; of some of the replies the mean is theirs."""
    found = held_out_metrics(collected([0, 1], [math.nan, math.nan]), [], True)
    assert not [name for name in found if "reward" in name] and found["eval/rows"] == 2.0
    found = held_out_metrics(collected([0, 1, 2], [math.nan, 1.0, 3.0]), [], True)
    assert (found["eval/reward"], found["eval/reward/judge"], found["eval/rows"]) == (2.0, 20.0, 3.0)
    assert found["eval/reward_se"] == pytest.approx(1.0)  # of 1 and 3
    found = held_out_metrics(collected([1], [2.0]), [False, True], True)  # all that choose were left out
    assert found["eval/confirm/reward"] == 2.0 and found["eval/rows"] == 0.0 and "eval/reward" not in found
    assert all(math.isfinite(value) for value in found.values())
