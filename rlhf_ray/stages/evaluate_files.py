"""What an evaluation shows and leaves in its folder.

results.jsonl, one line per prompt, in the order of the data:

    {"row": 0, "where": "prompts.jsonl:7", "instruction": "...", "input": "", "hash": "00c1...",
     "prompt": the text that the models read,
     "replies": {"base": {"output": "...", "reward": 0.1, "rewards": {"reward": 0.1}, "kl": 0.0, "length": 12, "finished": true,
                          "preference": null}, "ppo": {...}}}

hash: of the row's prompt, hexadecimal, which the rule of held-out prompts reads (data/splits.py).
reward: the weighted sum (absent where no reward has a weight).  kl: k1 against the reference, nats.  length: tokens.
preference: 0 draw, 1 the baseline wins, 2 the policy wins, null for the baseline itself and without a judge; preferences: the same
by every judge, where there are several. A reward is null where it does not apply to the reply, kl where there is none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlhf_ray.config import EvaluateConfig
from rlhf_ray.console import Console
from rlhf_ray.data.collate import TokenisedPrompt
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.splits import prompt_hash
from rlhf_ray.metrics import MetricsWriter, SamplesWriter, figure
from rlhf_ray.stages.evaluation_models import PolicyResponses
from rlhf_ray.stages.win_rates import CONFIDENCE, Agreement, Comparison, agreement, between
from rlhf_ray.storage.rows_file import write_rows
from rlhf_ray.storage.run import Run
from rlhf_ray.storage.run_folder import RunFolder, atomic_write_json
from rlhf_ray.training.run_entry import finish_run

SAMPLED_PROMPTS = 40
SHOWN_PROMPTS = 3
SHOWN_CHARACTERS = 300
COLUMNS = {
    "true_reward": "true reward",
    "reward": "reward",
    "win_rate": "win rate",
    "kl_k1_per_response": "KL (k1)",
    "kl_bound": "KL at most",
    "length": "length",
    "finished": "finished",
    "distinct_2": "distinct-2",
}
SHARES = ("win_rate", "finished")


@dataclass(frozen=True)
class JudgeVerdicts:
    """comparisons: of every policy but the baseline.  about: counts of an LLM judge (refused, unparsable, flipped with the order,
    requests, tokens, cost), empty for others."""

    comparisons: Mapping[str, Comparison]
    about: Mapping[str, Any]


@dataclass(frozen=True)
class EvaluationOutcome:
    """An evaluation's result.

    verdicts: by judge, the one that decides first; empty without rewards.
    has_sum: some reward has a weight, so that the weighted sum says something.  decoding: by policy.  seed: of resampling."""

    baseline: str
    prompts: Sequence[TokenisedPrompt]
    answers: Mapping[str, PolicyResponses]
    verdicts: Mapping[str, JudgeVerdicts]
    metrics: dict[str, float]
    has_sum: bool
    decoding: Mapping[str, Any]
    seed: int = 0

    @property
    def judge(self) -> str | None:
        """The judge that decides."""
        return next(iter(self.verdicts), None)

    @property
    def comparisons(self) -> Mapping[str, Comparison]:
        """Of every policy but the baseline, by the judge that decides."""
        return self.verdicts[self.judge].comparisons if self.judge is not None else {}

    @property
    def agreements(self) -> list[Agreement]:
        """Of every two judges, over all pairs of replies."""
        codes = {name: [c for one in v.comparisons.values() for c in one.codes] for name, v in self.verdicts.items()}
        return agreement(codes)


def artifacts(outcome: EvaluationOutcome) -> dict[str, str]:
    """Name -> file, for the summary."""
    pairs = {f"pairs/{name}": pairs_file(name) for name in outcome.answers if name != outcome.baseline}
    found = {"results": "results.jsonl", "samples": "samples.jsonl", "report": "report.html", **pairs}
    return found | ({"comparisons": "comparisons.json"} if outcome.comparisons else {})


def pairs_file(policy: str) -> str:
    return f"pairs_{policy}.json"


def write_results(folder: RunFolder, config: EvaluateConfig, run: Run, outcome: EvaluationOutcome) -> None:
    """All files of the run, then its seal, its report and its copy. Call it from one process only."""
    rows = [result_row(outcome, i) for i in range(len(outcome.prompts))]
    write_rows(folder.path / "results.jsonl", rows)
    for name in outcome.answers:
        if name != outcome.baseline:
            write_rows(folder.path / pairs_file(name), [pair_row(row, outcome.baseline, name) for row in rows])
    if outcome.comparisons:
        atomic_write_json(folder.path / "comparisons.json", comparisons_json(outcome))
    (folder.path / "samples.jsonl").unlink(missing_ok=True)  # of an attempt that was cut off
    with SamplesWriter(folder.path) as samples:
        asked = [prompt.row.prompt.as_column() for prompt in outcome.prompts]
        samples.write(0, sample_rows(rows[:SAMPLED_PROMPTS], asked))
    with MetricsWriter(folder.path, config.report_to, config.run_name) as metrics:
        metrics.write(0, outcome.metrics)
    sealed = {name for key, name in run.artifacts.items() if key != "report"}
    finish_run(folder, run, ("config.yaml", "summary.json", "metrics.jsonl", *sorted(sealed)))


def comparisons_json(outcome: EvaluationOutcome) -> dict[str, Any]:
    """comparisons.json: `policies` by the judge that decides, `judges` by all of them."""

    def told(verdicts: JudgeVerdicts) -> dict[str, Any]:
        return {name: comparison.to_json() for name, comparison in verdicts.comparisons.items()}

    return {
        "baseline": outcome.baseline,
        "judge": outcome.judge,
        "policies": {name: comparison.to_json() for name, comparison in outcome.comparisons.items()},
        "between": [pair.to_json() for pair in between(outcome.comparisons, outcome.seed)],
        "judges": {name: {"policies": told(v), **v.about} for name, v in outcome.verdicts.items()},
        "agreement": [pair.to_json() for pair in outcome.agreements],
        "decoding": dict(outcome.decoding),
    }


def prompt_columns(prompt: Prompt) -> dict[str, str]:
    """instruction and input, as the ancestors' files have them; a conversation is told as a transcript."""
    return {"instruction": prompt.plain() if prompt.messages else prompt.text, "input": prompt.input}


def result_row(outcome: EvaluationOutcome, i: int) -> dict[str, Any]:
    """Line `i` of results.jsonl."""
    row = outcome.prompts[i].row
    prompt = next(iter(outcome.answers.values())).texts.prompts[i]
    responses = {name: _response(outcome, name, i) for name in outcome.answers}
    asked = {**prompt_columns(row.prompt), "hash": f"{prompt_hash(row.key):016x}", "prompt": prompt}
    return {"row": i, "where": row.where, **asked, "replies": responses}


def _response(outcome: EvaluationOutcome, name: str, i: int) -> dict[str, Any]:
    figures, texts = outcome.answers[name].figures, outcome.answers[name].texts
    comparison = outcome.comparisons.get(name)
    scored = {"reward": _number(figures.reward[i])} if outcome.has_sum else {}
    return {
        "output": texts.completions[i],
        **scored,
        "rewards": {source: _number(part[i]) for source, part in figures.parts.items()},
        "kl": _number(figures.k1[i]),
        "length": int(figures.length[i]),
        "finished": bool(figures.finished[i]),
        "preference": comparison.codes[i] if comparison is not None else None,
        **_by_others(outcome, name, i),
    }


def _by_others(outcome: EvaluationOutcome, policy: str, i: int) -> dict[str, Any]:
    """Where several judges decide, what each of them said."""
    if len(outcome.verdicts) < 2 or policy == outcome.baseline:
        return {}
    return {"preferences": {judge: v.comparisons[policy].codes[i] for judge, v in outcome.verdicts.items()}}


def _number(score: Tensor) -> float | None:
    """None where a reward does not apply, or there is no KL."""
    return None if bool(score.isnan()) else float(score)


def pair_row(row: Mapping[str, Any], baseline: str, policy: str) -> dict[str, Any]:
    """A row of the pairwise file: output_1 is the baseline's reply. preference is there where there was a judge."""
    response = row["replies"][policy]
    judged = {} if response["preference"] is None else {"preference": response["preference"]}
    return {
        "instruction": row["instruction"],
        "input": row["input"],
        "output_1": row["replies"][baseline]["output"],
        "output_2": response["output"],
        **judged,
    }


def sample_rows(rows: Sequence[Mapping[str, Any]], asked: Sequence[Any]) -> list[dict[str, Any]]:
    """samples.jsonl: one line per prompt and policy, the policies of a prompt together.   asked: each prompt as a column of a row,
    kept as JSON text for the votes of the report's comparison sheet."""
    return [
        {
            "policy": name,
            "row": row["row"],
            "prompt": row["prompt"],
            "asked": json.dumps(asked[row["row"]]),
            "reply": response["output"],
            **_scores(response),
            "kl": response["kl"],
            "length": response["length"],
            "finished": response["finished"],
        }
        for row in rows
        for name, response in row["replies"].items()
    ]


def _scores(response: Mapping[str, Any]) -> dict[str, float]:
    """The weighted sum, and its parts where they say more."""
    parts = response["rewards"]
    if "reward" not in response:
        return dict(parts)
    return {
        "reward": response["reward"],
        **({n: v for n, v in parts.items() if n != "reward"} if len(parts) > 1 else {}),
    }


def show(outcome: EvaluationOutcome, console: Console) -> None:
    """The table of policies, who won, and three prompts with all replies."""
    columns = [c for c in COLUMNS if any(f"{c}/{name}" in outcome.metrics for name in outcome.answers)]
    console.table(
        f"{len(outcome.prompts)} held-out prompts, ± one standard error",
        ["policy", *(COLUMNS[c] for c in columns)],
        [[name, *(_cell(outcome.metrics, c, name) for c in columns)] for name in outcome.answers],
    )
    for judge, verdicts in outcome.verdicts.items():
        for name, comparison in verdicts.comparisons.items():
            console.log(verdict(name, comparison, outcome.baseline, judge))
        if verdicts.about:
            console.log(
                f"{judge}: "
                + ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in verdicts.about.items())
            )
    for pair in between(outcome.comparisons, outcome.seed):
        if pair.difference.is_known:
            ends = f"{CONFIDENCE:.0%} interval {pair.bootstrap.low:+.1f} to {pair.bootstrap.high:+.1f}, bootstrap"
            gap = f"{pair.difference.value:+.1f} ± {pair.difference.se:.1f} points, paired"
            console.log(f"{pair.second} less {pair.first}: win rate {gap} ({ends})")
    for two in outcome.agreements:
        kappa = f", Cohen's kappa {two.kappa:.2f}" if math.isfinite(two.kappa) else ""
        console.log(f"{two.first} and {two.second} agree on {100 * two.same:.0f}% of {two.n} pairs{kappa}")
    for i in range(min(SHOWN_PROMPTS, len(outcome.prompts))):
        console.table(
            _cut(outcome.prompts[i].row.prompt.plain().strip(), from_end=True),
            ["policy", "reply"],
            [[name, _cut(a.texts.completions[i].strip()) or "(empty)"] for name, a in outcome.answers.items()],
        )


def verdict(policy: str, comparison: Comparison, baseline: str, judge: str) -> str:
    """One line: the counts, the win rate as it is and at equal length, the paired difference."""
    won, level, gap = comparison.outcome, comparison.at_equal_length, comparison.difference
    parts = [
        f"{policy} against {baseline} by {judge}: {won.wins} wins, {won.losses} losses, {won.draws} draws"
        + (f", {won.n_dropped} dropped" if won.n_dropped else ""),
        f"win rate {won.rate:.1f}%" + (f" ± {won.se:.1f}" if won.n_judged > 1 else ""),
    ]
    if level.is_known:
        parts.append(f"at equal length {level.value:.1f}% ± {level.se:.1f}")
    found = comparison.difference_interval
    if math.isfinite(found.low):
        clear = "a clear difference" if comparison.is_clear else "no clear difference"
        by = ", bootstrap" if found.by == "bootstrap" else ""
        ends = f"{CONFIDENCE:.0%} interval {found.low:+.3g} to {found.high:+.3g}{by}"
        parts.append(f"score {gap.value:+.3g} ± {gap.se:.2g}, paired: {clear} ({ends})")
    return "; ".join(parts)


def _cell(metrics: Mapping[str, float], name: str, policy: str) -> str:
    value, error = metrics.get(f"{name}/{policy}"), metrics.get(f"{name}_se/{policy}")
    if value is None:
        return "-"
    scale, unit = (100.0, "%") if name in SHARES else (1.0, "")
    return figure(value * scale) + unit + (f" ± {figure(error * scale)}" if error is not None else "")


def _cut(text: str, from_end: bool = False) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return text
    return f"… {text[-SHOWN_CHARACTERS:]}" if from_end else f"{text[:SHOWN_CHARACTERS]} …"
