"""Comparing policies: the table of an evaluation, and the story around it.

summary.json holds one number per metric and policy, `reward/ppo`, `reward_se/ppo`, `win_rate/ppo`; the policy follows the last
slash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_ray.metrics import describe
from rlhf_ray.report.charts import interval
from rlhf_ray.report.folder import RunFiles
from rlhf_ray.report.html import Html, join, tag
from rlhf_ray.report.numbers import shown, with_error
from rlhf_ray.report.story import Story

CHAIN = ("base", "sft", "dpo", "ppo")
HEADINGS = {
    "true_reward": "true reward",
    "reward": "reward",
    "win_rate": "win rate",
    "kl_k1_per_response": "KL per reply (k1)",
    "length": "length",
    "finished": "finished",
    "distinct_2": "distinct pairs",
    "rows": "prompts",
}

# metric -> policy -> value
Table = dict[str, dict[str, float]]


def comparison(results: Mapping[str, float], config: Mapping[str, Any]) -> tuple[list[str], Table]:
    """The policies, in the order of the job (else base, sft, ppo), and their numbers."""
    table: Table = {}
    for name, value in results.items():
        metric, _, policy = name.rpartition("/")
        if metric:
            table.setdefault(metric, {})[policy] = value
    found = {policy for metric in table if metric in HEADINGS for policy in table[metric]}
    listed = [p["name"] for p in config.get("policies") or () if isinstance(p, dict) and p.get("name") in found]
    policies = listed or sorted(found, key=lambda p: (CHAIN.index(p) if p in CHAIN else len(CHAIN), p))
    kept = {m: row for m, row in table.items() if any(p in row for p in policies)}
    order = list(HEADINGS)
    return policies, dict(
        sorted(kept.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))
    )


def comparison_table(policies: Sequence[str], table: Table) -> Html:
    """One row per policy; the first metric with a standard error is drawn with its 95% interval. All other figures folded below."""
    metrics = [m for m in HEADINGS if m in table]
    if not policies or not metrics:
        return Html("")
    drawn = next((m for m in metrics if f"{m}_se" in table), None)
    head = [tag("th", "policy", scope="col")]
    for metric in metrics:
        head.append(tag("th", HEADINGS[metric], class_="number", scope="col"))
        head += [tag("th", "95% interval", class_="strip", scope="col")] if metric == drawn else []
    rows = []
    for policy in policies:
        cells = [tag("th", policy, scope="row")]
        for metric in metrics:
            cells.append(_cell(metric, policy, table))
            cells += [tag("td", _strip(metric, policy, table), class_="strip")] if metric == drawn else []
        rows.append(tag("tr", cells))
    body = tag("table", tag("thead", tag("tr", head)), tag("tbody", rows), class_="comparison")
    note = (
        "± is one standard error of a mean over prompts. All policies answered the same prompts, so a difference can be clear where"
        " intervals overlap: score_difference, below, is taken prompt by prompt."
    )
    return join(
        tag("div", body, tag("p", note, class_="note") if drawn else None, class_="wide"), _all_figures(policies, table)
    )


def _all_figures(policies: Sequence[str], table: Table) -> Html | None:
    """Every metric with a row of its own and its meaning."""
    metrics = [m for m in table if not (m.endswith("_se") and m.removesuffix("_se") in table)]
    if set(metrics) <= set(HEADINGS):
        return None
    head = [
        tag("th", name, scope="col", class_="number" if name in policies else None)
        for name in ("figure", *policies, "meaning")
    ]
    rows = [
        tag(
            "tr",
            tag("td", tag("code", m)),
            [_cell(m, p, table) for p in policies],
            tag("td", _meaning(m), class_="meaning"),
        )
        for m in metrics
    ]
    body = tag("table", tag("thead", tag("tr", head)), tag("tbody", rows), class_="metrics")
    return tag("details", tag("summary", f"All {len(metrics)} figures"), tag("div", body, class_="wide"))


def _meaning(metric: str) -> str:
    try:
        return describe(f"{metric}/x").meaning
    except KeyError:
        return ""


def _cell(metric: str, policy: str, table: Table) -> Html:
    value, error = table[metric].get(policy), table.get(f"{metric}_se", {}).get(policy)
    if value is None:
        return tag("td", "–", class_="number")
    unit = _unit(metric)
    if error is None:
        return tag("td", shown(value, unit), class_="number")
    number, _, spread = with_error(value, error, unit).partition(" ± ")
    return tag("td", number, tag("small", f" ± {spread}") if spread else None, class_="number")


def _unit(metric: str) -> str:
    try:
        return describe(f"{metric}/x").unit
    except KeyError:
        return ""


def _strip(metric: str, policy: str, table: Table) -> Html | None:
    values, errors = table[metric], table[f"{metric}_se"]
    if policy not in values:
        return None
    ends = [values[p] + sign * 1.96 * errors.get(p, 0.0) for p in values for sign in (-1, 1)]
    room = 0.04 * (max(ends) - min(ends))
    return interval(values[policy], errors.get(policy), min(ends) - room, max(ends) + room)


def evaluate_story(run: RunFiles) -> Story:
    policies, table = comparison(run.results, run.config)
    return Story(
        compared(policies, table, run.config) or "The evaluation has not finished yet.",
        tables=[comparison_table(policies, table)],
    )


def compared(policies: Sequence[str], table: Table, config: Mapping[str, Any]) -> str:
    """The policies in one sentence, and whether the last differs from the baseline; empty if there is nothing to compare.

    config: of the evaluation."""
    metric = next((m for m in ("true_reward", "reward", "win_rate") if len(table.get(m, {})) > 1), None)
    if metric is None or len(policies) < 2:
        return ""
    values, unit = table[metric], _unit(metric)
    told = [f"{shown(values[p], unit)} for {p}" for p in policies if p in values]
    return f"{HEADINGS[metric].capitalize()}: {', '.join(told[:-1])} and {told[-1]}{_paired(policies, table, config)}."


def _paired(policies: Sequence[str], table: Table, config: Mapping[str, Any]) -> str:
    """Whether the last policy differs from the baseline, by the interval of the mean difference over prompts: both answered the
    same ones, and what these have in common is in both means. Nothing where no judge compared the two."""
    final, gaps = policies[-1], table.get("score_difference", {})
    baselines = [policy for policy in policies if policy not in gaps]
    low, high = (table.get(f"score_difference_{end}", {}).get(final) for end in ("low", "high"))
    if final not in gaps or low is None or high is None or len(baselines) != 1:
        return ""
    rewards = config.get("rewards") or ()
    named = config.get("judge")
    judge = named[0] if isinstance(named, (list, tuple)) and named else named
    judge = judge or next((r.get("name") for r in rewards if isinstance(r, dict)), None) or "the judge"
    verdict = "differs clearly" if low > 0 or high < 0 else "does not differ clearly"
    sizes = f"{shown(gaps[final])}, 95% interval {shown(low)} to {shown(high)}"
    return f"; by {judge}, prompt by prompt, {final} {verdict} from {baselines[0]} ({sizes})"
