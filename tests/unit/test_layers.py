"""Imports run downward only: the floors of ARCHITECTURE.md, held by reading the source, lazy imports included."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "rlhf_ray"

FLOORS = {
    "errors": 0,
    "callable_package": 0,
    "config": 0,
    "maths": 1,
    "batches": 1,
    "json_lines": 1,
    "ray_metrics": 1,
    "metrics": 1,
    "console": 1,
    "runtime": 2,
    "report": 2,
    "storage": 3,
    "data": 4,
    "models": 5,
    "sampler": 6,
    "rewards": 7,
    "roles": 8,
    "launch": 9,
    "training": 10,
    "supervised": 11,
    "ppo": 11,
    "stages": 12,
    "plan": 12,
    "sweep": 13,
    "registry": 13,
    "serve": 13,
    "chat": 13,
    "submit": 13,
    "doctor": 13,
    "cli": 14,
    "__init__": 14,  # names every floor, lazily; nothing but the cli may import from it
}


def part_of(module: str) -> str:
    """The part of the package that a dotted name belongs to: `rlhf_ray.maths.kl` -> `maths`, `rlhf_ray` -> `__init__`."""
    return (module.split(".") + ["__init__"])[1]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def parsed(source: str) -> tuple[list[ast.Import | ast.ImportFrom], list[str]]:
    """Import statements, wherever they stand in `source`, and its classes at the top; each file is parsed once for all tests."""
    tree = ast.parse(source)
    found = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return found, [node.name for node in tree.body if isinstance(node, ast.ClassDef)]


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def imports(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything of ours that `source` imports, wherever in the file."""
    for node in parsed(source)[0]:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            base = node.module or ""
            if node.level:
                here = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*here[: len(here) - node.level + 1], *filter(None, [node.module])])
            if base == "rlhf_ray":  # `from rlhf_ray import maths` takes a part, any other name is __init__'s own
                names = [f"rlhf_ray.{a.name}" if a.name in FLOORS else "rlhf_ray" for a in node.names]
            else:
                names = [base]
        for name in names:
            if name.split(".")[0] == "rlhf_ray":
                yield node.lineno, name


def upward(source: str, module: str, is_package: bool = False) -> list[str]:
    """One line for each import that climbs."""
    own = FLOORS[part_of(module)]
    return [
        f"{module}:{line}: floor {own} imports {name} of floor {FLOORS[part_of(name)]}"
        for line, name in imports(source, module, is_package)
        if FLOORS[part_of(name)] > own
    ]


MODULES = sorted(PACKAGE.rglob("*.py"))


def test_modules_are_found_and_each_has_a_floor() -> None:
    assert len(MODULES) > 20
    parts = {part_of(module_name(path)) for path in MODULES}
    assert parts <= FLOORS.keys(), f"give these a floor: {sorted(parts - FLOORS.keys())}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_run_downward(path: Path) -> None:
    module = module_name(path)
    if module == "rlhf_ray":
        return
    assert upward(text_of(path), module, path.stem == "__init__") == []


@pytest.mark.parametrize(
    ("source", "module", "climbs"),
    [
        ("from rlhf_ray.stages.start import ppo", "rlhf_ray.maths.kl", True),
        ("def f():\n    import rlhf_ray.cli", "rlhf_ray.roles.learner", True),
        ("from rlhf_ray import roles", "rlhf_ray.models.heads", True),
        ("from rlhf_ray import merge", "rlhf_ray.stages.demo", True),
        ("from ..ppo import loop", "rlhf_ray.maths.kl", True),
        ("from . import kl", "rlhf_ray.maths.returns", False),
        ("from rlhf_ray.errors import ConfigError\nimport torch", "rlhf_ray.maths.kl", False),
        ("from rlhf_ray.models import heads", "rlhf_ray.ppo.loop", False),
    ],
)
def test_the_check_sees_what_it_should(source: str, module: str, climbs: bool) -> None:
    assert bool(upward(source, module)) is climbs


def test_every_file_that_architecture_names_is_there() -> None:
    text = (PACKAGE.parent / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]*(?:\.py)?|[a-z_]+\.py)`", text)) - {"adapter/", "value/"}
    assert len(named) > 60
    assert sorted(n for n in named if not (PACKAGE / n).exists() and not (PACKAGE.parent / n).exists()) == []


def test_every_import_of_ours_leads_to_a_module() -> None:
    """mypy does not report a lazy import of a module that was renamed."""
    sources = [*MODULES, *(PACKAGE.parent / "tests").rglob("*.py"), *(PACKAGE.parent / "benchmarks").rglob("*.py")]
    lost = []
    for path in sources:
        for line, name in imports(text_of(path), path.stem):
            place = PACKAGE.parent / Path(*name.split("."))
            if not (place.is_dir() or place.with_suffix(".py").is_file()):
                lost.append(f"{path.relative_to(PACKAGE.parent)}:{line}: {name}")
    assert lost == []


def modules_imported(path: Path) -> set[str]:
    """Dotted names of our modules that a file imports, `from package import module` included, for type checkers alone included."""
    module, found = module_name(path), set()
    for node in parsed(text_of(path))[0]:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "rlhf_ray":
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("rlhf_ray.") and name != module}


def test_no_two_files_import_each_other() -> None:
    graph = {module_name(path): modules_imported(path) for path in MODULES if path.stem != "__init__"}
    mutual = sorted((a, b) for a, names in graph.items() for b in names if a < b and a in graph.get(b, ()))
    assert mutual == []


def test_no_room_holds_more_than_its_share() -> None:
    sizes: dict[str, int] = {}
    for path in MODULES:
        room = part_of(module_name(path))
        sizes[room] = sizes.get(room, 0) + len(text_of(path).splitlines())
    total = sum(sizes.values())
    assert {room: f"{size / total:.1%}" for room, size in sizes.items() if size > 0.15 * total} == {}


def test_no_two_classes_share_a_name() -> None:
    """One name, one concept. Private helpers (a leading underscore) are their file's own business."""
    places: dict[str, list[str]] = {}
    for path in MODULES:
        for name in parsed(text_of(path))[1]:
            if not name.startswith("_"):
                places.setdefault(name, []).append(module_name(path))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
