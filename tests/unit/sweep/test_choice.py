"""The rule by which a sweep is decided, on numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlhf_ray.sweep.choice import choose, difference_error, frontier, pooled_deviation, score_error
from rlhf_ray.sweep.results import K1, K3, LENGTH, Setting, TrialOutcome, settings_of, standard_error_name
from rlhf_ray.sweep.trials import Trial

METRIC = "eval/reward"


def setting(name: str, scores: Sequence[float], kl: float = 1.0, length: float = 10.0, se: float = 0.1) -> Setting:
    outcomes = tuple(
        TrialOutcome(
            Trial(name, {"which": name}, seed, Path(name)),
            "done",
            first={LENGTH: 10.0},
            last={METRIC: score, K1: kl, K3: kl, LENGTH: length, "eval/reward_se": se},
        )
        for seed, score in enumerate(scores)
    )
    return Setting(name, {"which": name}, outcomes, METRIC)


def test_pooled_deviation_by_hand() -> None:
    """(1, 3) and (2, 2, 5): squares 2 and 6 over 1 + 2 degrees of freedom."""
    assert pooled_deviation([[1, 3], [2, 2, 5]]) == pytest.approx(math.sqrt(8 / 3))
    assert pooled_deviation([[1], [7]]) is None


def test_standard_errors() -> None:
    a, b = setting("a", [1.0, 3.0]), setting("b", [2.0, 2.0, 5.0])
    spread = pooled_deviation([a.scores, b.scores])
    assert score_error(a, spread) == pytest.approx(math.sqrt(8 / 3 / 2))
    assert difference_error(a, b, spread) == pytest.approx(math.sqrt(8 / 3 * (1 / 2 + 1 / 3)))
    assert score_error(setting("c", [1.0, 1.0], se=0.3), None) == pytest.approx(0.3 / math.sqrt(2)), "from the prompts"


def test_the_highest_score_within_the_caps_wins() -> None:
    best, capped, long = (
        setting("best", [2.0, 2.02]),
        setting("kl", [5.0, 5.02], kl=9),
        setting("long", [4.0, 4.02], length=31),
    )
    poor = setting("poor", [1.0, 1.02])
    choice = choose([poor, capped, long, best], kl_cap=5.0, length_ratio=3.0)
    assert choice.winner is best and choice.trial is best.outcomes[1]
    assert {s.name: why for s, why in choice.excluded} == {
        "kl": "KL 9 nats is over the cap of 5",
        "long": "replies became 3.1 times as long, beyond the ratio of 3",
    }
    assert choice.ties == () and choice.by == "seeds"
    assert choose([poor, capped, long, best], None, None).winner is capped
    assert choose([setting("short", [1.0], length=4)], None, 2.0).winner is None, "shrinking counts as well"


def test_what_is_not_clearly_worse_is_a_tie() -> None:
    """Deviation 1 between seeds: a difference of two means of two has the error 1, so 1.9 is a tie, and 2.1 is not."""
    top = setting("top", [10 - math.sqrt(0.5), 10 + math.sqrt(0.5)])
    near = setting("near", [8.1 - math.sqrt(0.5), 8.1 + math.sqrt(0.5)])
    far = setting("far", [7.9 - math.sqrt(0.5), 7.9 + math.sqrt(0.5)])
    choice = choose([far, near, top], None, None)
    assert choice.winner is top and [s.name for s in choice.ties] == ["near"]
    assert choice.error == pytest.approx(1 / math.sqrt(2))


def test_one_seed_each_is_judged_by_its_prompts() -> None:
    choice = choose([setting("a", [1.0], se=0.1), setting("b", [0.8], se=0.1), setting("c", [0.6], se=0.1)], None, None)
    assert choice.by == "prompts" and [s.name for s in choice.ties] == ["b"], "0.2 is less than 2 x 0.141, 0.4 is more"


def test_nothing_admitted() -> None:
    choice = choose([setting("a", [1.0], kl=9)], 5.0, None)
    assert choice.winner is None and choice.trial is None and len(choice.excluded) == 1
    assert choose([], None, None).winner is None


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
