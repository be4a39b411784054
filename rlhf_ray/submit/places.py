"""The paths that a job names, of every kind of job, and a copy of the job with each of them changed.

kinds of paths: output (a folder that the job writes), folder (a run, an adapter, a registry), model (a folder or a Hub id), data (a
file or a Hub id), text (a small file that the job reads: template, DeepSpeed), keys (a file that lives on the nodes), function
(file.py:name or module:name).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from rlhf_ray.config import STAGES
from rlhf_ray.config.endpoints import is_built_in
from rlhf_ray.config.yaml_reader import Loc

Kind = Literal["output", "folder", "model", "data", "text", "keys", "function"]
Visit = Callable[[Loc, Kind, str], str]
BUILT_IN = re.compile(r"[a-z_]+")
"""A template's name; a path has a dot or a slash."""


def replaced(command: str, values: Mapping[str, Any], visit: Visit) -> dict[str, Any]:
    """The job with what `visit(field, kind, path)` gives for each path in it.   command: sft, ..., pipeline, sweep, serve."""
    found = copy.deepcopy(dict(values))
    sections: list[tuple[Loc, dict[str, Any]]] = [((), found)]
    inner = {"pipeline": tuple(STAGES), "sweep": ("ppo", "dpo", "evaluate")}.get(command, ())
    sections += [((name,), found[name]) for name in inner if isinstance(found.get(name), dict)]
    for loc, section in sections:
        _section(loc, section, visit)
    return found


def _section(loc: Loc, section: dict[str, Any], visit: Visit) -> None:
    for name, kind in _PLAIN.items():
        if isinstance(section.get(name), str):
            section[name] = visit((*loc, name), kind, section[name])
    _template((*loc, "template"), section, visit)
    _one((*loc, "learner", "deepspeed"), section.get("learner"), "text", visit)
    for rows in ("data", "ptx_data"):
        for part in ("train", "eval", "held_out_prompts"):
            _one((*loc, rows, part), section.get(rows), "data", visit)
    for index, reward in enumerate(section.get("rewards") or ()):
        for name, kind in _REWARD.items():
            _one((*loc, "rewards", index, name), reward, kind, visit)
        _template((*loc, "rewards", index, "template"), reward, visit)
        _judge((*loc, "rewards", index, "llm"), reward.get("llm") if isinstance(reward, dict) else None, visit)
    for index, spec in enumerate(section.get("policies") or ()):
        if isinstance(spec, dict) and spec.get("policy") != "base":
            _one((*loc, "policies", index, "policy"), spec, "model", visit)
            _one((*loc, "policies", index, "outputs"), spec, "data", visit)
            _one((*loc, "policies", index, "endpoint", "headers_file"), spec.get("endpoint"), "keys", visit)
    adapters = section.get("adapters")
    for name in adapters if isinstance(adapters, dict) else ():
        _one((*loc, "adapters", name), adapters, "folder", visit)


_PLAIN: dict[str, Kind] = {
    "output_dir": "output",
    "model_name_or_path": "model",
    "sft": "folder",
    "registry": "folder",
    "api_keys": "keys",
}
_REWARD: dict[str, Kind] = {
    "run": "folder",
    "ensemble": "folder",
    "model": "model",
    "function": "function",
    "headers_file": "keys",
}


def _judge(loc: Loc, llm: Any, visit: Visit) -> None:
    _one((*loc, "headers_file"), llm, "keys", visit)
    _one((*loc, "cache_dir"), llm, "output", visit)
    for index, annotator in enumerate(llm.get("annotators") or ()) if isinstance(llm, dict) else ():
        prompt = annotator.get("prompt") if isinstance(annotator, dict) else None
        if isinstance(prompt, str) and not is_built_in(prompt):
            _one((*loc, "annotators", index, "prompt"), annotator, "text", visit)


def _one(loc: Loc, section: Any, kind: Kind, visit: Visit) -> None:
    """The value at the end of `loc`: a path, or a list of them."""
    name = loc[-1]
    value = section.get(name) if isinstance(section, dict) else None
    if isinstance(value, str):
        section[name] = visit(loc, kind, value)
    elif isinstance(value, (list, tuple)):
        section[name] = [visit((*loc, i), kind, v) if isinstance(v, str) else v for i, v in enumerate(value)]


def _template(loc: Loc, section: Any, visit: Visit) -> None:
    name = section.get("template") if isinstance(section, dict) else None
    if isinstance(name, str) and not BUILT_IN.fullmatch(name):
        _one(loc, section, "text", visit)
