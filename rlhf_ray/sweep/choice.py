"""Which setting wins a sweep, by a stated rule, and how sure that is.

Admitted are settings of which as many trials came to their end as of any other (a mean over survivors flatters), whose mean KL is
within the cap and whose replies kept their length within the ratio. The winner is the admitted setting with the highest mean score
over its seeds. What is promoted of it is its median seed, since the best seed of the best setting was picked for its luck twice.

The winner's score is too high for having been picked. Its confirmed score is that of the same trials on the half of the held-out
prompts that picked nothing (eval/confirm/*): the luck of the prompts is not in it, and the trials that are there are as good as it
says. The luck of the seeds is in it as far as it is read as what another seed of that setting would give.

Another admitted setting is called worse only if, all admitted settings being equal, less than 5 % of sweeps would put any of them
as far below the winner (maths/comparisons.py: the studentized range, which knows that the winner was picked because it is highest).
The spread is that between seeds, after what a seed adds to all settings is taken out where they ran with the same seeds. With one
seed each it is that of the held-out prompts alone, which says nothing about what another seed would give. A setting that is not
called worse was not shown to be worse, which is not the same as being as good.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rlhf_ray.maths.comparisons import worse_than_best, worse_than_best_by_errors
from rlhf_ray.maths.standard_errors import error_of_mean, pooled_deviation
from rlhf_ray.metrics import confirm_name, figure, standard_error_name
from rlhf_ray.sweep.results import K1, ROWS, Setting, TrialOutcome

CONFIDENCE = 0.95
"""That no setting of a sweep is called worse than the winner without being so."""
Spread = Literal["seeds as blocks", "seeds", "prompts"]


@dataclass(frozen=True)
class Confirmed:
    """The winner where nothing was chosen. score: mean over its seeds.  error: its standard error, as that of `Choice.error`.
    trial_score, trial_error: of the promoted trial, the error over prompts.  rows: prompts; the fewest of a trial."""

    metric: str
    score: float
    error: float
    trial_score: float
    trial_error: float
    rows: int


@dataclass(frozen=True)
class Choice:
    """winner: None if no setting is admitted.  trial: its median seed, the lower one of two.  not_worse: admitted settings that are
    not shown to be worse.  p: for each of the others the chance of such a distance if all were equal, adjusted for all comparisons.
    excluded: (setting, why).  error: standard error of the winner's score.  by: the spread that was used.  confirmed: the winner on
    prompts that chose nothing; None if it was not measured there."""

    winner: Setting | None
    trial: TrialOutcome | None
    not_worse: tuple[Setting, ...]
    excluded: tuple[tuple[Setting, str], ...]
    error: float
    by: Spread
    p: Mapping[str, float] = field(default_factory=dict)
    confirmed: Confirmed | None = None

    @property
    def compared(self) -> int:
        """Admitted settings, the winner among them."""
        return len(self.p) + (self.winner is not None)


def conclusion(choice: Choice, metric: str) -> str:
    """Which setting has the highest mean `metric`, and whether it is shown to be better than others; empty without a winner.

    A setting that chance alone may have put first is not called the winner here, although it is the one to promote."""
    if choice.winner is None:
        return ""
    named = ", ".join(f"{name} {value}" for name, value in choice.winner.settings.items())
    error = f" ± {figure(choice.error)}" if math.isfinite(choice.error) else ""
    score = f"{metric} {figure(choice.winner.score)}{error}"
    if not choice.not_worse:
        return f"winner: {named}: {score}"
    others, left = len(choice.p), len(choice.not_worse)
    whom = "all others" if left < others else "the others" if others > 1 else "the other one"
    same = sum(s.score == choice.winner.score for s in choice.not_worse)
    highest = f"and {same} other{'s' * (same > 1)} have the highest mean" if same else "has the highest mean"
    return f"no setting is shown to be better than {whom}; {named} {highest}: {score}"


def confirmation_sentence(choice: Choice) -> str:
    """The winner's score where nothing was chosen; empty without a winner."""
    if choice.winner is None or choice.trial is None:
        return ""
    found, seed = choice.confirmed, choice.trial.trial.seed
    if found is None:
        return f"Not confirmed: measured only on the prompts that chose it, so its score is likely too high. Median seed: {seed}."
    over = f"{figure(found.score)} over its seeds, " if len(choice.winner.outcomes) > 1 else ""
    error = "" if math.isnan(found.trial_error) else f" ± {figure(found.trial_error)}"
    # Not known of a trial whose folder is gone, in a sweep of an older version.
    rows = f"{found.rows} " if found.rows else ""
    return (
        f"On {rows}held-out prompts that chose nothing: {over}{figure(found.trial_score)}{error} by the median seed, {seed},"
        " which is the one to promote."
    )


def comparison_sentence(choice: Choice) -> str:
    """What the comparison showed, and no more, in a sentence; empty if there was nothing to compare."""
    others, left = len(choice.p), len(choice.not_worse)
    if not others:
        return ""
    if any(map(math.isnan, choice.p.values())):
        return "No standard error is known: no setting was shown to be worse."
    seeds = {
        "seeds as blocks": "each ran with the same seeds",
        "seeds": "seeds taken as independent",
        "prompts": "from the prompts of one seed each; another seed may order them otherwise",
    }[choice.by]
    worse = "None" if left == others else "All" if not left else f"{others - left}"
    found = f"{worse} of {others} other settings shown to be worse, {left} not shown to be worse"
    if others == 1:
        found = f"The other setting was {'not ' * left}shown to be worse"
    together = f" for all verdicts together, {choice.compared} settings compared" if others > 1 else ""
    return f"{found} ({CONFIDENCE:.0%} confidence{together}, {seeds})."


def choose(settings: Sequence[Setting], kl_cap: float | None, length_ratio: float | None) -> Choice:
    """Apply the rule above."""
    whole = {s.name for s in _whole(settings)}
    excluded = [(s, why) for s in settings if (why := _objection(s, s.name in whole, kl_cap, length_ratio))]
    out = {s.name for s, _ in excluded}
    admitted = sorted((s for s in settings if s.name not in out), key=lambda s: -s.score)
    by = _spread(admitted)
    if not admitted:
        return Choice(None, None, (), tuple(excluded), math.nan, by)
    winner, *others = admitted
    p = dict(zip((s.name for s in others), _p_values(admitted, by)[1:]))
    not_worse = tuple(s for s in others if not p[s.name] < 1 - CONFIDENCE)
    error, trial = score_error(winner, pooled_deviation([s.scores for s in settings])), _median(winner)
    return Choice(winner, trial, not_worse, tuple(excluded), error, by, p, _confirmed(winner, trial, settings))


def _confirmed(winner: Setting, trial: TrialOutcome, settings: Sequence[Setting]) -> Confirmed | None:
    found = winner.confirmed()
    if found is None:
        return None
    spread = pooled_deviation([s.scores for setting in settings if (s := setting.confirmed()) is not None])
    name = found.metric
    return Confirmed(
        metric=name,
        score=found.score,
        error=score_error(found, spread),
        trial_score=trial.last[name],
        trial_error=trial.last.get(standard_error_name(name), math.nan),
        rows=int(min(o.last.get(confirm_name(ROWS), 0) for o in found.outcomes)),
    )


def _spread(admitted: Sequence[Setting]) -> Spread:
    if not any(len(s.outcomes) > 1 for s in admitted):
        return "prompts"
    return "seeds as blocks" if len({tuple(s.by_seed()) for s in admitted}) == 1 else "seeds"


def _p_values(admitted: Sequence[Setting], by: Spread) -> list[float]:
    """In the order of `admitted`."""
    if len(admitted) < 2:
        return [1.0] * len(admitted)
    if by == "prompts":
        prompts = min(o.last.get(ROWS, math.inf) for s in admitted for o in s.outcomes)
        scores, errors = [s.score for s in admitted], [s.prompt_error for s in admitted]
        return worse_than_best_by_errors(scores, errors, max(prompts - 1, 1))
    return worse_than_best([list(s.by_seed().values()) for s in admitted], by == "seeds as blocks")


def _median(setting: Setting) -> TrialOutcome:
    ordered = sorted(setting.outcomes, key=lambda o: o.last[setting.metric])
    return ordered[(len(ordered) - 1) // 2]


def _whole(settings: Sequence[Setting]) -> list[Setting]:
    """Those of which the most trials came to their end."""
    most = max((len(s.outcomes) for s in settings), default=0)
    return [s for s in settings if len(s.outcomes) == most]


def _objection(setting: Setting, whole: bool, kl_cap: float | None, length_ratio: float | None) -> str:
    if not whole:
        return f"fewer of its trials finished: {setting.missing}"
    kl, ratio = setting.mean(K1), setting.length_ratio
    if kl_cap is not None and kl > kl_cap:  # NaN where evaluations are greedy, say, and no KL is known
        return f"KL {kl:.3g} nats is over the cap of {kl_cap:g}"
    if length_ratio is not None and (
        ratio < 1 / length_ratio or ratio > length_ratio
    ):  # NaN: of a sweep before it was refused
        return f"replies became {ratio:.2g} times as long, beyond the ratio of {length_ratio:g}"
    return ""


def score_error(setting: Setting, spread: float | None) -> float:
    """Standard error of a setting's mean score. spread: of `pooled_deviation`."""
    return setting.prompt_error if spread is None else error_of_mean([spread] * len(setting.outcomes))


def frontier(settings: Sequence[Setting]) -> list[Setting]:
    """The settings, of those with the most finished trials, that no other beats: more score at no more KL. In order of KL; none
    where no KL was measured."""
    kept: list[Setting] = []
    known = [s for s in _whole(settings) if not math.isnan(s.mean(K1))]
    for setting in sorted(known, key=lambda s: (s.mean(K1), -s.score)):
        if not kept or setting.score > kept[-1].score:
            kept.append(setting)
    return kept
