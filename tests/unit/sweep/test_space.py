"""What varies in a sweep, and how badly written spaces read."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml

from rlhf_ray.config import SweepConfig
from rlhf_ray.config.resolved import dump_yaml, to_dict
from rlhf_ray.errors import ConfigError
from rlhf_ray.sweep.space import ask, corners, draw, grid, read_space, size

BY_PENALTY = {"given": "kl_penalty", "cases": {"kl": [0.1, 0.2], "none": [0.0]}}


def test_a_grid_is_every_combination_in_the_order_written() -> None:
    found = grid(read_space({"a": [1, 2], "b": ["x", "y"]}))
    assert found == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}]


def test_values_that_depend_on_another_field_wherever_it_stands() -> None:
    space = read_space({"kl_coef": BY_PENALTY, "kl_penalty": ["kl", "none"]})
    assert grid(space) == [
        {"kl_penalty": "kl", "kl_coef": 0.1},
        {"kl_penalty": "kl", "kl_coef": 0.2},
        {"kl_penalty": "none", "kl_coef": 0.0},
    ]


@pytest.mark.parametrize("values", [[0.05, 5.0], [1e-05, 1.0], [1, 2], [True, False], [None, 0.3], ["none", "kl"]])
def test_cases_mean_the_same_in_the_job_that_a_run_keeps(values: list[Any]) -> None:
    """There they are JSON, whose keys are texts: a sweep over a number could not be resumed, and had no report."""
    raw = {"a": values, "b": {"given": "a", "cases": {values[0]: [1], values[1]: [2]}}}
    config = SweepConfig(output_dir="x", model_name_or_path="m", ppo={}, space=raw)
    kept = yaml.safe_load(dump_yaml(to_dict(config)))["space"]
    assert grid(read_space(kept)) == grid(read_space(raw)) == [{"a": v, "b": i} for i, v in enumerate(values, 1)]


def test_draws_follow_from_seed_and_number_and_stay_in_their_ranges() -> None:
    space = read_space(
        {
            "u": {"uniform": [1, 2]},
            "l": {"loguniform": [1e-4, 1.0]},
            "i": {"randint": [3, 5]},
            "kl_penalty": ["kl", "none"],
            "kl_coef": {"given": "kl_penalty", "cases": {"kl": {"loguniform": [0.1, 10]}, "none": [0]}},
        }
    )
    found = [draw(space, 0, number) for number in range(400)]
    assert found[:3] == [draw(space, 0, number) for number in range(3)]
    assert found[0] != draw(space, 1, 0)
    assert all(1 <= s["u"] <= 2 and 1e-4 <= s["l"] <= 1 for s in found)
    assert {s["i"] for s in found} == {3, 4, 5}
    assert all((s["kl_coef"] == 0) == (s["kl_penalty"] == "none") for s in found)
    below = sum(s["l"] < 1e-2 for s in found) / len(found)
    assert abs(below - 0.5) < 0.08, "half of a log-uniform draw lies below the geometric mean of its ends"
    assert all(0.1 <= s["kl_coef"] <= 10 for s in found if s["kl_penalty"] == "kl")


def test_suggestions_have_a_name_for_each_case() -> None:
    asked: list[str] = []

    def suggest(name: str, domain: Any) -> Any:
        asked.append(name)
        return domain.values[-1]

    space = read_space({"kl_coef": BY_PENALTY, "kl_penalty": ["none", "kl"]})
    assert ask(space, suggest) == {"kl_penalty": "kl", "kl_coef": 0.2}
    assert asked == ["kl_penalty", "kl_coef[kl_penalty=kl]"], "TPE must not mix the coefficients of different penalties"


def test_corners_reach_both_ends() -> None:
    assert corners(read_space({"a": {"uniform": [1, 2]}, "b": [3]}), 256) == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"a": 1}, r"space.a: one value does not vary.*got 1"),
        ({"a": []}, r"space.a: no values"),
        ({"a": [1, 1]}, r"space.a: a value appears twice"),
        ({"a": {"normal": [0, 1]}}, r"space.a: not a set of values; expected a list.*got normal"),
        ({"a": {"uniform": [2, 1]}}, r"space.a: uniform needs a lower and a higher end.*\[2, 1\]"),
        ({"a": {"uniform": [0, math.inf]}}, r"needs a lower and a higher end"),
        ({"a": {"loguniform": [0, 1]}}, r"loguniform starts above 0"),
        ({"a": {"randint": [0.5, 2]}}, r"randint goes from integer to integer"),
        ({"a": {"given": "b", "cases": {"x": [1]}}}, r"space.a.given: not another field of the space"),
        ({"a": {"given": "b"}, "b": ["x"]}, r"space.a: incomplete"),
        ({"a": {"given": "b", "cases": {"x": [1]}}, "b": ["x", "y"]}, r"space.a.cases: no case for b = y"),
        ({"a": {"given": "b", "cases": {"x": [1], "z": [2]}}, "b": ["x"]}, r"b is never z"),
        ({"a": {"given": "b", "cases": {"x": BY_PENALTY}}, "b": ["x"]}, r"space.a.cases.x: not a set of values"),
    ],
)
def test_badly_written_spaces(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_space(space)


def test_all_problems_at_once_and_no_ranges_in_a_grid() -> None:
    with pytest.raises(ConfigError) as caught:
        read_space({"a": 1, "b": []})
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match=r"space.a: a grid has no ranges"):
        grid(read_space({"a": {"uniform": [0, 1]}}))


@pytest.mark.parametrize(
    "raw",
    [
        {"a": [1, 2, 3], "b": ["x", "y"]},
        {"kl_coef": BY_PENALTY, "kl_penalty": ["kl", "none"], "a": [1, 2]},
        {
            "kl_coef": BY_PENALTY,
            "lam": {**BY_PENALTY, "cases": {"kl": [1], "none": [2, 3, 4]}},
            "kl_penalty": ["kl", "none"],
        },
    ],
)
def test_the_size_of_a_grid_is_its_length(raw: dict[str, Any]) -> None:
    space = read_space(raw)
    assert size(space) == len(grid(space)) == len(corners(space, 10**6)) and corners(space, 2) == grid(space)[:2]


def test_a_large_space_is_counted_and_sampled_without_being_listed() -> None:
    ranges = {f"f{i}": {"uniform": [0, 1]} for i in range(60)}
    assert len(corners(read_space(ranges), 256)) == 256
    lists = {f"f{i}": list(range(10)) for i in range(60)}
    assert size(read_space(lists)) == 10**60
