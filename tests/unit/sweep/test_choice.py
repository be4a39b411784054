"""The rule by which a sweep is decided, on numbers worked out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_ray.config import SweepConfig
from rlhf_ray.maths.standard_errors import pooled_deviation
from rlhf_ray.sweep.choice import choose, comparison_sentence, confirmation_sentence, frontier, score_error
from rlhf_ray.sweep.record import choice_record, setting_row
from rlhf_ray.sweep.report import sentence, settings_table
from rlhf_ray.sweep.results import K1, K3, LENGTH, Setting, TrialOutcome, settings_of, standard_error_name
from rlhf_ray.sweep.trials import Trial

METRIC = "eval/reward"


def setting(
    name: str,
    scores: Sequence[float],
    kl: float = 1.0,
    length: float = 10.0,
    se: float = 0.1,
    seeds: Sequence[int] = (0, 1, 2),
) -> Setting:
    outcomes = tuple(
        TrialOutcome(
            Trial(name, {"which": name}, seed, Path(name)),
            "done",
            first={LENGTH: 10.0},
            last={METRIC: score, K1: kl, K3: kl, LENGTH: length, "eval/reward_se": se},
        )
        for seed, score in zip(seeds, scores)
    )
    return Setting(name, {"which": name}, outcomes, METRIC)


def test_standard_errors() -> None:
    a, b = setting("a", [1.0, 3.0]), setting("b", [2.0, 2.0, 5.0])
    spread = pooled_deviation([a.scores, b.scores])
    assert score_error(a, spread) == pytest.approx(math.sqrt(8 / 3 / 2))
    assert score_error(setting("c", [1.0, 1.0], se=0.3), None) == pytest.approx(0.3 / math.sqrt(2)), "from the prompts"


def test_the_highest_score_within_the_caps_wins() -> None:
    best, capped, long = (
        setting("best", [2.0, 2.02]),
        setting("kl", [5.0, 5.02], kl=9),
        setting("long", [4.0, 4.02], length=31),
    )
    poor = setting("poor", [1.0, 1.02])
    choice = choose([poor, capped, long, best], kl_cap=5.0, length_ratio=3.0)
    assert choice.winner is best and choice.trial is best.outcomes[0], "the median seed: the lower of two"
    assert {s.name: why for s, why in choice.excluded} == {
        "kl": "KL 9 nats is over the cap of 5",
        "long": "replies became 3.1 times as long, beyond the ratio of 3",
    }
    assert choice.not_worse == () and choice.by == "seeds as blocks"
    assert comparison_sentence(choice) == (
        "The other setting was shown to be worse (95% confidence, each ran with the same seeds)."
    )
    assert choose([poor, capped, long, best], None, None).winner is capped
    assert choose([setting("short", [1.0], length=4)], None, 2.0).winner is None, "shrinking counts as well"


def test_two_settings_with_the_same_seeds_are_the_paired_t_test() -> None:
    """Differences 11 and 13: mean 12, error 1, and t(1) is above 12.706 in 5 % of cases. 13 is beyond it, whatever the seeds add
    to both."""
    for shift, worse in ((0.0, False), (1.0, True)):
        top, low = setting("top", [50.0 + shift + 11, 13.0 + shift]), setting("low", [50.0, 0.0])
        choice = choose([low, top], None, None)
        assert choice.winner is top and choice.by == "seeds as blocks"
        assert [s.name for s in choice.not_worse] == ([] if worse else ["low"])
        t = 12 + shift
        assert choice.p == {"low": pytest.approx(1 - 2 * math.atan(t) / math.pi, abs=1e-9)}


def test_settings_that_lost_different_seeds_are_not_in_blocks() -> None:
    """(0, 2) of seeds 0 and 1, (4, 6) of seeds 0 and 2: the t test of two groups, t = 2 sqrt(2) with two degrees of freedom."""
    low, top = setting("low", [0.0, 2.0]), setting("top", [4.0, 6.0], seeds=(0, 2))
    choice = choose([low, top], None, None)
    t = 2 * math.sqrt(2)
    assert choice.by == "seeds"
    assert choice.p == {"low": pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-9)}
    assert comparison_sentence(choice) == (
        "The other setting was not shown to be worse (95% confidence, seeds taken as independent)."
    )


def test_what_is_excluded_is_not_compared() -> None:
    """Neither its spread nor its place in the count of comparisons has a say."""
    pair = [setting("top", [61.0, 13.0]), setting("low", [50.0, 0.0])]
    alone, beside = choose(pair, 5.0, None), choose([*pair, setting("far", [900.0, -900.0], kl=9.0)], 5.0, None)
    assert beside.p == alone.p and beside.compared == 2


def test_one_seed_each_is_judged_by_its_prompts() -> None:
    """Errors 0.1 each, three settings: a difference of 3.314 x 0.1 is the 5 % point of the range."""
    scores = {"a": 1.0, "b": 1.0 - 0.33, "c": 1.0 - 0.333}
    choice = choose([setting(name, [score], se=0.1) for name, score in scores.items()], None, None)
    assert choice.by == "prompts" and [s.name for s in choice.not_worse] == ["b"]
    assert "another seed may order them otherwise" in comparison_sentence(choice)


def test_unknown_errors_show_nothing() -> None:
    choice = choose([setting("a", [1.0], se=math.nan), setting("b", [0.0], se=0.1)], None, None)
    assert [s.name for s in choice.not_worse] == ["b"] and "no setting was shown to be worse" in comparison_sentence(
        choice
    )
    assert comparison_sentence(choose([setting("a", [1.0])], None, None)) == "", "nothing to compare with"


def test_errors_that_are_not_known_are_told_as_such(tmp_path: Path) -> None:
    """One prompt has no standard error: the tables hold null, and the page leaves it out."""
    settings = [
        with_confirmed(setting(name, [score], se=math.nan), [score]) for name, score in (("a", 1.0), ("b", 0.5))
    ]
    choice = choose(settings, None, None)
    config = SweepConfig(output_dir=str(tmp_path), model_name_or_path="m", ppo={}, space={"which": ["a", "b"]})
    found = choice_record(choice, config)
    rows = [setting_row(s, choice, settings) for s in settings]
    json.dumps([found, rows], allow_nan=False)
    assert (found["score_se"], rows[1]["p_equal"]) == (None, None)
    assert f"which a has the highest mean: {METRIC} 1.00, KL" in sentence(config, choice)
    assert "nan" not in str(settings_table(settings, choice))


def test_nothing_admitted() -> None:
    choice = choose([setting("a", [1.0], kl=9)], 5.0, None)
    assert choice.winner is None and choice.trial is None and len(choice.excluded) == 1
    assert choose([], None, None).winner is None


def with_confirmed(given: Setting, scores: Sequence[float]) -> Setting:
    """The same trials, with what prompts that chose nothing say of them."""
    outcomes = tuple(
        replace(o, last={**o.last, "eval/confirm/reward": s, "eval/confirm/reward_se": 0.2, "eval/confirm/rows": 20.0})
        for o, s in zip(given.outcomes, scores)
    )
    return replace(given, outcomes=outcomes)


def test_the_winner_is_confirmed_where_nothing_was_chosen() -> None:
    """Prompts that confirm have no say: the setting that is better there does not win. There (0.5, 0.7, 0.9) and (3, 3, 3) have the
    squares 0.08 and 0 over four degrees of freedom, so a mean of three has the error sqrt(0.02 / 3)."""
    top = with_confirmed(setting("top", [2.0, 4.0, 3.0]), [0.5, 0.7, 0.9])
    other = with_confirmed(setting("other", [1.0, 1.0, 1.0]), [3.0, 3.0, 3.0])
    choice = choose([top, other], None, None)
    assert choice.winner is top and choice.trial is top.outcomes[2], "3 is the median of 2, 4, 3"
    found = choice.confirmed
    assert found is not None and (found.metric, found.rows) == ("eval/confirm/reward", 20)
    assert (found.score, found.trial_score, found.trial_error) == (pytest.approx(0.7), 0.9, 0.2)
    assert found.error == pytest.approx(math.sqrt(0.02 / 3))
    assert confirmation_sentence(choice) == (
        "On 20 held-out prompts that chose nothing: 0.700 over its seeds, 0.900 ± 0.200 by the median seed, 2, which is the one to"
        " promote."
    )


def test_a_winner_that_was_not_confirmed_says_so() -> None:
    """One trial without the figure is enough: trials of a sweep of before it."""
    top = setting("top", [2.0, 4.0, 3.0])
    part = with_confirmed(top, [0.5, 0.7])
    assert len(part.outcomes) == 2
    mixed = replace(top, outcomes=(*part.outcomes, top.outcomes[2]))
    for given in (top, mixed):
        choice = choose([given], None, None)
        assert choice.confirmed is None and "its score is likely too high" in confirmation_sentence(choice)
    assert confirmation_sentence(choose([], None, None)) == ""


def test_the_frontier_has_no_setting_that_another_beats() -> None:
    points = [("a", 1.0, 1.0), ("b", 2.0, 3.0), ("c", 3.0, 2.0), ("d", 4.0, 4.0), ("e", 1.0, 0.5)]
    found = frontier([setting(name, [score], kl=kl) for name, kl, score in points])
    assert [s.name for s in found] == ["a", "b", "d"]


def test_settings_are_made_of_finished_trials_alone() -> None:
    done = setting("a", [1.0]).outcomes[0]
    stopped = TrialOutcome(Trial("a", {}, 1, Path("x")), "stopped", last={METRIC: 9.0})
    assert settings_of([done, stopped], METRIC)[0].scores == [1.0]


@pytest.mark.parametrize(
    ("metric", "error"),
    [
        ("eval/reward", "eval/reward_se"),
        ("eval/reward/judge", "eval/reward_se/judge"),
        ("eval/finished", "eval/finished_se"),
        ("eval/confirm/reward", "eval/confirm/reward_se"),
        ("eval/confirm/reward/judge", "eval/confirm/reward_se/judge"),
    ],
)
def test_names_of_standard_errors(metric: str, error: str) -> None:
    assert standard_error_name(metric) == error


def test_a_setting_that_lost_a_trial_cannot_win() -> None:
    """The mean over the trials that survived flatters; so it is neither chosen nor on the frontier, and the table says why."""
    lucky = setting("lucky", [9.0, 9.1])
    lost = TrialOutcome(Trial("lucky", {"which": "lucky"}, 2, Path("x")), "stopped", "beyond max_kl")
    outcomes = [*lucky.outcomes, lost, *setting("steady", [1.0, 1.1, 1.2]).outcomes]
    settings = settings_of(outcomes, METRIC)
    choice = choose(settings, None, None)
    assert choice.winner is not None and choice.winner.name == "steady"
    assert [why for _, why in choice.excluded] == ["fewer of its trials finished: seed 2 stopped"]
    assert [s.name for s in frontier(settings)] == ["steady"]
    both_lost = settings_of([*lucky.outcomes, lost, *setting("steady", [1.0, 1.1]).outcomes], METRIC)
    chosen = choose(both_lost, None, None).winner
    assert chosen is not None and chosen.name == "lucky", "where no setting is whole, those with the most are compared"


def test_a_cap_on_what_was_not_measured_says_so() -> None:
    """Greedy evaluations measure no KL; a sweep of an older version may have no evaluation before training."""
    measured = setting("a", [1.0])
    unknown = replace(measured, outcomes=(replace(measured.outcomes[0], first={}, last={METRIC: 1.0, LENGTH: 30.0}),))
    config = SweepConfig(output_dir="s", model_name_or_path="m", ppo={}, space={"which": ["a", "b"]})
    caps = "mean KL (k1) at most 10 nats{0}, reply length within 2 times of what it was{0}"
    for given, told in ((measured, ""), (unknown, " (not measured)")):
        choice = choose([given], config.kl_cap, config.length_ratio)
        assert choice.winner is given and choice_record(choice, config)["rule"].endswith(caps.format(told))
