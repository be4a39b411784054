"""Evaluation: policies side by side on held-out prompts. Rewards, KL to a reference, length, and who wins against a baseline.

All policies answer the same prompts with the same random numbers, so differences between them are paired. What it leaves:

    summary.json        every figure as <what>/<policy>            (metrics.py says what each is)
    results.jsonl       one line per prompt with every policy's reply and its figures        (evaluate_files.py)
    pairs_<policy>.json {instruction, input, output_1 = baseline, output_2 = policy, preference}: AlpacaFarm's pairwise form
    comparisons.json    wins, losses, draws, dropped, win rate, win rate at equal length, paired score difference, 95% intervals
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rlhf_ray.config import EvaluateConfig, RewardSource
from rlhf_ray.console import quiet_libraries
from rlhf_ray.data.collate import TokenisedPrompt
from rlhf_ray.data.load import StageRows, load_rows
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.maths.standard_errors import standard_error
from rlhf_ray.models.lineage import header_line
from rlhf_ray.models.specs import policy_source
from rlhf_ray.runtime.session import Session
from rlhf_ray.stages.evaluate_files import EvaluationOutcome, artifacts, show, write_results
from rlhf_ray.stages.evaluation_models import EvaluationModels, PolicyResponses, decoding_line, load_evaluation_models
from rlhf_ray.stages.win_rates import DRAWN_PAIRS, Comparison, Judged, compare, distinct_2, pair_counts
from rlhf_ray.storage.run import Run
from rlhf_ray.storage.run_folder import RunFolder, is_run
from rlhf_ray.training.ancestry import check_ancestors
from rlhf_ray.training.header import config_line
from rlhf_ray.training.run_entry import discarded_on_error, enter_afresh

TRUE = "true_reward"
"""A reward source of this name is the task's own rule; its mean is published as true_reward/<policy>."""


def run_evaluate(config: EvaluateConfig, session: Session) -> Run:
    """The body of the stage; every rank of the worker group runs it."""
    started = time.monotonic()
    is_new = session.is_main and not is_run(config.output_dir)
    with ExitStack() as stack:
        stack.enter_context(quiet_libraries())
        folder, finished = enter_afresh(config, session, stack, "evaluate")
        if finished is not None:
            return finished
        baseline = config.baseline or config.policies[0].name
        with discarded_on_error(folder, is_new):
            evaluation, prompts, n_dropped = prepare(config, session, folder, config.reference or baseline)
        answers = answer_all(evaluation, prompts)
        outcome = judge(config, baseline, prompts, answers, n_dropped)
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


def prepare(
    config: EvaluateConfig, session: Session, folder: RunFolder, reference: str
) -> tuple[EvaluationModels, list[TokenisedPrompt], int]:
    """Everything that can be wrong with the job is found here: rows, models, lineage, lengths. Cheap checks come first.

    Returns the loaded models, the prompts, and how many held-out prompts are too long to be answered."""
    rows = held_out_rows(config)
    shared, leaks = check_ancestors(rows, sources_of(config))
    leaks += maximised_judge(config)
    rows = replace(rows, summary=(*rows.summary, *shared), warnings=(*rows.warnings, *leaks))
    evaluation = load_evaluation_models(config, session, reference)
    asked = rows.held_out[: config.data.eval_max_rows]
    done = evaluation.tokenise(asked, config.data.too_long)
    if not done.examples:
        where = ", ".join(config.data.eval or config.data.train)
        raise DataError.at(where, f"no prompt can be answered: {'; '.join(map(str, done.tallies))}")
    if session.is_main:
        write_lineage(folder, evaluation, rows)
        lines = [f"{len(done.examples)} of {len(rows.held_out)} held-out prompts"]
        tell(evaluation, [*rows.summary, *lines, *map(str, done.tallies)], (*rows.warnings, *done.warnings))
    return evaluation, done.examples, len(asked) - len(done.examples)


def sources_of(config: EvaluateConfig) -> list[tuple[str, str]]:
    """(role, path) of every model that answers or scores."""
    answers = [(f"policy:{p.name}", p.policy) for p in config.policies if p.policy != "base"]
    models = [model for r in config.rewards for model in r.models(f"reward:{r.name}").items()]
    return [("base", config.model_name_or_path), *answers, *models]


def judge_of(config: EvaluateConfig) -> RewardSource | None:
    """The reward that decides wins."""
    return next((r for r in config.rewards if r.name == config.judge), config.rewards[0] if config.rewards else None)


def maximised_judge(config: EvaluateConfig) -> list[str]:
    """A warning for each policy whose PPO run maximised the very reward that judges it."""
    judge, warnings = judge_of(config), []
    if judge is None:
        return []
    for policy in config.policies:
        run = policy_source(policy.policy).run
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
    places = [{Path(path).absolute() for path in reward.models("").values()} for reward in (one, other)]
    return not places[0].isdisjoint(places[1])


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
        found[policy.name] = evaluation.answer(policy.name, prompts)
        if evaluation.session.is_main:
            evaluation.session.console.progress("evaluate", number, len(evaluation.config.policies))
    return found


def judge(
    config: EvaluateConfig,
    baseline: str,
    prompts: Sequence[TokenisedPrompt],
    answers: dict[str, PolicyResponses],
    n_dropped: int,
) -> EvaluationOutcome:
    """All figures of all policies. Without rewards nobody wins."""
    comparisons: dict[str, Comparison] = {}
    by = judge_of(config)
    if by is not None:
        sides = {name: _judged(a, by) for name, a in answers.items()}
        comparisons = {
            name: compare(sides[baseline], side, n_dropped, config.seed)
            for name, side in sides.items()
            if name != baseline
        }
    metrics: dict[str, float] = {}
    pairs = {name: pair_counts(a.texts.completions) for name, a in answers.items()}
    drawn = min([DRAWN_PAIRS, *(total for counts in pairs.values() if (total := counts.total()))])
    for name, found in answers.items():
        metrics |= policy_metrics(name, found, config.rewards, n_dropped, config.sampling.estimates_kl)
        if pairs[name]:
            metrics |= {f"distinct_2/{name}": distinct_2(pairs[name], drawn), f"distinct_2_pairs/{name}": float(drawn)}
        if name in comparisons:
            metrics |= comparisons[name].metrics(name)
    judge_name = by.name if by is not None else None
    return EvaluationOutcome(baseline, judge_name, prompts, answers, comparisons, metrics, has_sum(config.rewards))


def _judged(answers: PolicyResponses, by: RewardSource) -> Judged:
    """A reward with a negative weight is a cost: its lower score wins."""
    sign = -1.0 if by.weight < 0 else 1.0
    figures = answers.figures
    return Judged(sign * figures.parts[by.name], figures.length, answers.texts.completions)


def policy_metrics(
    policy: str, answers: PolicyResponses, rewards: Sequence[RewardSource], n_dropped: int, estimates_kl: bool
) -> dict[str, float]:
    """A policy's figures under the names of metrics.py. Undefined ones are left out: one prompt has no standard error, replies that
    are not drawn from the whole distribution no KL."""
    figures = answers.figures
    found: dict[str, float] = {}
    if estimates_kl:
        found |= _with_error("kl_k1_per_response", figures.k1) | _with_error("kl_k3_per_response", figures.k3)
    found |= {
        "length": float(figures.length.mean()),
        "finished": float(figures.finished.mean()),
        "rows": float(len(figures.length)),
        "dropped": float(n_dropped),
    }
    if has_sum(rewards):
        found |= _with_error("reward", figures.reward)
    for reward in rewards:
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
    return any(r.weight for r in rewards)


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
        threads=session.num_threads,
        world_size=session.world_size,
    )


def tell(evaluation: EvaluationModels, data_lines: Sequence[str], data_warnings: Sequence[str]) -> None:
    """The header, before the first reply."""
    config, console, sampling = evaluation.config, evaluation.session.console, evaluation.config.sampling
    console.header(
        f"evaluate  {config.output_dir}",
        [
            *evaluation.lines,
            *(header_line("data", line) for line in data_lines),
            header_line("decoding", f"{decoding_line(config)}; KL against {evaluation.reference}"),
            config_line(config),
        ],
    )
    for line in [*data_warnings, *evaluation.warnings]:
        console.warn(line)
    if not sampling.estimates_kl:
        console.warn("replies are not drawn from the policies' whole distribution: no KL can be estimated from them")
