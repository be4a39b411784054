"""Which setting wins a sweep, by a stated rule, and how sure that is.

Admitted are settings of which as many trials came to their end as of any other (a mean over survivors flatters), whose mean KL is
within the cap and whose replies kept their length within the ratio. The winner is the admitted setting with the highest mean score
over its seeds. Another setting is called worse only if the difference is more than two standard errors, from the spread between
seeds pooled over all settings (one-way analysis of variance); with one seed each, from the held-out prompts alone, which says
nothing about what another seed would give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_ray.sweep.results import K1, Setting, TrialOutcome

CLEAR = 2.0
"""Standard errors of a difference that is called a difference."""


@dataclass(frozen=True)
class Choice:
    """winner: None if no setting is admitted.  trial: its best seed.  ties: admitted settings that are not clearly worse.
    excluded: (setting, why).  error: standard error of the winner's score.  by: what it was estimated from."""

    winner: Setting | None
    trial: TrialOutcome | None
    ties: tuple[Setting, ...]
    excluded: tuple[tuple[Setting, str], ...]
    error: float
    by: str


def choose(settings: Sequence[Setting], kl_cap: float | None, length_ratio: float | None) -> Choice:
    """Apply the rule above."""
    whole = {s.name for s in _whole(settings)}
    excluded = [(s, why) for s in settings if (why := _objection(s, s.name in whole, kl_cap, length_ratio))]
    out = {s.name for s, _ in excluded}
    admitted = sorted((s for s in settings if s.name not in out), key=lambda s: -s.score)
    spread = pooled_deviation([s.scores for s in settings])
    by = "seeds" if spread is not None else "prompts"
    if not admitted:
        return Choice(None, None, (), tuple(excluded), math.nan, by)
    winner = admitted[0]
    ties = [s for s in admitted[1:] if not winner.score - s.score > CLEAR * difference_error(winner, s, spread)]
    best = max(winner.outcomes, key=lambda o: o.last[winner.metric])
    return Choice(winner, best, tuple(ties), tuple(excluded), score_error(winner, spread), by)


def _whole(settings: Sequence[Setting]) -> list[Setting]:
    """Those of which the most trials came to their end."""
    most = max((len(s.outcomes) for s in settings), default=0)
    return [s for s in settings if len(s.outcomes) == most]


def _objection(setting: Setting, whole: bool, kl_cap: float | None, length_ratio: float | None) -> str:
    if not whole:
        return f"fewer of its trials finished: {setting.missing}"
    kl, ratio = setting.mean(K1), setting.length_ratio
    if kl_cap is not None and not kl <= kl_cap:
        return f"KL {kl:.3g} nats is over the cap of {kl_cap:g}"
    if length_ratio is not None and not 1 / length_ratio <= ratio <= length_ratio:
        return f"replies became {ratio:.2g} times as long, beyond the ratio of {length_ratio:g}"
    return ""


def pooled_deviation(groups: Sequence[Sequence[float]]) -> float | None:
    """sqrt(sum_g sum_i (x_gi - mean_g)^2 / sum_g (n_g - 1)): spread between seeds, over all settings; None with one seed each."""
    freedom = sum(len(g) - 1 for g in groups)
    if freedom == 0:
        return None
    squares = math.fsum((x - math.fsum(g) / len(g)) ** 2 for g in groups for x in g)
    return math.sqrt(squares / freedom)


def score_error(setting: Setting, spread: float | None) -> float:
    """Standard error of a setting's mean score. spread: of `pooled_deviation`."""
    return setting.prompt_error if spread is None else spread / math.sqrt(len(setting.outcomes))


def difference_error(one: Setting, other: Setting, spread: float | None) -> float:
    """Standard error of the difference of two mean scores, taken as independent."""
    return math.hypot(score_error(one, spread), score_error(other, spread))


def frontier(settings: Sequence[Setting]) -> list[Setting]:
    """The settings, of those with the most finished trials, that no other beats: more score at no more KL. In order of KL."""
    kept: list[Setting] = []
    for setting in sorted(_whole(settings), key=lambda s: (s.mean(K1), -s.score)):
        if not kept or setting.score > kept[-1].score:
            kept.append(setting)
    return kept
