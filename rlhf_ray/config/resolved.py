"""A configuration written out in full, and the difference between two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from rlhf_ray.config.sections import Section
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
