"""Answers of policies side by side: base, SFT, merged, PPO, any checkpoint of them; for one instruction, or every row of a file.

What a run recorded is not asked again: its base, its prompt template, and, for a PPO run, its reference (KL) and reward models
(scores) are found from its folder. Runs in this process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.config import DataConfig, EvaluateConfig, PolicySpec, PPOConfig, RewardSource, SamplingConfig
from rlhf_ray.config.defaults import filled_in
from rlhf_ray.config.stored import version_of
from rlhf_ray.console import Console, LocalConsole, quiet_libraries
from rlhf_ray.data.collate import TokenisedPrompt
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.records import Row, read_rows
from rlhf_ray.errors import ConfigError, DataError, Problem, RlhfRayError
from rlhf_ray.launch.model_families import check_model
from rlhf_ray.models.lineage import (
    header_line,
    parent_of,
    recorded_base,
    recorded_date,
    recorded_kwargs,
    recorded_template,
)
from rlhf_ray.models.specs import ModelSpec, policy_source, reward_source
from rlhf_ray.report import sheet_page
from rlhf_ray.runtime.session import process_session
from rlhf_ray.stages.evaluate_files import prompt_columns
from rlhf_ray.stages.evaluation_models import EvaluationModels, PolicyResponses, decoding_line, load_evaluation_models
from rlhf_ray.storage.rows_file import write_rows
from rlhf_ray.storage.run_folder import RunFolder, atomic_write_text

REFERENCE = "reference"
ONE_ROW = "--instruction"


@quiet_libraries()
def generate(
    *,
    policies: Sequence[str],
    instruction: str | None = None,
    input: str = "",
    file: str | None = None,
    out: str | None = None,
    model: str | None = None,
    template: str | None = None,
    max_new_tokens: int | None = None,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    rewards: Sequence[str] = (),
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    num_threads: int | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Reply of each policy (`base`, RUN, RUN@STEP, adapter folder, merged checkpoint) to the instruction, or to each row of `file`.

    model: the base; default: the one that the first policy was trained on.   template: default: the one it was trained with.
    max_new_tokens, sampling: defaults of an evaluation.   rewards: reward runs or checkpoints to score with; default: those of the
    first PPO run among the policies.   The same seed gives the same replies, and all policies share the random numbers.

    For one instruction: a row {policy, prompt, completion, reward, kl, length, finished} per policy, reward and kl None where there
    is no reward model or reference. For a file: a row {instruction, input, output} per row, or output_1, output_2, ... with several
    policies, in their order, and reward (reward_1, ...) where there are reward models: with two policies, the pairwise file that a
    judge takes. `out` gets the rows as JSON lines, or as one JSON list if its name ends in .json;
    if it ends in .html, a page that shows the replies side by side, differences marked, and takes a blind vote.

    Raises ConfigError, DataError for a bad file or a prompt that is too long, ArtifactError for what does not fit."""
    console = console or LocalConsole()
    if (instruction is None) == (file is None):
        raise ConfigError.at("generate", "needs an instruction or a file", "exactly one of the two")
    if not policies:
        raise ConfigError.at("generate", "no policy is named", "base, a run, RUN@STEP or a folder")
    fields = {
        "template": template,
        "response_length": max_new_tokens,
        "sampling": sampling,
        "seed": seed,
        "load_in_8bit": load_in_8bit,
        "load_in_4bit": load_in_4bit,
    }
    config, reference = plan_job(policies, rewards, model, fields, console)
    rows = _rows(instruction, input, file, console)
    evaluation = load_evaluation_models(config, process_session(console, num_threads), reference)
    shown = [header_line("template", evaluation.template.name), header_line("decoding", decoding_line(config))]
    console.header("generate", [*evaluation.lines, *shown])
    for line in evaluation.warnings:
        console.warn(line)
    prompts = _prompts(evaluation, rows)
    names = [spec.name for spec in config.policies][: len(policies)]
    answers = []
    for number, name in enumerate(names, start=1):
        answers.append(evaluation.answer(name, prompts))
        console.progress("generate", number, len(names))
    console.done()
    found = beside_rows(rows, answers, evaluation) if file is not None else one_each(policies, answers, evaluation)
    if out is not None and Path(out).suffix == ".html":
        samples = side_by_side(policies, rows, answers, evaluation)
        atomic_write_text(out, sheet_page("Replies of " + ", ".join(short_names(policies)), samples))
    elif out is not None:
        write_rows(out, found)
    return found


def plan_job(
    policies: Sequence[str],
    rewards: Sequence[str],
    model: str | None,
    fields: Mapping[str, Any],
    console: Console,
    scored: bool = True,
) -> tuple[EvaluateConfig, str | None]:
    """The same as an evaluation job, with what was not given filled in from the policies; and the reference's name among them.

    fields: further fields of the job; None is not given.   scored: false leaves out what a PPO run's replies are measured by."""
    sources = [policy_source(spec) for spec in policies]
    trained = next((s.run for s in sources if scored and s.run is not None and s.run.stage == "ppo"), None)
    specs = [PolicySpec(name=f"policy_{i}", policy=spec) for i, spec in enumerate(policies)]
    origin = reference_of(trained, console)
    if origin is not None:
        specs.append(PolicySpec(name=REFERENCE, policy=origin))
    base, revision = base_of(sources, model)
    if untried := check_model(base, revision):
        console.warn(untried)
    template = next((found for s in sources if (found := recorded_template(s)) is not None), None)
    date = next((found for s in sources if (found := recorded_date(s)) is not None), None)
    kwargs = next((given for s in sources if (given := recorded_kwargs(s))), None)
    recorded: dict[str, Any] = {"template": template, "template_date": date, "chat_template_kwargs": kwargs}
    values = recorded | {name: value for name, value in fields.items() if value is not None}
    config = EvaluateConfig(
        output_dir=".",
        model_name_or_path=base,
        revision=revision,
        data=DataConfig(train=("-",)),
        policies=tuple(specs),
        rewards=tuple(_named_rewards(rewards) or rewards_of(trained, console)),
        **{name: value for name, value in values.items() if value is not None},
    )
    return config, REFERENCE if origin is not None else None


def base_of(sources: Sequence[ModelSpec], model: str | None) -> tuple[str, str | None]:
    """Base model and revision: as given, else what the first policy that says so was trained on, or is. Raises ConfigError."""
    if model is not None:
        return model, None
    for source in sources:
        if (recorded := recorded_base(source)) is not None:
            return recorded
    for source in sources:
        if source.kind == "full":
            return source.path, None
    raise ConfigError.at("model", "no policy records its base model", "a base model", fix="name it: --model")


def reference_of(run: RunFolder | None, console: Console) -> str | None:
    """What the PPO run's KL was measured against: its SFT adapter, or the base. None without such a run, or if it is gone."""
    if run is None:
        return None
    start = run.config().get("sft")
    if start is None:
        return "base"
    try:
        source = policy_source(start)
    except RlhfRayError as error:
        console.warn(f"no KL: the reference of {run.path} is not there ({error.problems[0]})")
        return None
    _warn_if_changed(run, "reference", source, console)
    return str(start)


def rewards_of(run: RunFolder | None, console: Console) -> list[RewardSource]:
    """The PPO run's reward adapters and ensembles, to score replies with. Python functions and servers are left out: no code
    runs, and nothing is sent anywhere, because a folder names it; so are whole reward models, which would be loaded beside the
    base."""
    found: list[RewardSource] = []
    if run is None:
        return found
    stored = run.config()
    values, _ = filled_in(PPOConfig, {**stored, "defaults_version": version_of(stored)})
    for reward in (RewardSource(**source) for source in values.get("rewards", ())):
        if reward.run is None and reward.ensemble is None:
            continue
        try:
            sources = {role: reward_source(path) for role, path in reward.models(reward.name).items()}
        except RlhfRayError as error:
            console.warn(f"not scored by {reward.name}: {error.problems[0]}")
            continue
        if all(source.kind == "adapter" for source in sources.values()):
            for role, source in sources.items():
                _warn_if_changed(run, role, source, console)
            # One run scores as it is, which is what `score` says; members of an ensemble only compare when normalised.
            found.append(reward.model_copy(update={"normalize": False}) if reward.run is not None else reward)
    return found


def _warn_if_changed(run: RunFolder, role: str, source: ModelSpec, console: Console) -> None:
    recorded = {p["role"]: p["sha256"] for p in run.manifest()["parents"]}
    if recorded.get(role) not in (None, parent_of(source, role).sha256):
        console.warn(f"{role} {source.path} is no longer the adapter that {run.path} was trained with")


def _named_rewards(specs: Sequence[str]) -> list[RewardSource]:
    """With their scores as they are, which is what `score` says."""
    return [RewardSource(name=f"reward_{i}", run=spec, normalize=False) for i, spec in enumerate(specs, start=1)]


def _rows(instruction: str | None, input: str, file: str | None, console: Console) -> Sequence[Row]:
    if file is None:
        prompt = Prompt(instruction or "", input if input.strip() else "")
        row = Row(ONE_ROW, prompt, columns={"instruction": prompt.text, "input": prompt.input})
        if row.prompt.is_blank:
            raise ConfigError.at(ONE_ROW, "is empty", "an instruction")
        return (row,)
    read = read_rows(DataConfig(train=(file,)), "prompt")
    for tally in (read.dropped, read.skipped):
        if tally.total:
            console.warn(f"{tally}; they are answered once")
    return read.rows


def _prompts(evaluation: EvaluationModels, rows: Sequence[Row]) -> list[TokenisedPrompt]:
    """Every row as a prompt. Raises DataError naming every row that is too long: no answer is left out in silence."""
    found = evaluation.tokenise(rows, "drop").examples
    kept = {id(prompt.row) for prompt in found}
    longest = evaluation.config.response_length
    DataError.raise_all(
        Problem(
            row.where,
            f"leaves no room for a reply of {longest} tokens",
            f"a prompt of 1 to {evaluation.limit - longest} tokens",
            fix="a shorter prompt, or a smaller max_new_tokens",
        )
        for row in rows
        if id(row) not in kept
    )
    return found


def one_each(
    policies: Sequence[str], answers: Sequence[PolicyResponses], evaluation: EvaluationModels
) -> list[dict[str, Any]]:
    """One row per policy, for a single prompt."""
    return [
        {
            "policy": policy,
            "prompt": answer.texts.prompts[0],
            "completion": answer.texts.completions[0],
            "reward": _figure(answer.figures.reward[0]) if evaluation.rewards else None,
            "kl": _figure(answer.figures.k1[0]) if evaluation.reference is not None else None,
            "length": int(answer.figures.length[0]),
            "finished": bool(answer.figures.finished[0]),
        }
        for policy, answer in zip(policies, answers)
    ]


def side_by_side(
    policies: Sequence[str], rows: Sequence[Row], answers: Sequence[PolicyResponses], evaluation: EvaluationModels
) -> list[dict[str, Any]]:
    """Rows for the comparison sheet: one per prompt and policy, the policies of a prompt together."""
    found = []
    for i, row in enumerate(rows):
        for name, answer in zip(short_names(policies), answers):
            figures = answer.figures
            scored = {"reward": _figure(figures.reward[i])} if evaluation.rewards else {}
            scored |= {"kl": _figure(figures.k1[i])} if evaluation.reference is not None else {}
            about = {"policy": name, "prompt": answer.texts.prompts[i], "asked": json.dumps(row.prompt.as_column())}
            length = {"length": int(figures.length[i]), "finished": bool(figures.finished[i])}
            found.append({**about, "reply": answer.texts.completions[i], **scored, **length})
    return found


def short_names(policies: Sequence[str]) -> list[str]:
    """The last parts of their paths, where these tell them apart.

    >>> short_names(["base", "runs/all/sft", "runs/all/ppo@20"])
    ['base', 'sft', 'ppo@20']
    """
    names = [Path(policy).name or policy for policy in policies]
    return names if len(set(names)) == len(names) else list(policies)


def beside_rows(
    rows: Sequence[Row], answers: Sequence[PolicyResponses], evaluation: EvaluationModels
) -> list[dict[str, Any]]:
    """One row per prompt: {instruction, input, output}, or output_1, output_2, ... in the order of the policies."""
    found = []
    for i, row in enumerate(rows):
        line: dict[str, Any] = dict(prompt_columns(row.prompt))
        for kind in ("output", "reward") if evaluation.rewards else ("output",):
            for number, answer in enumerate(answers, start=1):
                value = answer.texts.completions[i] if kind == "output" else _figure(answer.figures.reward[i])
                line[kind if len(answers) == 1 else f"{kind}_{number}"] = value
        found.append(line)
    return found


def _figure(value: Any) -> float:
    """Six significant digits: more are rounding of the forward pass."""
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else number
