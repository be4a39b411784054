"""The examples in the docstrings run, the modules stay pure, and every public function is documented."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
from pathlib import Path

import pytest

from rlhf_ray import maths

FOLDER = Path(maths.__file__).parent
MODULES = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem != "__init__")
WITH_EXAMPLES = {
    "comparisons",
    "hexfloat",
    "intervals",
    "kl",
    "losses",
    "masks",
    "returns",
    "rng",
    "schedules",
    "standard_errors",
    "stats",
}


def _load(name: str):
    return importlib.import_module(f"rlhf_ray.maths.{name}")


def test_docstring_examples_run() -> None:
    ran = {}
    for name in MODULES:
        outcome = doctest.testmod(_load(name))
        assert outcome.failed == 0, name
        ran[name] = outcome.attempted
    assert {name for name, count in ran.items() if count} == WITH_EXAMPLES


@pytest.mark.parametrize("name", MODULES)
def test_maths_imports_nothing_of_ours_but_maths_and_does_no_io(name) -> None:
    tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    ours = {m for m in imported if m.startswith("rlhf_ray")}
    assert all(m == "rlhf_ray.maths" or m.startswith("rlhf_ray.maths.") for m in ours)
    roots = {m.split(".")[0] for m in imported - ours}
    pure = {"__future__", "collections", "dataclasses", "difflib", "hashlib", "itertools", "json", "math", "operator"}
    assert roots <= pure | {"statistics", "torch", "typing"}
    calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert not calls & {"open", "print", "eval", "exec"}


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_is_documented(name) -> None:
    module = _load(name)
    public = [
        f
        for f in vars(module).values()
        if inspect.isfunction(f) and f.__module__ == module.__name__ and f.__name__[0] != "_"
    ]
    assert public or name == "controllers"
    assert all(f.__doc__ for f in public)
