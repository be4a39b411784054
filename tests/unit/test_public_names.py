"""`from rlhf_ray import ...`: one list of names, each importable in any order, and the same list for type checkers."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf_ray

SOURCE = Path(rlhf_ray.__file__).read_text(encoding="utf-8")


def names_for_type_checkers() -> set[str]:
    [block] = [n for n in ast.parse(SOURCE).body if isinstance(n, ast.If)]
    imported = {a.asname or a.name for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    return imported | {
        n.target.id for n in block.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    }


def test_type_checkers_see_the_same_names() -> None:
    assert names_for_type_checkers() == set(rlhf_ray.__all__)


def test_what_the_contract_names_is_there() -> None:
    commands = {
        "sft",
        "reward",
        "ppo",
        "evaluate",
        "generate",
        "score",
        "pipeline",
        "sweep",
        "resume",
        "merge",
        "load_run",
    }
    configs = {
        "SFTConfig",
        "RewardConfig",
        "PPOConfig",
        "EvaluateConfig",
        "PipelineConfig",
        "SweepConfig",
        "ServeConfig",
    }
    errors = {
        "RlhfRayError",
        "ConfigError",
        "ResourceError",
        "DataError",
        "ArtifactError",
        "InvariantError",
        "Interrupted",
    }
    assert commands | configs | errors <= set(rlhf_ray.__all__) <= set(dir(rlhf_ray))


@pytest.mark.parametrize("name", sorted(set(rlhf_ray.__all__) - {"__version__"}))
def test_every_name_can_be_imported(name: str) -> None:
    assert callable(getattr(rlhf_ray, name))


@pytest.mark.parametrize("first", ["", "import rlhf_ray.ppo.loop, rlhf_ray.sweep.sweep; "])
def test_a_package_is_its_function_whatever_was_imported_before(first: str) -> None:
    code = first + (
        "from rlhf_ray import ppo, sweep\n"
        "import inspect, rlhf_ray.stages.start as loop, rlhf_ray.sweep.sweep as search\n"
        "assert inspect.signature(ppo) == inspect.signature(loop.ppo)\n"
        "assert inspect.signature(sweep) == inspect.signature(search.sweep)\n"
        "loop.ppo = search.sweep = lambda *given, **named: (given, named)\n"
        "assert ppo(1, console=2) == sweep(1, console=2) == ((1,), {'console': 2})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'dpoo'"):
        rlhf_ray.dpoo  # noqa: B018
    assert inspect.ismodule(rlhf_ray.ppo)
