"""A configuration written out in full, and the difference between two."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from rlhf_ray.config.defaults import FOLLOWS
from rlhf_ray.config.pipeline import PipelineConfig
from rlhf_ray.config.sections import Section
from rlhf_ray.config.stages import JobFields
from rlhf_ray.config.yaml_reader import JobLoader


class _JobDumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or our 1.2 reader would take for something else, and writes no aliases."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's way of naming them)
        first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, []) + JobLoader.yaml_implicit_resolvers.get(first, [])
        for first in yaml.SafeDumper.yaml_implicit_resolvers.keys() | JobLoader.yaml_implicit_resolvers.keys()
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _JobDumper, text: str) -> yaml.ScalarNode:
    """Double quotes, with escapes, for the rare line breaks that PyYAML would write as they are and read as spaces."""
    style = '"' if any(c in text for c in "\r\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_JobDumper.add_representer(str, _represent_text)


def to_dict(config: Section) -> dict[str, Any]:
    """Every field with its value, in the order of the class, as JSON types. `type(config)` accepts it and gives an equal object."""
    return config.model_dump(mode="json")


def written_out(config: JobFields) -> dict[str, Any]:
    """Every field with its value, as `to_dict`; of a pipeline also those of its stages."""
    values = to_dict(config)
    if isinstance(config, PipelineConfig):
        for stage in config.stages:
            values[stage] = stage_values(config.stage_config(stage), values[stage], config.wiring(stage))
    return values


def stage_values(config: Section, given: Mapping[str, Any], left: Collection[str]) -> dict[str, Any]:
    """The section of a larger job that makes `config`: what it has now (`given`), and defaults that are constants for the rest.

    left: fields that stay as they are given. So do those that all stages have, and those whose default follows from another
    field, which may yet change."""
    values = to_dict(config)
    for name in FOLLOWS:
        section, _, inner = name.rpartition(".")
        if section in values and inner not in (given.get(section) or {}):
            values[section].pop(inner, None)
    open_ones = values.keys() - given.keys()
    as_given = set(left) | {name for name in open_ones if name in JobFields.model_fields or name in FOLLOWS}
    kept = {name: value for name, value in values.items() if name not in as_given}
    return {**kept, **{name: value for name, value in given.items() if name in as_given}}


def dump_yaml(values: Mapping[str, Any]) -> str:
    """`values` (JSON types) as YAML that our reader and readers of YAML 1.1 take for the same."""
    return yaml.dump(dict(values), Dumper=_JobDumper, sort_keys=False, allow_unicode=True, width=100)


def to_yaml(config: Section) -> str:
    """The resolved job file: loading it gives an equal configuration."""
    return dump_yaml(to_dict(config))


@dataclass(frozen=True)
class FieldChange:
    """A field (dotted) that differs. A section that is only on one side shows as None on the other."""

    field: str
    old: Any
    new: Any


def diff(old: Section | Mapping[str, Any], new: Section | Mapping[str, Any]) -> list[FieldChange]:
    """The fields that differ, in the order of `old`, then those that only `new` has."""
    return _diff(_plain(old), _plain(new), "")


def _plain(config: Section | Mapping[str, Any]) -> Mapping[str, Any]:
    return to_dict(config) if isinstance(config, Section) else config


def _diff(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> list[FieldChange]:
    changes = []
    for name in dict.fromkeys([*old, *new]):
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            changes += _diff(a, b, f"{prefix}{name}.")
        elif a != b:
            changes.append(FieldChange(prefix + name, a, b))
    return changes
