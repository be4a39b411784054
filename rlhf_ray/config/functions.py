"""A reward function given in Python, as TRL takes them, becomes the name that job files use: `file.py:name` or `pkg.mod:name`.

Workers, actors and a resumed run import the function by that name, and the run folder keeps the sha256 of its file; so it must be
one that another process can import."""

from __future__ import annotations

import ast
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTS = frozenset("sft dpo reward ppo evaluate generate score pipeline sweep resume merge main asyncio.run".split())
"""Calls that must not run twice where a script is imported for its function; others at its top (a path, a model) are let be."""
IMPORTED_AS = "rlhf_ray_reward_"
"""What the module of a file that is imported for its function is called, before the file's own name."""


def function_name(value: Callable[..., Any]) -> str:
    """The name that other processes import the function by.

    Raises ValueError for a callable without such a name: lambdas, methods, nested and interactive functions, and those of a script
    that would start its work again when it is imported."""
    if not inspect.isfunction(value) or value.__name__ != value.__qualname__ or not value.__name__.isidentifier():
        raise ValueError(
            f"function: other processes cannot import {_shown(value)}; expected a function defined with `def` at the top of a file"
        )
    if value.__module__.startswith(IMPORTED_AS):  # a job that starts while its own reward is imported would never end
        raise ValueError(
            f"function: {value.__name__} is of a file that is being imported for its reward function, and must not start a job"
            ' meanwhile; put the file\'s work under `if __name__ == "__main__":`'
        )
    module, name = sys.modules.get(value.__module__), value.__name__
    if getattr(module, name, None) is not value:
        raise ValueError(f"function: {value.__module__} has no {name} of this content; expected it under its own name")
    file = getattr(module, "__file__", None)
    if file is None or not file.endswith(".py"):
        raise ValueError(
            f"function: {name} is in no file (an interactive session); write it to one, e.g. my_reward.py, and give"
            f" my_reward.py:{name}"
        )
    is_script, below = value.__module__ == "__main__", os.path.relpath(file)
    if not is_script and ("." in value.__module__ or below.startswith(os.pardir)):
        return f"{value.__module__}:{name}"
    if is_script and (line := _acts_when_imported(Path(file))) is not None:
        raise ValueError(
            f"function: {name} is in the script that runs, and workers that import it from {file} would run line {line} again; put"
            f' the script\'s work under `if __name__ == "__main__":`, or {name} into a file of its own'
        )
    return f"{file if below.startswith(os.pardir) else below}:{name}"


def _shown(value: Any) -> str:
    return str(getattr(value, "__qualname__", None) or f"a {type(value).__name__}")


def _acts_when_imported(script: Path) -> int | None:
    """The line of the first statement at the script's top level that would start work again; None if there is none."""
    for node in ast.parse(script.read_bytes()).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if isinstance(node, ast.If) and "__name__" in ast.dump(node.test):
            continue
        if any(_called(part) in STARTS for part in ast.walk(node) if isinstance(part, ast.Call)):
            return node.lineno
    return None


def _called(call: ast.Call) -> str:
    """The last name of the function that is called, as `ppo` of `rlhf_ray.ppo(...)`; `asyncio.run` whole."""
    function = call.func
    if isinstance(function, ast.Attribute):
        return ast.unparse(function) if function.attr == "run" else function.attr
    return getattr(function, "id", "")
