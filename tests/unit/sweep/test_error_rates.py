"""How often a sweep says what is not so, by seeded simulation of the whole rule: scores in, verdicts of settings.csv out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from rlhf_ray.sweep.choice import choose
from rlhf_ray.sweep.record import setting_row
from rlhf_ray.sweep.results import K1, K3, LENGTH, Setting, TrialOutcome
from rlhf_ray.sweep.trials import Trial

METRIC = "eval/reward"
SETTINGS = 11


def sweep_of(scores: torch.Tensor, confirming: torch.Tensor | None = None) -> list[Setting]:
    """scores: f64[settings, seeds].   confirming: the same on the prompts that choose nothing."""
    same = {K1: 1.0, K3: 1.0, LENGTH: 10.0, "eval/reward_se": 0.1}
    confirming = scores if confirming is None else confirming
    settings = []
    for name, row in enumerate(torch.stack([scores, confirming], dim=2).tolist()):
        outcomes = tuple(
            TrialOutcome(
                Trial(f"c{name}", {}, seed, Path()),
                "done",
                first={LENGTH: 10.0},
                last={METRIC: score, "eval/confirm/reward": other, **same},
            )
            for seed, (score, other) in enumerate(row)
        )
        settings.append(Setting(f"c{name}", {}, outcomes, METRIC))
    return settings


def called_worse(scores: torch.Tensor) -> list[int]:
    settings = sweep_of(scores)
    choice = choose(settings, None, None)
    return [i for i, s in enumerate(settings) if setting_row(s, choice, settings)["verdict"] == "worse"]


def simulated(
    seeds: int, count: int, means: Sequence[float], deviations: Sequence[float], block: float
) -> list[list[int]]:
    """The settings that are called worse, in each of `count` sweeps. block: deviation of what a seed adds to all settings."""
    generator = torch.Generator().manual_seed(1000 * seeds + len(means))
    found = []
    for _ in range(count):
        noise = torch.randn(len(means), seeds, generator=generator, dtype=torch.float64)
        shared = torch.randn(1, seeds, generator=generator, dtype=torch.float64)
        mean, deviation = (torch.tensor(v, dtype=torch.float64)[:, None] for v in (means, deviations))
        found.append(called_worse(mean + deviation * noise + block * shared))
    return found


def at_most(rate: float, count: int) -> float:
    """The rate and three standard errors of a simulation of it."""
    return rate + 3 * math.sqrt(rate * (1 - rate) / count)


@pytest.mark.parametrize("block", [0.0, 5.0])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_equal_settings_are_rarely_called_worse(seeds: int, block: float) -> None:
    """11 equal settings: two standard errors of each difference called at least one of them worse in 65 % of such sweeps."""
    count = 400
    found = simulated(seeds, count, [0.0] * SETTINGS, [1.0] * SETTINGS, block)
    assert sum(map(bool, found)) / count <= at_most(0.05, count)


def test_one_setting_that_scatters_three_times_as_much() -> None:
    """Five seeds: the spread of all settings alone would err in 15 % of such sweeps."""
    count = 400
    found = simulated(5, count, [0.0] * SETTINGS, [3.0] + [1.0] * (SETTINGS - 1), 1.0)
    assert sum(map(bool, found)) / count <= at_most(0.05, count)


@pytest.mark.parametrize(("seeds", "power"), [(2, 0.5), (3, 0.75), (5, 0.97)])
def test_what_is_worse_by_four_deviations_is_found(seeds: int, power: float) -> None:
    """One setting is better than ten others by four standard deviations between seeds: the share of the ten that is called worse,
    as sweep/README.md says. With a block effect as large as that: it is taken out."""
    count = 200
    found = simulated(seeds, count, [4.0] + [0.0] * (SETTINGS - 1), [1.0] * SETTINGS, 4.0)
    shares = [len([i for i in worse if i]) / (SETTINGS - 1) for worse in found]
    assert all(0 not in worse for worse in found)
    spread = torch.tensor(shares, dtype=torch.float64).std().item() / math.sqrt(count)
    assert sum(shares) / count == pytest.approx(power, abs=0.02 + 3 * spread)


def test_one_seed_each_by_its_prompts() -> None:
    """Differences of prompt noise alone, errors 0.1 as recorded."""
    generator, count = torch.Generator().manual_seed(1), 400
    found = [
        called_worse(0.1 * torch.randn(SETTINGS, 1, generator=generator, dtype=torch.float64)) for _ in range(count)
    ]
    assert sum(map(bool, found)) / count <= at_most(0.05, count)


def test_the_promoted_seed_is_the_median_one() -> None:
    """What is promoted lies where another seed would: half of its setting's seeds are no better, half no worse."""
    scores = torch.tensor([[3.0, 9.0, 5.0, 4.0, 8.0], [1.0, 1.1, 1.2, 1.3, 1.4]], dtype=torch.float64)
    promoted = choose(sweep_of(scores), None, None).trial
    assert promoted is not None and promoted.last[METRIC] == 5.0
    two = choose(sweep_of(torch.tensor([[3.0, 9.0], [1.0, 1.1]], dtype=torch.float64)), None, None).trial
    assert two is not None and two.last[METRIC] == 3.0, "the lower of two"


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_confirmed_score_is_not_inflated(seeds: int) -> None:
    """11 equal settings of value 0, measured on two halves of the prompts with noise 1. On the half that chose, the winner's score
    lies 1.586 of its standard errors too high, the mean of the largest of 11 standard normals. On the other half neither it nor the
    score of the promoted seed is too high."""
    generator, count, error = torch.Generator().manual_seed(seeds), 500, 1 / math.sqrt(seeds)
    chose, confirmed, promoted = [], [], []
    for _ in range(count):
        one, other = torch.randn(2, SETTINGS, seeds, generator=generator, dtype=torch.float64)
        choice = choose(sweep_of(one, other), None, None)
        assert choice.winner is not None and choice.confirmed is not None
        chose.append(choice.winner.score / error)
        confirmed.append(choice.confirmed.score / error)
        promoted.append(choice.confirmed.trial_score)
    tolerance = 3 / math.sqrt(count)
    assert sum(chose) / count == pytest.approx(1.586, abs=tolerance)
    assert sum(confirmed) / count == pytest.approx(0, abs=tolerance)
    assert sum(promoted) / count == pytest.approx(0, abs=tolerance)
