"""Evaluation: policies side by side on held-out prompts. Rewards, KL to a reference, length, and who wins against a baseline.

All policies answer the same prompts with the same random numbers, so differences between them are paired. What it leaves:

    summary.json        every figure as <what>/<policy>            (metrics.py says what each is)
    results.jsonl       one line per prompt with every policy's reply and its figures        (evaluate_files.py)
    pairs_<policy>.json {instruction, input, output_1 = baseline, output_2 = policy, preference}: AlpacaFarm's pairwise form
    comparisons.json    by judge: wins, losses, draws, dropped, win rate, win rate at equal length, paired score difference, 95%
                        intervals; policies against each other, paired; agreement of the judges; how replies were decoded
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.config import EvaluateConfig, RewardSource
from rlhf_ray.console import quiet_libraries
from rlhf_ray.data.collate import TokenisedPrompt
from rlhf_ray.data.load import StageRows, load_rows
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.maths.standard_errors import standard_error
from rlhf_ray.models.lineage import header_line
from rlhf_ray.runtime.session import Session
from rlhf_ray.stages.evaluate_files import EvaluationOutcome, JudgeVerdicts, artifacts, show, write_results
from rlhf_ray.stages.evaluation_models import (
    EvaluationModels,
    OtherPolicy,
    PolicyResponses,
    decoding_line,
    load_evaluation_models,
    without_kl,
)
from rlhf_ray.stages.judging import best_of_kl_bound, by_pairs, by_scores, choosing_judge, judges_of, maximised_judge
from rlhf_ray.stages.other_policies import with_replies
from rlhf_ray.stages.win_rates import DRAWN_PAIRS, distinct_2, pair_counts
from rlhf_ray.storage.run import Run
from rlhf_ray.storage.run_folder import RunFolder
from rlhf_ray.training.ancestry import check_ancestors
from rlhf_ray.training.header import config_line
from rlhf_ray.training.run_entry import discarded_on_error, enter_afresh

TRUE = "true_reward"
"""A reward source of this name is the task's own rule; its mean is published as true_reward/<policy>."""


def run_evaluate(config: EvaluateConfig, session: Session) -> Run:
    """The body of the stage; every rank of the worker group runs it."""
    started = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(quiet_libraries())
        folder, finished = enter_afresh(config, session, stack, "evaluate")
        if finished is not None:
            return finished
        baseline = config.baseline or config.policies[0].name
        with discarded_on_error(folder):
            evaluation, prompts, n_dropped = prepare(config, session, folder, reference_of(config, baseline))
        answers = answer_all(evaluation, prompts)
        outcome = judge(evaluation, baseline, prompts, answers, n_dropped)
        run = Run(
            stage="evaluate",
            status="done",
            run_dir=str(folder.path),
            steps=0,
            seconds=time.monotonic() - started,
            seed=config.seed,
            metrics=outcome.metrics,
            artifacts=artifacts(outcome),
        )
        if session.is_main:
            show(outcome, session.console)
            write_results(folder, config, run, outcome)
            session.console.done()
        session.barrier()
        return run


def reference_of(config: EvaluateConfig, baseline: str) -> str | None:
    """The policy that KL is measured against; None where it is not loaded here, so that there is none."""
    name = config.reference or baseline
    return name if next(p.policy for p in config.policies if p.name == name) is not None else None


def prepare(
    config: EvaluateConfig, session: Session, folder: RunFolder, reference: str | None
) -> tuple[EvaluationModels, list[TokenisedPrompt], int]:
    """Everything that can be wrong with the job is found here: rows, models, lineage, lengths. Cheap checks come first.

    Returns the loaded models, the prompts, and how many held-out prompts before the last of them are not answered: they are too
    long, or a file has no reply to them."""
    rows = held_out_rows(config)
    shared, leaks = check_ancestors(rows, sources_of(config))
    leaks += [*maximised_judge(config), *choosing_judge(config)]
    rows = replace(rows, summary=(*rows.summary, *shared), warnings=(*rows.warnings, *leaks))
    evaluation = load_evaluation_models(config, session, reference)
    outputs = {
        name: policy.outputs
        for name, policy in evaluation.policies.items()
        if isinstance(policy, OtherPolicy) and policy.outputs is not None
    }
    answered, lacks = with_replies(rows.held_out, outputs)
    told = tuple(
        f"{count} of {len(rows.held_out)} prompts have no reply in {name}'s file: dropped"
        for name, count in lacks.items()
    )
    rows = replace(rows, warnings=(*rows.warnings, *told))
    asked = answered[: config.data.eval_max_rows]
    done = evaluation.tokenise(asked, config.data.too_long)
    if not done.examples:
        where = ", ".join(config.data.eval or config.data.train)
        raise DataError.at(where, f"no prompt can be answered: {'; '.join(map(str, done.tallies))}")
    if session.is_main:
        write_lineage(folder, evaluation, rows)
        lines = [f"{len(done.examples)} of {len(rows.held_out)} held-out prompts"]
        tell(evaluation, [*rows.summary, *lines, *map(str, done.tallies)], (*rows.warnings, *done.warnings))
    is_cut = len(asked) < len(answered)
    reached = [row is asked[-1] for row in rows.held_out].index(True) + 1 if is_cut else len(rows.held_out)
    return evaluation, done.examples, reached - len(done.examples)


def sources_of(config: EvaluateConfig) -> list[tuple[str, str]]:
    """(role, path) of every model that answers or scores."""
    answers = [(f"policy:{p.name}", p.policy) for p in config.policies if p.policy not in ("base", None)]
    models = [model for r in config.rewards for model in r.models(f"reward:{r.name}").items()]
    return [("base", config.model_name_or_path), *((role, str(path)) for role, path in answers), *models]


def held_out_rows(config: EvaluateConfig) -> StageRows:
    """The prompts that no stage trains on. Raises ConfigError if the job leaves none, DataError if the files hold none."""
    data = config.data
    if not data.eval and data.held_out_fraction == 0:
        raise ConfigError.at(
            "data.held_out_fraction",
            "is 0 and data.eval is not set: no prompt is held out to evaluate on",
            "prompts that no stage trains on",
            fix="set data.held_out_fraction as in training (0.1), or name files in data.eval",
        )
    rows = load_rows(data, "prompt")
    if not rows.held_out:
        raise DataError.at(
            ", ".join(data.train),
            f"none of {len(rows.train)} prompts falls into data.held_out_fraction {data.held_out_fraction:g}",
            fix="more rows, a larger fraction, or files in data.eval",
        )
    return rows


def answer_all(evaluation: EvaluationModels, prompts: Sequence[TokenisedPrompt]) -> dict[str, PolicyResponses]:
    """Every policy's answers, on every rank."""
    found: dict[str, PolicyResponses] = {}
    for number, policy in enumerate(evaluation.config.policies, start=1):
        answers = evaluation.answer(policy.name, prompts)
        if not evaluation.config.sampling.estimates_kl:  # a reader of the rows would take their mean for one
            answers = replace(answers, figures=without_kl(answers.figures))
        found[policy.name] = answers
        if evaluation.session.is_main:
            evaluation.session.console.progress("evaluate", number, len(evaluation.config.policies))
    return found


def judge(
    evaluation: EvaluationModels,
    baseline: str,
    prompts: Sequence[TokenisedPrompt],
    answers: dict[str, PolicyResponses],
    n_dropped: int,
) -> EvaluationOutcome:
    """All figures of all policies, by every judge. Without rewards nobody wins."""
    config = evaluation.config
    verdicts: dict[str, JudgeVerdicts] = {}
    for by in judges_of(config):
        if by.is_pairwise:
            verdicts[by.name] = by_pairs(evaluation, by, baseline, prompts, answers, n_dropped)
        else:
            verdicts[by.name] = by_scores(by, baseline, answers, n_dropped, config.seed)
    metrics: dict[str, float] = {}
    for name in config.judges[1:]:
        for policy, comparison in verdicts[name].comparisons.items():
            metrics |= comparison.metrics_by(name, policy)
    comparisons = verdicts[config.judges[0]].comparisons if verdicts else {}
    pairs = {name: pair_counts(a.texts.completions) for name, a in answers.items()}
    drawn = min([DRAWN_PAIRS, *(total for counts in pairs.values() if (total := counts.total()))])
    for name, found in answers.items():
        metrics |= policy_metrics(name, found, config.rewards, n_dropped)
        n = next(p.best_of for p in config.policies if p.name == name)
        metrics |= {f"best_of/{name}": float(n), f"kl_bound/{name}": best_of_kl_bound(n)} if n > 1 else {}
        if pairs[name]:
            metrics |= {f"distinct_2/{name}": distinct_2(pairs[name], drawn), f"distinct_2_pairs/{name}": float(drawn)}
        if name in comparisons:
            metrics |= comparisons[name].metrics(name)
    return EvaluationOutcome(
        baseline, prompts, answers, verdicts, metrics, has_sum(config.rewards), decodings(config), config.seed
    )


def decodings(config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """How each policy's replies were made, to be stored with them."""
    one = {**config.sampling.model_dump(mode="json"), "response_length": config.response_length, "seed": config.seed}
    one |= {"template": config.template}
    found: dict[str, dict[str, Any]] = {}
    for policy in config.policies:
        if policy.outputs is not None:
            found[policy.name] = {"outputs": policy.outputs}
        else:
            served = {"endpoint": policy.endpoint.base_url, "model": policy.endpoint.model} if policy.endpoint else {}
            choice = {"best_of": policy.best_of} if policy.best_of > 1 else {}
            found[policy.name] = {**one, **choice, **served}
    return found


def policy_metrics(
    policy: str, answers: PolicyResponses, rewards: Sequence[RewardSource], n_dropped: int
) -> dict[str, float]:
    """A policy's figures under the names of metrics.py. Undefined ones are left out: one prompt has no standard error, replies that
    are not drawn from the whole distribution no KL."""
    figures = answers.figures
    found = _with_error("kl_k1_per_response", figures.k1) | _with_error("kl_k3_per_response", figures.k3)
    found |= {
        "length": float(figures.length.mean()),
        "finished": float(figures.finished.mean()),
        "rows": float(len(figures.length)),
        "dropped": float(n_dropped),
    }
    if has_sum(rewards):
        found |= _with_error("reward", figures.reward)
    for reward in (r for r in rewards if not r.is_pairwise):
        if reward.name == TRUE:
            found |= _with_error("true_reward", figures.parts[reward.name])
        elif len(rewards) > 1 or reward.weight != 1:  # alone and unweighted it is the sum itself
            found |= _with_error(f"reward/{reward.name}", figures.parts[reward.name])
        for part in figures.parts:
            if part.startswith(f"{reward.name}/"):  # an ensemble's members, and how far they are apart
                found |= _with_error(f"reward/{part}", figures.parts[part])
    return {f"{name}/{policy}": value for name, value in found.items() if math.isfinite(value)}


def has_sum(rewards: Sequence[RewardSource]) -> bool:
    """Whether the weighted sum of rewards says something: not if every source is only watched, with weight 0."""
    return any(r.weight and not r.is_pairwise for r in rewards)


def _with_error(name: str, values: Tensor) -> dict[str, float]:
    """Over the replies that a reward applies to."""
    known = values[torch.isfinite(values)]
    return {name: float(known.mean()), f"{name}_se": standard_error(known)}


def write_lineage(folder: RunFolder, evaluation: EvaluationModels, rows: StageRows) -> None:
    identity, template, session = evaluation.backbone.identity, evaluation.template, evaluation.session
    folder.update_manifest(
        parents=evaluation.parents,
        base=identity.manifest(),
        tokenizer_sha256=identity.tokenizer_sha256,
        template={name: value for name, value in template.manifest().items() if name != "content"},
        data=list(rows.manifest),
        held_out=rows.rule.manifest(),
        decoding=decodings(evaluation.config),
        threads=session.num_threads,
        world_size=session.world_size,
    )


def tell(evaluation: EvaluationModels, data_lines: Sequence[str], data_warnings: Sequence[str]) -> None:
    """The header, before the first reply."""
    config, console, sampling = evaluation.config, evaluation.session.console, evaluation.config.sampling
    kl = f"KL against {evaluation.reference}" if evaluation.reference is not None else "no KL"
    console.header(
        f"evaluate  {config.output_dir}",
        [
            *evaluation.lines,
            *(header_line("data", line) for line in data_lines),
            header_line("decoding", f"{decoding_line(config)}; {kl}"),
            config_line(config),
        ],
    )
    for line in [*data_warnings, *evaluation.warnings]:
        console.warn(line)
    if not sampling.estimates_kl:
        console.warn("replies are not drawn from the policies' whole distribution: no KL can be estimated from them")
