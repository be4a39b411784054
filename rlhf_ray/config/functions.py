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

STARTS = frozenset("sft dpo reward ppo evaluate generate score pipeline sweep resume merge main".split())
"""Calls whose answer a script keeps, and that must not run twice; other assignments (a constant, a model to ask) are let be."""


def function_name(value: Callable[..., Any]) -> str:
    """The name that other processes import the function by.

    Raises ValueError for a callable without such a name: lambdas, methods, nested and interactive functions, and those of a script
    that would start its work again when it is imported."""
    if not inspect.isfunction(value) or value.__name__ != value.__qualname__ or not value.__name__.isidentifier():
        raise ValueError(
            f"function: other processes cannot import {_shown(value)}; expected a function defined with `def` at the top of a file"
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
    """The line of the first statement at the script's top level that does more than define or import; None if there is none."""
    for node in ast.parse(script.read_bytes()).body:
        if isinstance(node, ast.If) and "__name__" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
            return node.lineno
        if isinstance(node, (ast.For, ast.While, ast.With)):
            return node.lineno
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and _called(node.value) in STARTS:
            return node.lineno
    return None


def _called(value: ast.expr | None) -> str:
    """The last name of the function whose answer is assigned, as `ppo` of `run = rlhf_ray.ppo(...)`; empty if it is no call."""
    function = value.func if isinstance(value, ast.Call) else None
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
