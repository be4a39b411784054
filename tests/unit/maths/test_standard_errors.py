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
    logistic_intercept,
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


@pytest.mark.parametrize("seed", range(6))
def test_a_logistic_intercept_is_the_top_of_its_likelihood(seed: int) -> None:
    """Found another way: torch's derivatives of the formula as it is written, by gradient steps; the sandwich by its definition."""
    generator = torch.Generator().manual_seed(seed)
    d = torch.randn(40, generator=generator, dtype=torch.float64) * 30 + 10
    x = torch.randint(3, (40,), generator=generator).double() / 2
    if seed > 3:
        x = (d > 0).double()  # the difference alone decides: only the bound on the slope keeps the line finite
    u = torch.tanh(d / d.std(correction=1))

    def each(v: torch.Tensor) -> torch.Tensor:
        line = v[0] + v[1] * u
        return x * torch.nn.functional.logsigmoid(line) + (1 - x) * torch.nn.functional.logsigmoid(-line)

    def penalised(v: torch.Tensor) -> torch.Tensor:
        return -each(v).sum() + v[1] ** 2 / 200

    v = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [v], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = penalised(v)
        loss.backward()
        return loss

    optimiser.step(closure)
    top = v.detach()
    scores = torch.autograd.functional.jacobian(each, top)
    inverse = torch.autograd.functional.hessian(penalised, top).inverse()
    p = float(torch.sigmoid(top[0]))
    error = p * (1 - p) * math.sqrt(float((inverse @ scores.T @ scores @ inverse)[0, 0]))
    assert logistic_intercept(x, d) == pytest.approx((p, error), rel=1e-5, abs=1e-7)


def test_a_logistic_intercept_that_cannot_be_known() -> None:
    for x in ([1.0, 0.0], [1.0, 0.0, 1.0]):
        assert all(map(math.isnan, logistic_intercept(x, [4.0] * len(x))))
    assert logistic_intercept([1.0] * 4, [1.0, 2.0, 3.0, 4.0]) == (1.0, 0.0)


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
