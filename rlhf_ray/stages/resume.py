"""Go on with a run from its folder alone: its own configuration, its newest valid checkpoint."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from rlhf_ray.config.load import load_dict
from rlhf_ray.console import Console, LocalConsole
from rlhf_ray.models.artifact import open_run
from rlhf_ray.run import Run
from rlhf_ray.stages.pipeline import config_class


def resume(run: str | Path, console: Console | None = None) -> Run:
    """Finish the run in folder `run`; a finished one is returned as it is. Raises ConfigError, ArtifactError."""
    folder = open_run(run, verify=False)
    console = console or LocalConsole()
    if folder.stage == "demo":
        from rlhf_ray.stages.demo import demo

        return demo(folder.path, console=console)
    values = {**folder.config(), "output_dir": str(folder.path), "resume": "auto"}
    config = load_dict(config_class(folder.stage), values, str(folder.path / "config.yaml"))
    stage = import_module(f"rlhf_ray.stages.{folder.stage}")
    done: Run = getattr(stage, folder.stage)(config, console)
    return done
