"""What a path in a job file stands for: a policy, or a reward model. Only looks; loads nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.storage.run_folder import RunFolder, is_run, open_run

_AT_STEP = re.compile(r"(?P<run>.+)@(?P<step>\d+)")


@dataclass(frozen=True)
class ModelSpec:
    """kind: `base` (the job's own base model), `adapter` (a PEFT folder) or `full` (a whole checkpoint).

    path: the adapter or checkpoint folder or Hub id.  run: the run it came from, if it is one of ours."""

    kind: Literal["base", "adapter", "full"]
    path: str
    run: RunFolder | None = None

    def describe(self) -> str:
        return {"base": "the base model", "adapter": f"adapter {self.path}", "full": f"checkpoint {self.path}"}[
            self.kind
        ]


def split_step(spec: str) -> tuple[str, int | None]:
    """RUN@STEP -> (RUN, STEP). (spec, None) for anything else, and for a folder that has such a name itself."""
    found = _AT_STEP.fullmatch(spec)
    return (found["run"], int(found["step"])) if found and not Path(spec).exists() else (spec, None)


def policy_source(spec: str) -> ModelSpec:
    """`base`, a run folder, RUN@STEP, an adapter folder or a whole checkpoint. Raises ConfigError, ArtifactError."""
    if spec == "base":
        return ModelSpec("base", "base")
    place, step = split_step(spec)
    if step is not None:
        run = open_run(place)
        return ModelSpec("adapter", str(run.checkpoint(step).adapter_dir), run)
    return _folder_source(spec, "a run, RUN@STEP, an adapter folder or a checkpoint")


def reward_source(spec: str) -> ModelSpec:
    """A reward run or the merged checkpoint of one."""
    source = _folder_source(spec, "a reward run or a sequence-classification checkpoint")
    if source.run is not None and source.run.stage != "reward":
        raise ArtifactError.at(
            spec, "is not a reward run", "a run of stage reward", f"a run of stage {source.run.stage}"
        )
    return source


def _folder_source(spec: str, expected: str) -> ModelSpec:
    folder = Path(spec)
    if is_run(folder):
        run = open_run(folder)
        if not (run.adapter_dir / "adapter_config.json").is_file():
            state = run.manifest()["status"]
            raise ArtifactError.at(spec, "the run has no adapter yet", "a finished run", f"status {state}")
        return ModelSpec("adapter", str(run.adapter_dir), run)
    if (folder / "adapter_config.json").is_file():
        return ModelSpec("adapter", str(folder))
    if (folder / "config.json").is_file() or not _looks_local(spec):
        return ModelSpec("full", spec)
    if not folder.exists():
        raise ConfigError.at(spec, "no such folder", expected)
    raise ArtifactError.at(spec, "holds no adapter_config.json, config.json or run manifest", expected)


def _looks_local(spec: str) -> bool:
    return spec.startswith((".", "/", "~")) or spec.count("/") != 1 or Path(spec.split("/")[0]).exists()
