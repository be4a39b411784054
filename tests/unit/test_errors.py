"""The error tree: every leaf survives pickling (errors cross Ray processes) and tells its problems in one form."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from rlhf_ray import errors
from rlhf_ray.errors import SHOWN, ConfigError, Problem, RlhfRayError

TREE = [c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, RlhfRayError)]
LEAVES = [c for c in TREE if not c.__subclasses__()]
PROBLEMS = (
    Problem("jobs/ppo.yaml:3: kl_coef", "out of range", "number >= 0", "-1", "the default is 0.05"),
    Problem("", "no field is called lr"),
)


def test_the_tree_has_the_exit_codes_of_the_contract() -> None:
    codes = {c.__name__: c.exit_code for c in TREE}
    assert codes == {
        "RlhfRayError": 1,
        "ConfigError": 2,
        "ResourceError": 3,
        "DataError": 4,
        "ArtifactError": 5,
        "InvariantError": 1,
        "Interrupted": 75,
        "LimitReached": 75,
    }


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_leaf_survives_pickling(leaf: type[RlhfRayError], protocol: int) -> None:
    for error in (leaf(PROBLEMS), leaf(PROBLEMS[0]), leaf.at("a:1", "b", "c", "d", "e")):
        for again in (pickle.loads(pickle.dumps(error, protocol)), copy.deepcopy(error)):  # noqa: S301 (our own bytes)
            assert type(again) is leaf
            assert again.problems == error.problems
            assert (again.lines(), str(again), again.exit_code) == (error.lines(), str(error), error.exit_code)


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda c: c.__name__)
def test_every_leaf_is_a_builtin_error_too(leaf: type[RlhfRayError]) -> None:
    assert issubclass(leaf, (ValueError, RuntimeError))


def test_message_form() -> None:
    error = ConfigError.at(
        "jobs/ppo.yaml:14: cliprange", "out of range", "number > 0 and < 1", "1.5", "the default is 0.2"
    )
    assert error.lines() == [
        "error: jobs/ppo.yaml:14: cliprange: out of range; expected number > 0 and < 1; got 1.5; fix: the default is 0.2"
    ]
    assert str(error) == error.lines()[0].removeprefix("error: ")


def test_empty_parts_are_left_out() -> None:
    assert ConfigError.at("x.yaml", "empty file").lines() == ["error: x.yaml: empty file"]
    assert ConfigError.at("", "no file given", fix="name one").lines() == ["error: no file given; fix: name one"]


def test_a_problem_is_one_line_whatever_is_in_it() -> None:
    line = ConfigError.at("a\nb", "two\r\nlines", got="x\ty").lines()
    assert line == ["error: a b: two lines; got x y"]


def test_the_first_problems_are_shown_and_the_rest_counted() -> None:
    assert SHOWN == 20
    lines = ConfigError([Problem(f"f:{i}", f"bad {i}") for i in range(23)]).lines()
    assert lines[0] == "error: f:0: bad 0" and lines[19] == "error: f:19: bad 19"
    assert lines[20:] == ["error: and 3 more problems"]
    assert len(ConfigError([Problem(f"f:{i}", f"bad {i}") for i in range(20)]).lines()) == 20


def test_rows_with_one_fault_are_told_on_one_line() -> None:
    rows = [Problem(f"f.jsonl:{i}", "bad", fix="mend it") for i in (1, 2, 5, 6, 7, 9, 11)]
    error = ConfigError(
        [*rows[:3], Problem("f.jsonl:3", "worse"), *rows[3:], Problem("g.jsonl:1", "bad", fix="mend it")]
    )
    assert error.lines() == [
        "error: f.jsonl:1: bad; fix: mend it; the same at 2, 5, 6, 7 and 2 more",
        "error: f.jsonl:3: worse",
        "error: g.jsonl:1: bad; fix: mend it",
    ]
    assert len(error.problems) == 9, "who catches it has them all"
    assert ConfigError([Problem("f:1", "bad"), Problem("f:2", "bad")]).lines() == ["error: f:1: bad; the same at 2"]
    assert len(ConfigError([Problem("seed", "bad"), Problem("seed", "bad")]).lines()) == 2


def test_raise_all() -> None:
    ConfigError.raise_all([])
    with pytest.raises(ConfigError) as caught:
        ConfigError.raise_all(p for p in PROBLEMS)
    assert caught.value.problems == PROBLEMS
