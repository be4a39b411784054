"""Do the models, runs and reward functions that a job names exist? Asked before anything is loaded (exit 2).

Data files are not asked for here: the data reader does that (exit 4). What is inside a folder is the reader's matter as well
(exit 5).
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from rlhf_ray.config.deepspeed import deepspeed_problems
from rlhf_ray.config.endpoints import is_built_in
from rlhf_ray.config.hints import did_you_mean, nearest_sibling
from rlhf_ray.config.pipeline import PipelineConfig
from rlhf_ray.config.sections import Section
from rlhf_ray.config.yaml_reader import Loc, dotted
from rlhf_ray.errors import Problem

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
Where = Callable[[Loc], str]


def check_paths(config: Section, where: Where = dotted) -> list[Problem]:
    """One problem for each local model, run, adapter, template, DeepSpeed file and reward function that does not exist, and for
    each key of the DeepSpeed file that the job sets itself.

    A name that can only be a Hub id is not looked up, except that offline it must be in the local cache. Folders that a
    pipeline makes itself are left out. `where` turns a field path into the place to blame.
    """
    if not isinstance(config, PipelineConfig):
        return [replace(problem, where=where(loc)) for loc, problem in _missing(config)]
    problems: list[Problem] = []
    for stage in config.stages:
        own, shared = getattr(config, stage), config.model_fields_set
        for loc, problem in _missing(config.stage_config(stage), made=f"{config.output_dir}/"):
            if loc[0] in own:
                problems.append(replace(problem, where=where((stage, *loc))))
            elif loc[0] in shared:
                problems.append(replace(problem, where=where(loc)))
            # else another stage's section says it, and it is told there
    return list(dict.fromkeys(problems))


def _missing(config: Section, made: str | None = None) -> Iterator[tuple[Loc, Problem]]:
    """Field and problem, its place left open. Folders under `made` will be made by the job itself."""
    for loc, path, hub in _named_folders(config):
        name = path.rpartition("@")[0] if re.search(r"@\d+$", path) else path
        found = _folder_problem(name, hub)
        if found is not None and not (made is not None and f"{name}/".startswith(made)):
            yield loc, found
    for loc, file in _named_files(config):
        if not os.path.isfile(file):
            yield loc, Problem("", "no such file", got=str(file), fix=nearest_sibling(file))
        elif loc == ("learner", "deepspeed"):
            for problem in deepspeed_problems(str(file), config.learner.zero_stage):  # type: ignore[attr-defined]
                yield loc, replace(problem, what=f"{file}: {problem.what}")
    for index, reward in enumerate(getattr(config, "rewards", ())):
        found = _function_problem(reward.function) if reward.function is not None else None
        if found is not None:
            yield ("rewards", index, "function"), found


def _named_folders(config: Section) -> Iterator[tuple[Loc, str, bool]]:
    """Field, path and whether it may be a Hub id."""
    for name, hub in (("model_name_or_path", True), ("sft", False)):
        path = getattr(config, name, None)
        if path is not None:
            yield (name,), path, hub
    for name, spec in getattr(config, "adapters", {}).items():
        yield ("adapters", name), spec, False
    for i, reward in enumerate(getattr(config, "rewards", ())):
        if reward.run is not None:
            yield ("rewards", i, "run"), reward.run, False
        for member, path in enumerate(reward.ensemble or ()):
            yield ("rewards", i, "ensemble", member), path, False
        if reward.model is not None:
            yield ("rewards", i, "model"), reward.model, True
    for i, spec in enumerate(getattr(config, "policies", ())):
        if spec.policy not in ("base", None):
            yield ("policies", i, "policy"), spec.policy, True


def _named_files(config: Section) -> Iterator[tuple[Loc, Path]]:
    template = getattr(config, "template", None) or ""
    if template.endswith(".json") or "/" in template:
        yield ("template",), Path(template).expanduser()
    learner = getattr(config, "learner", None)
    if learner is not None and learner.deepspeed is not None:
        yield ("learner", "deepspeed"), Path(learner.deepspeed)
    for i, reward in enumerate(getattr(config, "rewards", ())):
        for j, annotator in enumerate(reward.llm.annotators if reward.llm is not None else ()):
            if annotator.prompt is not None and not is_built_in(annotator.prompt):
                yield ("rewards", i, "llm", "annotators", j, "prompt"), Path(annotator.prompt)
    for i, spec in enumerate(getattr(config, "policies", ())):
        if spec.outputs is not None:
            yield ("policies", i, "outputs"), Path(spec.outputs)


def _folder_problem(name: str, hub: bool) -> Problem | None:
    """None if the folder exists or the name is left to the Hub."""
    path = Path(name)
    if os.path.isdir(path):  # unlike Path.is_dir it does not raise, whatever the name
        return None
    expected = "a folder or a Hub id" if hub else "a folder"
    if os.path.exists(path):
        return Problem("", "is a file", expected, name)
    if not hub or not _HUB_ID.fullmatch(name) or ("/" in name and os.path.isdir(name.split("/")[0])):
        fix = "write the path without ~" if name.startswith("~") else nearest_sibling(path)
        return Problem("", "no such folder", expected, name, fix)
    offline = next((v for v in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_set(v)), None)
    if offline is None or (_hub_cache() / f"models--{name.replace('/', '--')}").is_dir():
        return None
    what = f"not found locally, and {offline} is set (offline mode)"
    return Problem("", what, expected, name, f"give a folder, or unset {offline}")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")


def user_cache(*parts: str) -> Path:
    """A folder of this package in the user's cache: $XDG_CACHE_HOME, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").joinpath("rlhf_ray", *parts)


def _hub_cache() -> Path:
    """Where huggingface_hub keeps models, by its documented variables (importing it would cost half a second)."""
    if "HF_HUB_CACHE" in os.environ:
        return Path(os.environ["HF_HUB_CACHE"])
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("HF_HOME", cache / "huggingface")) / "hub"


def _function_problem(function: str) -> Problem | None:
    """Does the file, or module, of `file.py:name` exist and bind the name? The file is read, not run."""
    module, _, name = function.rpartition(":")
    file = Path(module)
    if not module.endswith(".py"):
        top = module.split(".")[0]
        here = os.path.isdir(top) or os.path.isfile(f"{top}.py")
        if top.isidentifier() and (here or importlib.util.find_spec(top)):
            return None
        expected = "file.py:function or module:function"
        return Problem("", "no such module", expected, top, "install it, or run from its folder")
    if not os.path.isfile(file):
        return Problem("", "no such file", got=module, fix=nearest_sibling(file))
    try:
        tree = ast.parse(file.read_bytes(), filename=module)
    except (SyntaxError, ValueError) as error:
        return Problem("", f"{module} is not valid Python: {error}")
    names = {bound for node in tree.body for bound in _bound_names(node)}
    if name in names or "*" in names:
        return None
    return Problem("", f"{module} has no function {name}", fix=did_you_mean(name, names))


def _bound_names(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from (alias.asname or alias.name for alias in node.names)
    else:
        yield from (n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
