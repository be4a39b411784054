"""What every header of a training run says: the fields that its job sets."""

from __future__ import annotations

from typing import Any

from rlhf_ray.config import JobFields


def config_line(config: JobFields) -> str:
    """Every field that the job sets; the run's config.yaml has them all."""
    return f"config     {', '.join(f'{k}={v}' for k, v in changed_fields(config.model_dump(exclude_unset=True)))}"


def changed_fields(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted name, value) of every field that the job sets."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += changed_fields(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, ",".join(map(str, value)) if isinstance(value, tuple) else value))
    return found
