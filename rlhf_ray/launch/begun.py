"""What a job goes on with: the configuration that is in its folder, and the defaults that it was begun under."""

from __future__ import annotations

from typing import Any, TypeVar

from rlhf_ray.config import JobFields, PipelineConfig
from rlhf_ray.config.sections import under
from rlhf_ray.config.stored import version_of
from rlhf_ray.errors import ArtifactError
from rlhf_ray.storage.object_store import copied_config
from rlhf_ray.storage.run_folder import is_run, open_run

C = TypeVar("C", bound=JobFields)


def begun(config: JobFields) -> dict[str, Any] | None:
    """The configuration of the run that goes on, or of a stage in it; None for a new one.

    None also if it cannot be read: a run may have been killed before it was written, which the stage mends, and else tells."""
    places = [(config.output_dir, config.copy_to)]
    if isinstance(config, PipelineConfig):
        copies = [None if config.copy_to is None else under(config.copy_to, stage) for stage in config.stages]
        places += [(f"{config.output_dir}/{stage}", uri) for stage, uri in zip(config.stages, copies)]
    for folder, uri in places:
        if is_run(folder):
            try:
                return open_run(folder, verify=False).config()
            except ArtifactError:
                return None
        if config.resume == "auto" and uri is not None and (copied := copied_config(uri)) is not None:
            return copied
    return None


def with_defaults_as_begun(config: C) -> C:
    """`config`; if it says nothing of `defaults_version` and goes on with a run of another one, under that run's defaults."""
    if "defaults_version" in config.model_fields_set or (before := begun(config)) is None:
        return config
    version = version_of(before)
    if version == config.defaults_version:
        return config
    return type(config)(**{**config.model_dump(exclude_unset=True), "defaults_version": version})
