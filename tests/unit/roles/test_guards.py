"""What a run leaves out, what it counts, and when it stops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlhf_ray.batches import Rollout, Scores
from rlhf_ray.config import PPOConfig
from rlhf_ray.errors import InvariantError
from rlhf_ray.roles.collector import Collected
from rlhf_ray.roles.guards import Guards, StopTraining


def collected(rows: int = 40, bad: tuple[int, ...] = (), **changes: Any) -> Collected:
    rollout = Rollout(
        tokens=torch.arange(rows * 4).view(rows, 4),
        prompt_mask=torch.ones(rows, 2, dtype=torch.bool),
        response_mask=torch.ones(rows, 2, dtype=torch.bool),
        sample_logprobs=torch.zeros(rows, 2),
        finished=torch.ones(rows, dtype=torch.bool),
        row_id=torch.arange(rows),
    )
    reward = torch.arange(rows, dtype=torch.float32)
    reward[list(bad)] = math.inf
    scores = Scores(reward, torch.zeros(rows, 2), torch.arange(rows), {"mine": reward.clone()})
    return Collected(rollout, replace(scores, **changes), {})


def job(**changes: Any) -> PPOConfig:
    fields = {"output_dir": "x", "model_name_or_path": "m", "data": {"train": "p"}, "rewards": [{"function": "f.py:f"}]}
    return PPOConfig(**{**fields, **changes})


class TestRewards:
    """Fault 6."""

    def test_sound_ones_are_passed_on_as_they_are(self) -> None:
        given = collected()
        assert Guards().sound(given, 1, 1) is given

    def test_two_of_forty_are_left_out_with_their_replies(self) -> None:
        found = Guards().sound(collected(bad=(3, 17)), 1, 1)
        left = [i for i in range(40) if i not in (3, 17)]
        assert found.rollout.row_id.tolist() == found.scores.row_id.tolist() == left
        assert found.scores.reward.tolist() == [float(i) for i in left]
        assert found.rollout.tokens[:, 0].tolist() == [4 * i for i in left]
        assert found.faults == {"faults/rewards_left_out": 2.0}

    def test_an_evaluation_keeps_replies_that_no_reward_applies_to(self) -> None:
        """And still leaves out, or stops at, those whose reward is broken."""
        unasked = torch.full((40,), math.nan)
        given = collected(reward=unasked, parts={"mine": unasked.clone()})
        assert Guards().sound(given, 1, 0, counts=False) is given
        with pytest.raises(StopTraining, match="no reward applies"):
            Guards().sound(given, 1, 1)
        broken = unasked.clone()
        broken[7] = math.inf  # of one reward; the other one has its opposite, and the sum is NaN
        found = Guards().sound(collected(reward=unasked, parts={"mine": broken}), 1, 0, counts=False)
        assert found.rollout.row_id.tolist() == [i for i in range(40) if i != 7]

    def test_replies_that_are_compared_with_each_other_go_together(self) -> None:
        found = Guards().sound(collected(bad=(5,)), 4, 1)
        assert found.rollout.row_id.tolist() == [0, 1, 2, 3, *range(8, 40)]
        assert found.faults == {"faults/rewards_left_out": 4.0}

    def test_more_than_five_in_a_hundred_stop_the_run(self) -> None:
        with pytest.raises(
            StopTraining, match=r"step 9: reward mine is not finite for 3 of 40 replies \(first row 1\); exp"
        ):
            Guards().sound(collected(bad=(1, 2, 3)), 1, 9)

    def test_what_a_watching_reward_has_no_number_for_costs_nothing(self) -> None:
        """Of weight 0: the scorer leaves it NaN where it is broken. It stopped training, and took replies with it."""
        given = collected()
        watched = replace(given, scores=replace(given.scores, parts={"watcher": torch.full((40,), math.nan)}))
        assert Guards().sound(watched, 1, 1) is watched

    def test_replies_to_which_no_reward_applies_are_counted_as_such(self) -> None:
        none = torch.arange(40.0)
        none[:3] = math.nan
        with pytest.raises(StopTraining, match=r"step 1: no reward applies \(all say None\) for 3 of 40 replies"):
            Guards().sound(collected(reward=none, parts={"mine": none}), 1, 1)

    def test_one_of_the_only_prompt_stops_the_run(self) -> None:
        """All replies are compared with it: none would be left."""
        with pytest.raises(
            StopTraining, match=r"step 1: reward mine is not finite for 1 of 40 .*, and all others are of the"
        ):
            Guards().sound(collected(bad=(5,)), 40, 1)

    def test_three_steps_in_a_row_stop_the_run_and_a_good_one_between_does_not(self) -> None:
        guards = Guards()
        for step, bad in enumerate([(1,), (2,), (), (3,), (4,)]):
            guards.sound(collected(bad=bad), 1, step)
        guards.sound(collected(bad=(1,)), 1, 5, counts=False)  # an evaluation is no step
        with pytest.raises(StopTraining, match=r"\(first row 7\), in 3 steps in a row"):
            guards.sound(collected(bad=(7,)), 1, 5)

    def test_an_infinite_reference_is_as_bad(self) -> None:
        reference = torch.zeros(40, 2)
        reference[8, 1] = -math.inf
        assert 8 not in Guards().sound(collected(ref_logprobs=reference), 1, 1).rollout.row_id.tolist()

    def test_they_are_matched_by_row_never_by_place(self) -> None:
        with pytest.raises(
            InvariantError, match=r"step 2: rewards are of other replies; expected rows 0, 1, 2, 3, 4, ..."
        ):
            Guards().sound(collected(row_id=torch.arange(40).flip(0)), 1, 2)


class TestUpdates:
    """Fault 20."""

    def test_the_third_in_a_row_stops_the_run(self) -> None:
        guards = Guards()
        for finite in (False, False, True, False, False):
            guards.note_update(finite, {"policy": math.nan, "value": 1.0}, 4)
        with pytest.raises(
            StopTraining, match=r"step 5: 3 updates in a row .* not finite .*; got policy nan, value 1; fix: "
        ):
            guards.note_update(False, {"policy": math.nan, "value": 1.0}, 5)


class TestLimits:
    """Fault 22."""

    @pytest.mark.parametrize(
        ("limit", "metric", "fine", "beyond"),
        [
            ({"max_kl": 10.0}, "kl/k1_per_response", 10.0, 10.5),
            ({"max_clip_fraction": 0.3}, "policy/clip_fraction", 0.3, 0.31),
            ({"min_finished": 0.5}, "response/finished", 0.5, 0.49),
        ],
    )
    def test_beyond_it_the_run_stops_with_both_figures(
        self, limit: dict[str, float], metric: str, fine: float, beyond: float
    ) -> None:
        Guards().check(job(**limit), {metric: fine}, 1)
        Guards().check(job(), {metric: beyond}, 1)
        [(name, bound)] = limit.items()
        with pytest.raises(
            StopTraining, match=rf"step 3: {metric} is beyond {name}: .* {bound:g}; got {beyond:g}"
        ) as caught:
            Guards().check(job(**limit), {metric: beyond}, 3)
        assert caught.value.saves

    def test_after_a_reset_of_the_reference_max_kl_still_counts_from_the_start(self) -> None:
        """k1 against the reference falls to 0 with each reset: a limit that read it would never be reached."""
        figures = {"kl/k1_per_response": 0.1, "kl/start_k1_per_response": 12.0}
        with pytest.raises(StopTraining, match=r"kl/start_k1_per_response is beyond max_kl: .* 10; got 12"):
            Guards().check(job(max_kl=10.0, ref_model_sync_steps=2), figures, 3)

    def test_over_optimisation_is_judged_by_the_reward_that_watches(self) -> None:
        """What is maximised may rise and rise."""
        rewards = [{"name": "proxy", "function": "f.py:f"}, {"name": "gold", "function": "f.py:g", "weight": 0.0}]
        config, guards = job(over_optimisation_patience=1, rewards=rewards, watch="gold"), Guards()
        names = ("eval/reward", "eval/reward/gold", "eval/reward_se/gold", "eval/kl_k1_per_response")
        guards.check(config, dict(zip(names, (1.0, 0.5, 0.1, 3.0))), 1)
        with pytest.raises(StopTraining, match=r"eval/reward/gold near 0.5 \(at 3 nats per reply\); got 0.2 at 8 nats"):
            guards.check(config, dict(zip(names, (2.0, 0.2, 0.1, 8.0))), 2)

    def test_over_optimisation_is_a_worse_reward_at_a_larger_kl_again_and_again(self) -> None:
        config, guards = job(over_optimisation_patience=2), Guards()

        def evaluate(reward: float, kl: float, step: int = 1) -> None:
            found = {"eval/reward": reward, "eval/reward_se": 0.1, "eval/kl_k1_per_response": kl}
            guards.check(config, found, step)

        evaluate(1.0, 5.0)
        evaluate(0.85, 9.0)  # within two standard errors of the best
        evaluate(0.7, 9.0)
        evaluate(0.7, 4.0)  # worse, but no further away
        evaluate(0.7, 9.0)
        kept = Guards()
        kept.load_state_dict(guards.state_dict())
        assert kept == guards
        with pytest.raises(
            StopTraining, match=r"step 8: over-optimisation: 2 evaluations .* near 1 .*; got 0.6 at 12 nats"
        ):
            evaluate(0.6, 12.0, 8)
