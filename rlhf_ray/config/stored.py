"""The configuration that a run has on disk, which an older version may have written, as this version understands it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from rlhf_ray.config import STAGES, JobFields, PipelineConfig
from rlhf_ray.config.explain import real_loc
from rlhf_ray.config.load import load_dict
from rlhf_ray.config.sections import Section
from rlhf_ray.config.yaml_reader import Loc, Override, dotted
from rlhf_ray.errors import ConfigError, Problem

S = TypeVar("S", bound=Section)


def load_stored(cls: type[S], values: Mapping[str, Any], where: str, overrides: Sequence[str | Override] = ()) -> S:
    """`values`, read from the file `where`, with `overrides` (`a.b=c`), as a `cls`.

    A field that is not there came later: the run had its default, under the defaults that the run was begun with. One that this
    version has no more is passed over if it was off (null, false, 0, empty). Otherwise ConfigError names it: the run would be
    another one without it."""
    known, gone = split_known(cls, values)
    ConfigError.raise_all(
        Problem(
            f"{where}: {dotted(loc)}",
            "the run was started with a field that this version no longer has",
            got=json.dumps(value, default=str),
            fix="resume with the version named in its manifest.json, or remove the field from the file to resume without it",
        )
        for loc, value in gone
        if value
    )
    return load_dict(cls, {"defaults_version": version_of(known), **known}, where, overrides)


def version_of(values: Mapping[str, Any]) -> Any:
    """The `defaults_version` of a job that a run has on disk."""
    return values.get("defaults_version", 1)


def split_known(cls: type[Section], values: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[Loc, Any]]]:
    """`values` without the fields that `cls` does not have, at any depth; and those, each with its place and value."""
    known, gone = copy.deepcopy(dict(values)), []
    try:
        cls.model_validate(known)
    except ValidationError as error:
        for detail in error.errors():
            if detail["type"] == "extra_forbidden":
                loc = real_loc(detail["loc"], cls, known)
                gone.append((loc, _take_out(known, loc)))
    return known, gone


def _take_out(values: Any, loc: Loc) -> Any:
    for part in loc[:-1]:
        values = values[part]
    return values.pop(loc[-1])


def config_class(stage: str) -> type[JobFields]:
    """The configuration class of a run's stage. Raises ConfigError."""
    classes: dict[str, Any] = {**STAGES, "pipeline": PipelineConfig, "demo": PipelineConfig}
    if stage not in classes:
        raise ConfigError.at("stage", "unknown", f"one of {', '.join(classes)}", stage)
    return classes[stage]
