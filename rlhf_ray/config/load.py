"""Job files: YAML and `a.b=c` overrides in, a checked configuration out, or one ConfigError that tells every problem at once.

error: jobs/ppo.yaml:14: kl_coef: wrong type; expected number >= 0; got '0.1'; fix: write it without quotes
error: override kl_penalty=k4: not a choice; expected one of kl, clamped_kl, ...; got k4; fix: did you mean k1?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from rlhf_ray.config import explain
from rlhf_ray.config.endpoints import ELSEWHERE, secrets_in
from rlhf_ray.config.hints import job_of_another_stage, nearest_sibling, stage_of
from rlhf_ray.config.paths import check_paths
from rlhf_ray.config.pipeline import STAGES, PipelineConfig, held_out_conflicts
from rlhf_ray.config.resolved import FieldChange, diff, dump_yaml, to_dict, to_yaml
from rlhf_ray.config.schema import FieldRow, describe, shorten
from rlhf_ray.config.sections import Section
from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.config.stages import JobFields
from rlhf_ray.config.sweep import SweepConfig
from rlhf_ray.config.unused import unused_fields
from rlhf_ray.config.uris import hidden
from rlhf_ray.config.yaml_reader import (
    Document,
    Loc,
    Override,
    apply_overrides,
    dotted,
    in_order,
    parse,
    parse_override,
    read_text,
)
from rlhf_ray.errors import ConfigError, Problem

__all__ = [
    "FieldChange",
    "FieldRow",
    "check_paths",
    "describe",
    "diff",
    "dump_yaml",
    "load",
    "load_any",
    "load_dict",
    "nearest_sibling",
    "to_dict",
    "to_yaml",
]

S = TypeVar("S", bound=Section)


class JobText:
    """Where values come from: a file with lines, and the overrides laid over it."""

    def __init__(self, name: str, document: Document | None, overrides: Sequence[Override]) -> None:
        self.name = name
        self.document = document
        self.overrides = overrides

    def where(self, loc: Loc) -> str:
        """`file:line: field`, or `override a.b=c` for a value that came from one (with the field if it lies deeper)."""
        for override in reversed(self.overrides):
            if loc and loc[: len(override.path)] == override.path:
                deeper = f": {dotted(loc)}" if len(loc) > len(override.path) else ""
                return f"override {shorten(hidden(override.text))}{deeper}"
        line = self.document.line(loc) if self.document is not None else None
        place = f"{self.name}:{line}" if line is not None else self.name
        return ": ".join(part for part in (place, dotted(loc)) if part)


def load(cls: type[S], path: str | Path, overrides: Sequence[str] = (), *, check_files: bool = True) -> S:
    """The job file at `path` with `overrides` (`a.b=c`, the last one wins) as a checked `cls`.

    With `check_files`, models, runs and reward functions that the job names must exist (see `check_paths`).
    Raises ConfigError with all problems that can be told apart, before anything heavy is imported or loaded.
    """
    values, source = _read(path, overrides)
    return _without_unused(_validated(cls, values, source, check_files), source)


def load_any(
    path: str | Path, overrides: Sequence[str] = (), stage: str | None = None, *, check_files: bool = True
) -> tuple[str, JobFields | ServeConfig]:
    """The command that a job file is for, and its configuration; `stage` settles it where the file could be for several."""
    values, source = _read(path, overrides)
    name = stage or stage_of(values, Path(path).stem)
    classes: dict[str, type[JobFields] | type[ServeConfig]] = {**STAGES, "pipeline": PipelineConfig}
    classes |= {"sweep": SweepConfig, "serve": ServeConfig}
    if name not in classes:
        choices = ", ".join(classes)
        raise ConfigError.at(str(path), "cannot tell which stage this job is for", fix=f"add --stage, one of {choices}")
    return name, _without_unused(_validated(classes[name], values, source, check_files), source)


def load_dict(cls: type[S], mapping: Mapping[str, Any], where: str = "", overrides: Sequence[str | Override] = ()) -> S:
    """The same checks for values that are at hand already; `where` names their origin in errors. Files are not checked."""
    parsed = _parse_overrides(overrides)
    return _validated(cls, apply_overrides(dict(mapping), parsed), JobText(where, None, parsed), check_files=False)


def _read(path: str | Path, overrides: Sequence[str]) -> tuple[dict[str, Any], JobText]:
    name = str(path)
    text = read_text(path)
    ConfigError.raise_all(_keys_in(name, text, overrides))
    document = parse(text, name)
    if document.values is None:
        raise ConfigError.at(name, "empty file", "fields of a job (name: value)")
    if not isinstance(document.values, dict):
        got = "a list" if isinstance(document.values, list) else "a single value"
        raise ConfigError.at(name, "not a job file", "fields of a job (name: value)", got)
    parsed = _parse_overrides(overrides)
    return apply_overrides(document.values, parsed), JobText(name, document, parsed)


def _keys_in(name: str, text: str, overrides: Sequence[str]) -> list[Problem]:
    """One problem for each line or override that holds what looks like a key; it is not shown."""
    places = [(f"{name}:{number}", line) for number, line in enumerate(text.splitlines(), start=1)]
    places += [(f"override {override.partition('=')[0]}", override) for override in overrides]
    return [Problem(where, f"holds {kind}", fix=ELSEWHERE) for where, line in places for kind in secrets_in(line)]


def _parse_overrides(texts: Sequence[str | Override]) -> list[Override]:
    parsed: list[Override] = []
    problems: list[Problem] = []
    for text in texts:
        try:
            parsed.append(text if isinstance(text, Override) else parse_override(text))
        except ConfigError as error:
            problems += error.problems
    ConfigError.raise_all(problems)
    return parsed


def _validated(cls: type[S], values: dict[str, Any], source: JobText, check_files: bool) -> S:
    other = job_of_another_stage(cls, values)
    if other:
        raise ConfigError.at(source.name, other[0], fix=other[1])
    try:
        config = cls.model_validate(values)
    except ValidationError as error:
        raise ConfigError(in_order(explain.problems(error, cls, values, source.where))) from None
    if isinstance(config, PipelineConfig):
        ConfigError.raise_all(in_order(_stage_problems(config, values, source)))
    if check_files:
        ConfigError.raise_all(in_order(check_paths(config, source.where)))
    return config


def _without_unused(config: S, source: JobText) -> S:
    """`config`, unless a field is set that has no effect beside the others.

    Of data that a stage has from another, that other one tells."""
    stages: dict[Loc, Section] = {(): config}
    if isinstance(config, PipelineConfig):
        stages = {(stage,): config.stage_config(stage) for stage in config.stages}
    ConfigError.raise_all(
        in_order(
            [
                Problem(source.where((*loc, *found.field.split("."))), f"has no effect {found.why}")
                for loc, section in stages.items()
                if isinstance(section, JobFields)
                for found in unused_fields(section)
                if not (loc and found.field.startswith("data.") and "data" not in getattr(config, str(loc[0])))
            ]
        )
    )
    return config


def _stage_problems(config: PipelineConfig, values: dict[str, Any], source: JobText) -> list[Problem]:
    """Problems of the stage sections of a pipeline, each validated as the stage will see it."""
    problems: list[Problem] = []
    for stage in config.stages:
        try:
            config.stage_config(stage)
        except ValidationError as error:
            where = partial(_at_stage, source, stage)
            problems += explain.problems(error, STAGES[stage], values.get(stage) or {}, where)
    if not problems:
        problems += [
            Problem(source.where((stage, "data")), what, "one data.held_out_fraction along the chain", fix=fix)
            for stage, what, fix in held_out_conflicts(config)
        ]
    return problems


def _at_stage(source: JobText, stage: str, loc: Loc) -> str:
    return source.where((stage, *loc))
