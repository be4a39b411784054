"""Who wins: the judges of an evaluation, by scores of single replies or by pairs, and when a judge is no fair one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from rlhf_ray.config import EvaluateConfig, RewardSource
from rlhf_ray.data.collate import TokenisedPrompt
from rlhf_ray.models.specs import policy_source
from rlhf_ray.stages.evaluate_files import JudgeVerdicts
from rlhf_ray.stages.evaluation_models import EvaluationModels, PolicyResponses
from rlhf_ray.stages.win_rates import Comparison, Judged, compare


def judges_of(config: EvaluateConfig) -> list[RewardSource]:
    """The rewards that decide wins, the first of them first."""
    by_name = {r.name: r for r in config.rewards}
    return [by_name[name] for name in config.judges]


def choosing_judge(config: EvaluateConfig) -> list[str]:
    """A warning for each best-of-n policy that is chosen by the very reward that judges it."""
    first = config.judges[:1]
    return [
        f"{p.name} is the best of {p.best_of} under {first[0]}, which judges it here: name another reward in judge"
        for p in config.policies
        if p.best_of > 1 and (p.best_of_reward or config.rewards[0].name) in first
    ]


def maximised_judge(config: EvaluateConfig) -> list[str]:
    """A warning for each policy whose PPO run maximised the very reward that judges it."""
    judges, warnings = judges_of(config), []
    if not judges:
        return []
    judge = judges[0]
    for policy in config.policies:
        run = policy_source(policy.policy).run if policy.policy is not None else None
        rewards = run.config().get("rewards", ()) if run is not None and run.stage == "ppo" else ()
        maximised = [RewardSource(**values) for values in rewards]
        if any(_is_same(judge, reward) and reward.weight for reward in maximised):
            warnings.append(
                f"{policy.name} maximised {judge.name}, which judges it here: what it wins may be over-optimisation; name another"
                " reward in judge"
            )
    return warnings


def _is_same(one: RewardSource, other: RewardSource) -> bool:
    """By path, wherever it is named from. Ensembles that share a member are taken for the same, and so is a member."""
    if one.function or other.function:
        return one.function == other.function
    if one.url or other.url:
        return one.url == other.url
    if one.llm or other.llm:
        ours, theirs = ((r.llm.base_url, r.llm.model) if r.llm is not None else None for r in (one, other))
        return ours == theirs
    places = [{Path(path).absolute() for path in reward.models("").values()} for reward in (one, other)]
    return not places[0].isdisjoint(places[1])


def by_scores(
    by: RewardSource, baseline: str, answers: dict[str, PolicyResponses], n_dropped: int, seed: int
) -> JudgeVerdicts:
    """A reward that scores single replies: the higher score wins."""
    sides = {name: _judged(a, by) for name, a in answers.items()}
    against = {name: side for name, side in sides.items() if name != baseline}
    return JudgeVerdicts({n: compare(sides[baseline], side, n_dropped, seed) for n, side in against.items()}, {})


def by_pairs(
    evaluation: EvaluationModels,
    by: RewardSource,
    baseline: str,
    prompts: Sequence[TokenisedPrompt],
    answers: dict[str, PolicyResponses],
    n_dropped: int,
) -> JudgeVerdicts:
    """An LLM judge that compares each policy's replies with the baseline's. Rank 0 asks it."""
    found, seed, session = evaluation.judges[by.name], evaluation.config.seed, evaluation.session
    instructions = [prompt.row.prompt.plain() for prompt in prompts]
    unknown = torch.full((len(prompts),), math.nan)

    def side(name: str) -> Judged:
        return Judged(unknown, answers[name].figures.length, answers[name].texts.completions)

    comparisons: dict[str, Comparison] = {}
    counts = Counter[str]()
    if session.is_main:
        found.progress = lambda done, of: session.console.progress(f"judge {by.name}", done, of)
    for name in answers:
        if name == baseline:
            continue
        pairs = instructions, list(side(baseline).responses), list(side(name).responses)
        opinions = session.on_main(partial(found.compare, *pairs))
        codes = [opinion.code for opinion in opinions]
        comparisons[name] = compare(side(baseline), side(name), n_dropped, seed, codes)
        for kind in ("refused", "unparsable", "flipped"):
            counts[kind] += sum(getattr(opinion, kind) for opinion in opinions)
    total = found.usage.total()
    about = {
        **{kind: counts[kind] for kind in ("refused", "unparsable", "flipped")},
        **total,
        "cached": found.usage.cached,
    }
    cost = found.usage.cost(total)
    return JudgeVerdicts(comparisons, about | ({"cost": cost} if cost is not None else {}))


def best_of_kl_bound(n: int) -> float:
    """ln n - (n - 1) / n, nats: the KL of best-of-n from the policy it samples from is at most this. Used as if it were that KL
    since Stiennon et al. 2020 (arXiv:2009.01325); it is a bound only, and not tight where replies repeat (arXiv:2401.01879).

    >>> round(best_of_kl_bound(4), 4)
    0.6363
    """
    return math.log(n) - (n - 1) / n


def _judged(answers: PolicyResponses, by: RewardSource) -> Judged:
    """A reward with a negative weight is a cost: its lower score wins."""
    sign = -1.0 if by.weight < 0 else 1.0
    figures = answers.figures
    return Judged(sign * figures.parts[by.name], figures.length, answers.texts.completions)
