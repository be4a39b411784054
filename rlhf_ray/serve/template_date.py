"""The date that the base's chat template says, pinned when the service starts: the same in every replica, whenever that starts.

An adapter has the date of its run (launch/template_date.py). A base that asks the clock would read another prompt than the adapters
that it is compared with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from itertools import islice

from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.errors import RlhfRayError
from rlhf_ray.models.lineage import promoted_manifest, recorded_date
from rlhf_ray.models.specs import policy_source
from rlhf_ray.registry import Registry

NAMES_READ = 100
"""Of a registry, for their dates: a start costs the same with ten thousand."""


def with_template_date(config: ServeConfig) -> ServeConfig:
    """`config` with a `template_date`, if its template is the tokenizer's own: the one that its policies record; now if they record
    several, or none."""
    if config.template_date is not None or config.template not in (None, "chat"):
        return config
    dates = {*_of_runs(config), *_of_registry(config)} - {None}
    date = dates.pop() if len(dates) == 1 else datetime.now().isoformat(timespec="seconds")
    return config.model_copy(update={"template_date": date})


def _of_runs(config: ServeConfig) -> Iterator[str | None]:
    """What cannot be read is told by the replicas."""
    for spec in config.adapters.values():
        with suppress(RlhfRayError, OSError):
            source = policy_source(spec)
            if source.run is None or source.run.stage != "reward":
                yield recorded_date(source)


def _of_registry(config: ServeConfig) -> Iterator[str | None]:
    if config.registry is None:
        return
    registry = Registry(config.registry)
    for name in islice(registry.listed(), NAMES_READ):
        with suppress(RlhfRayError, OSError):
            alias = registry.alias(name)
            live = alias.versions[alias.live] if alias.live is not None else {"kind": "reward"}
            if live["kind"] != "reward":
                manifest = promoted_manifest(registry.path / "adapters" / live["id"]) or {}
                yield (manifest.get("template") or {}).get("date")
