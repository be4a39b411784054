"""What every header of a training run says: the fields that its job sets."""

from __future__ import annotations

from typing import Any

from rlhf_ray.config import JobFields


def config_line(config: JobFields) -> str:
    """Every field that the job sets; the run's config.yaml has them all. Of a job that sets all of them, as a resumed one does,
    those that are not at their defaults."""
    sets_all = config.model_fields_set >= type(config).model_fields.keys()
    values = config.model_dump(exclude_unset=True, exclude_defaults=sets_all)
    return f"config     {', '.join(f'{k}={v}' for k, v in changed_fields(values))}"


def changed_fields(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted name, value) of every field that the job sets."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += changed_fields(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, ",".join(map(str, value)) if isinstance(value, tuple) else value))
    return found
