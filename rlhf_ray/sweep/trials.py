"""The trials of a sweep: one setting with one seed each, as a PPO or DPO job of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

from rlhf_ray.config import STAGES, DPOConfig, EvaluateConfig, PPOConfig
from rlhf_ray.config.load import load_dict
from rlhf_ray.config.paths import check_paths
from rlhf_ray.config.resolved import stage_values, to_dict
from rlhf_ray.config.sections import under
from rlhf_ray.config.sweep import SweepConfig
from rlhf_ray.config.yaml_reader import Override
from rlhf_ray.errors import ConfigError, Problem
from rlhf_ray.sweep.evaluation import EVALUATION, STARTED_FROM, TRAINED
from rlhf_ray.sweep.space import Settings, Space, corners, draw, grid, has_ranges, read_space, size

TrialJob: TypeAlias = PPOConfig | DPOConfig
MEASURED_WITH = (
    *("model_name_or_path", "revision", "dtype", "load_in_8bit", "load_in_4bit", "cpu_offload", "attn_implementation"),
    *("lora_compute_dtype", "template", "template_date", "chat_template_kwargs", "learner"),
)
"""Fields of a DPO trial that its evaluation takes over: which base is loaded, how, where, and how prompts are written out."""
MOST_TRIALS = 10_000
"""Of a sweep, whose tables hold all of them and are written anew after each."""
MOST_CHECKED = 256
"""Combinations of a large space that are checked before a search that draws from it."""
MOST_DRAWN = 100_000
"""Draws of a random search over lists, which may be asked for more: of MOST_TRIALS settings they miss 0.5 on average."""
_LISTED = ("space", "search", "num_samples", "seeds")
"""Fields that decide which trials there are."""


@dataclass(frozen=True)
class Trial:
    """setting: names the settings, whatever the seed.  folder: of the run.  is_evaluated: it is done once it is trained and the
    evaluation in its folder is done (evaluation.py)."""

    setting: str
    settings: Settings
    seed: int
    folder: Path
    is_evaluated: bool = False

    @property
    def id(self) -> str:
        return f"{self.setting}-seed{self.seed}"


def setting_name(settings: Settings) -> str:
    """A name that follows from the settings alone, so that a sweep that goes on finds its trials again."""
    text = json.dumps(settings, sort_keys=True)
    return f"c{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def check_size(config: SweepConfig, before: Mapping[str, Any] | None = None) -> None:
    """ConfigError for a sweep of more trials than anybody can run, before they are listed.

    before: configuration of the sweep that is resumed; if its trials are the same ones, an older version has taken them."""
    values = json.loads(json.dumps(to_dict(config)))
    if before is not None and all(before.get(name) == values[name] for name in _LISTED):
        return
    space = read_space(config.space)
    if config.search == "grid":
        where, fix = "space", "fewer values or seeds, or search: random with num_samples"
        settings = 0 if has_ranges(space) else size(space)  # a range is refused as such
    else:
        where, fix = "num_samples", "fewer settings or seeds"
        settings = config.num_samples if has_ranges(space) else min(config.num_samples, size(space))
    if settings * len(config.seeds) > MOST_TRIALS:
        what, expected = "the sweep has more trials than can be run", f"at most {MOST_TRIALS:,}, settings x seeds"
        raise ConfigError.at(where, what, expected, f"{settings:,} x {len(config.seeds):,}", fix)


def planned(config: SweepConfig) -> list[Trial]:
    """All trials of a grid or random search, seeds innermost. Of optuna's, which follow from results, none."""
    space = read_space(config.space)
    if config.search == "grid":
        chosen = grid(space)
    elif config.search == "random":
        chosen = _drawn(config, space)
    else:
        chosen = []
    return [trial_of(config, settings, seed) for settings in chosen for seed in config.seeds]


def _drawn(config: SweepConfig, space: Space) -> list[Settings]:
    """The different ones among the draws of a random search, until there are no others."""
    count = config.num_samples
    whole = count if has_ranges(space) else min(count, size(space))
    found: dict[str, Settings] = {}
    for number in range(min(count, max(MOST_DRAWN, whole))):
        if len(found) == whole:
            break
        settings = draw(space, 0, number)
        found[setting_name(settings)] = settings
    return list(found.values())


def trial_of(config: SweepConfig, settings: Settings, seed: int) -> Trial:
    name = setting_name(settings)
    trial = Trial(name, settings, seed, Path(), config.evaluate is not None)
    return replace(trial, folder=Path(config.output_dir).absolute() / "trials" / trial.id)


def job_of(config: SweepConfig, trial: Trial) -> TrialJob:
    """The trial as a job of its stage. ConfigError naming the settings that make it impossible."""
    values = {**config.trial_values(), "output_dir": str(trial.folder), "seed": trial.seed}
    if config.copy_to is not None:
        values["copy_to"] = under(config.copy_to, f"trials/{trial.id}")
    laid_over = [Override(f"{name}={value}", tuple(name.split(".")), value) for name, value in trial.settings.items()]
    return cast(TrialJob, load_dict(STAGES[config.stage], values, config.stage, laid_over))


def evaluation_of(config: SweepConfig, trial: Trial, job: TrialJob, trained: str | None = None) -> EvaluateConfig:
    """How a DPO trial is measured once it is trained: beside the policy that it started from, with its seed, and where it trains.

    trained: the policy; default: the trial's run. ConfigError for what `evaluate` gets wrong."""
    started_from = getattr(job, "sft", None) or "base"
    own = {name: getattr(job, name) for name in MEASURED_WITH}
    values = {**config.shared_values(), **(config.evaluate or {}), **own, "seed": trial.seed, "resume": "auto"}
    values |= {"output_dir": str(trial.folder / EVALUATION), "baseline": STARTED_FROM, "reference": STARTED_FROM}
    values["policies"] = [
        {"name": STARTED_FROM, "policy": started_from},
        {"name": TRAINED, "policy": trained or str(trial.folder)},
    ]
    if config.copy_to is not None:
        values["copy_to"] = under(config.copy_to, f"trials/{trial.id}/{EVALUATION}")
    return load_dict(EvaluateConfig, values, "evaluate")


def written_out(config: SweepConfig, job: TrialJob) -> dict[str, Any]:
    """The sweep as a job file, with what all trials have in common although it says nothing of it.   job: of any trial.

    Sections of which a part varies are left as they are: a preset among their values brings others with it."""
    values = to_dict(config)
    del values["seed"]
    varies = {name.partition(".")[0] for name in config.space}
    return {**values, config.stage: stage_values(job, values[config.stage], varies)}


def written_out_as(config: SweepConfig, confirm: bool) -> dict[str, Any]:
    """`written_out` of a sweep that says of `confirm_held_out` what it says itself, else `confirm`."""
    config = config.confirming(confirm)
    space = read_space(config.space)
    chosen = draw(space, 0, 0) if config.search == "random" else corners(space, 1)[0]
    try:
        return written_out(config, job_of(config, trial_of(config, chosen, config.seeds[0])))
    except ConfigError:  # of an older version, which took what this one refuses
        return to_dict(config)


def check_trials(config: SweepConfig, trials: list[Trial], goes_on: bool = False) -> list[TrialJob]:
    """The trials' jobs, each setting once. Every setting must make one, and what the jobs name must exist: ConfigError, each
    problem once.

    goes_on: with a sweep that an older version may have begun, without a measure of what length_ratio compares with."""
    space = read_space(config.space)
    known = trials or [trial_of(config, s, config.seeds[0]) for s in corners(space, MOST_CHECKED)]
    problems: dict[tuple[Any, ...], Problem] = {}
    jobs: list[TrialJob] = []
    for trial in known:
        if trial.seed != config.seeds[0]:
            continue
        try:
            job = job_of(config, trial)
            jobs.append(job)
            found = [*check_paths(job), *_measured_problems(config, trial, job)]
            if config.length_ratio is not None and isinstance(job, PPOConfig) and not (job.eval_on_start or goes_on):
                what, expected = "replies are compared with those before training", "eval_on_start: true"
                found.append(
                    Problem("length_ratio", what, expected, "eval_on_start: false", "set it, or length_ratio: null")
                )
        except ConfigError as error:
            found = list(error.problems)
        for problem in found:
            problems.setdefault((problem.where, problem.what), _of_the_space(problem, space))
    ConfigError.raise_all(problems.values())
    return jobs


def _measured_problems(config: SweepConfig, trial: Trial, job: TrialJob) -> list[Problem]:
    """What is wrong with how a trial is measured, told now and not after the first one: an evaluation that cannot be, a metric
    that it does not have."""
    by: PPOConfig | EvaluateConfig
    if isinstance(job, PPOConfig):
        by, found = job, []
    elif config.evaluate is None:
        return []
    else:
        by = evaluation_of(config, trial, job, trained="base")
        own = {f"policies.{number}.policy" for number in range(2)} | {"model_name_or_path"}  # told of the job
        found = [replace(p, where=f"evaluate.{p.where}") for p in check_paths(by) if p.where not in own]
    names = [f"eval/reward/{reward.name}" for reward in by.rewards if not reward.is_pairwise]
    if any(reward.weight for reward in by.rewards if not reward.is_pairwise) or isinstance(by, PPOConfig):
        names.insert(0, "eval/reward")
    if config.metric.startswith("eval/reward") and config.metric not in names:
        what, expected = "no reward of the job has this name", ", ".join(names) or "a reward in evaluate.rewards"
        found.append(Problem("metric", what, expected, config.metric))
    return found


def _of_the_space(problem: Problem, space: Space) -> Problem:
    """`override kl_coef=-1` is a value of the space here."""
    where = problem.where.removeprefix("override ")
    return replace(problem, where=f"space.{where}") if where.split("=")[0] in space else problem
