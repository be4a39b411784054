"""All of the doctor's looks, in order."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_ray.config import JobFields
from rlhf_ray.config.load import load_any
from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.doctor import cluster as there
from rlhf_ray.doctor import here
from rlhf_ray.doctor import job as jobs
from rlhf_ray.doctor.checks import CheckResult
from rlhf_ray.submit.pack import make


def examine(
    job: str | None = None,
    overrides: Sequence[str] = (),
    *,
    address: str | None = None,
    model: str | None = None,
    template: str | None = None,
    storage: str | None = None,
    stage: str | None = None,
) -> list[CheckResult]:
    """This machine; with an address the cluster; with a job or a model their tokens, placement and files.

    Raises ConfigError for a job file that is none."""
    config: JobFields | ServeConfig | None = None
    if job is not None:
        _, config = load_any(job, overrides, stage, check_files=address is None)
    found = list(here.machine())
    machines = None
    if address is not None:
        read, folder = _paths(config, stage, job, overrides, storage)
        cluster, told = there.access(address)
        found += told
        if cluster is not None:
            answers, told = there.nodes(cluster, folder, read)
            found += told
            machines = there.machines(answers)
    if config is not None:
        found += jobs.placement(config, machines)
        found += jobs.quantised(config, next(f for f in found if f.name == "bitsandbytes"))
        templates: list[str | None] = [*jobs.templates_of(config)]
        for each in templates or [None]:
            found += jobs.tokens(model or config.model_name_or_path, config.revision, template or each)
    elif model is not None:
        found += jobs.tokens(model, None, template)
    return list(dict.fromkeys(found))


def _paths(
    config: JobFields | ServeConfig | None,
    stage: str | None,
    job: str | None,
    overrides: Sequence[str],
    storage: str | None,
) -> tuple[list[str], str | None]:
    """What the nodes must read, and the folder that they must share."""
    if config is None or job is None:
        return [], storage
    command, _ = load_any(job, overrides, stage, check_files=False)
    parcel = make(command, config, storage)
    return [need.path for need in parcel.needs if need.kind != "module"], parcel.output_dir
