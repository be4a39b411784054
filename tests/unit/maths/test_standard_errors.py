"""Standard errors by hand, and that nothing else computes one."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch

from rlhf_ray.maths.standard_errors import (
    block_deviation,
    deviation,
    error_of_difference,
    error_of_mean,
    intercept,
    pooled_deviation,
    standard_error,
)

ROOT = Path(__file__).parents[3]
NO_ERRORS = {
    "rlhf_ray/supervised/reward_metrics.py": "the spread of scores, a correlation",
    "rlhf_ray/supervised/reward.py": "how a head starts",
    "rlhf_ray/models/adapter_files.py": "rsLoRA's scale, alpha / sqrt(r)",
    "rlhf_ray/roles/experience.py": "the spread of rewards and advantages",
    "benchmarks/_kl_analysis.py": "a KL, and the range of two that is a t",
    "benchmarks/_kl_figure.py": "the scale of an axis",
}
"""Files that take roots or deviations of something else."""


def test_standard_error() -> None:
    assert standard_error([1.0, 2.0, 3.0, 4.0]) == pytest.approx(math.sqrt(5 / 3 / 4))
    assert standard_error(torch.tensor([[1, 2], [3, 4]])) == pytest.approx(math.sqrt(5 / 3 / 4))
    assert deviation(standard_error([1.0, 2.0, 3.0, 4.0]), 4) == pytest.approx(math.sqrt(5 / 3))
    assert math.isnan(standard_error([1.0])) and math.isnan(standard_error([]))


def test_deviations_by_hand() -> None:
    """(1, 3) and (2, 2, 5): squares 2 and 6 over 1 + 2 degrees of freedom. In blocks (0, 3) and (1, 6): the differences 1 and 3
    have the variance 2, of which each group has half."""
    assert pooled_deviation([[1, 3], [2, 2, 5]]) == pytest.approx(math.sqrt(8 / 3))
    assert pooled_deviation([[1], [7]]) is None
    assert block_deviation([[0, 3], [1, 6]]) == pytest.approx(1.0)
    for groups in ([[1, 2]], [[1], [2]], [[1, 2], [3]]):
        with pytest.raises(ValueError, match="equally long"):
            block_deviation(groups)


def test_errors_of_differences_and_means() -> None:
    assert error_of_difference(3.0, 4.0) == 5.0
    assert error_of_mean([3.0, 4.0]) == 2.5 and math.isnan(error_of_mean([]))


def test_an_intercept_by_hand() -> None:
    """(0, 1), (1, 0), (2, 2): mean 1, slope 1/2, intercept 1/2, residuals 1/2, -1, 1/2: s^2 = 3/2, se^2 = 3/2 (1/3 + 1/2)."""
    value, error = intercept([1.0, 0.0, 2.0], torch.tensor([0, 1, 2]))
    assert (value, error) == (pytest.approx(0.5), pytest.approx(math.sqrt(3 / 2 * (1 / 3 + 1 / 2))))
    for x in ([1.0, 2.0], [1.0, 2.0, 3.0]):
        assert all(map(math.isnan, intercept(x, [4.0] * len(x))))


def takes_roots(source: str) -> bool:
    """Whether it takes a root, a deviation or a hypotenuse."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and isinstance(node.right, ast.Constant):
            if node.right.value == 0.5:
                return True
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("hypot", "stdev", "pstdev", "variance", "std", "var", "sqrt", "rsqrt"):
                return True
    return False


def test_one_place_computes_every_standard_error() -> None:
    assert takes_roots("x = 1.96 * (a**2 + b**2) ** 0.5") and takes_roots("math.hypot(a, b)") and takes_roots("x.std()")
    assert not takes_roots('"""sqrt(x)"""')
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in ("rlhf_ray", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if path.relative_to(ROOT).parts[:2] != ("rlhf_ray", "maths") and takes_roots(path.read_text(encoding="utf-8"))
    }
    assert sorted(found) == sorted(NO_ERRORS)
