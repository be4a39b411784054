"""What varies in a sweep: fields of a PPO job and their values.

kl_penalty: [kl, jensen_shannon]                        a list: each of them (grid), or one of them (random)
learning_rate: {loguniform: [1.0e-5, 1.0e-3]}           a range: random and optuna only
kl_coef:                                                a field whose values depend on another's
  given: kl_penalty
  cases: {kl: [0.02, 0.2], jensen_shannon: {loguniform: [0.1, 10]}}
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from rlhf_ray.errors import ConfigError, Problem

RANGES = ("uniform", "loguniform", "randint")
Settings = dict[str, Any]
"""Field -> value, in the order of the space."""


@dataclass(frozen=True)
class Values:
    """One of a list."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`; randint: an integer, `high` included."""

    kind: Literal["uniform", "loguniform", "randint"]
    low: float
    high: float

    def draw(self, rng: random.Random) -> float | int:
        if self.kind == "randint":
            return rng.randint(int(self.low), int(self.high))
        if self.kind == "uniform":
            return rng.uniform(self.low, self.high)
        return math.exp(rng.uniform(math.log(self.low), math.log(self.high)))


@dataclass(frozen=True)
class Given:
    """Values that depend on the value of field `other`."""

    other: str
    cases: dict[Any, Values | Range]


Domain = Values | Range | Given
Space = dict[str, Domain]


def read_space(raw: Mapping[str, Any], where: str = "space") -> Space:
    """The `space` of a job file. ConfigError with all that is wrong in it."""
    problems: list[Problem] = []
    space: Space = {}
    for name, value in raw.items():
        try:
            space[name] = _domain(value, f"{where}.{name}", nested=False)
        except ConfigError as error:
            problems += error.problems
    ConfigError.raise_all(problems)
    space = {name: _with_cases_of_values(domain, space) for name, domain in space.items()}
    problems = [
        p for name, domain in space.items() if isinstance(domain, Given) for p in _given(name, domain, space, where)
    ]
    ConfigError.raise_all(problems)
    return {name: space[name] for name in _in_order(space)}


def _domain(value: Any, where: str, nested: bool) -> Any:
    kinds = "a list of values, or one of choice, uniform, loguniform, randint" + ("" if nested else ", given")
    if isinstance(value, (list, tuple)):
        return _values(value, where)
    if not isinstance(value, Mapping):
        raise ConfigError.at(where, "one value does not vary", kinds, str(value), "put it under ppo, or write [value]")
    if "given" in value and not nested:
        return _read_given(value, where)
    if len(value) != 1 or (kind := next(iter(value))) not in ("choice", "grid", *RANGES):
        raise ConfigError.at(where, "not a set of values", kinds, ", ".join(map(str, value)) or "nothing")
    return _values(value[kind], where) if kind in ("choice", "grid") else _range(kind, value[kind], where)


def _values(values: Any, where: str) -> Values:
    if not isinstance(values, (list, tuple)) or not values:
        raise ConfigError.at(where, "no values", "a list of at least one", str(values))
    if any(values.count(v) > 1 for v in values):
        raise ConfigError.at(where, "a value appears twice", "different values", ", ".join(map(str, values)))
    return Values(tuple(values))


def _range(kind: Any, ends: Any, where: str) -> Range:
    numbers = isinstance(ends, (list, tuple)) and len(ends) == 2
    numbers = numbers and all(
        isinstance(e, (int, float)) and not isinstance(e, bool) and math.isfinite(e) for e in ends
    )
    if not numbers or not ends[0] < ends[1]:
        raise ConfigError.at(where, f"{kind} needs a lower and a higher end", "[low, high]", str(ends))
    if kind == "loguniform" and ends[0] <= 0:
        raise ConfigError.at(where, "loguniform starts above 0", "[low > 0, high]", str(ends))
    if kind == "randint" and not all(isinstance(e, int) for e in ends):
        raise ConfigError.at(where, "randint goes from integer to integer", "[low, high]", str(ends))
    return Range(kind, *ends)


def _read_given(value: Mapping[str, Any], where: str) -> Given:
    cases = value.get("cases")
    if value.keys() != {"given", "cases"} or not isinstance(cases, Mapping) or not cases:
        raise ConfigError.at(where, "incomplete", "given: a field, and cases: its value -> values", ", ".join(value))
    return Given(
        str(value["given"]), {case: _domain(v, f"{where}.cases.{case}", nested=True) for case, v in cases.items()}
    )


def _with_cases_of_values(domain: Domain, space: Space) -> Domain:
    """Cases under the other field's values: a run keeps its job as JSON types, whose keys are texts ("0.05" for 0.05)."""
    other = space.get(domain.other) if isinstance(domain, Given) else None
    if not isinstance(domain, Given) or not isinstance(other, Values):
        return domain
    by_text = {text: value for value in other.values for text in (str(value), str(value).lower())}
    return Given(
        domain.other,
        {by_text.get(case, case) if isinstance(case, str) else case: d for case, d in domain.cases.items()},
    )


def _given(name: str, domain: Given, space: Space, where: str) -> Iterator[Problem]:
    """What is wrong with a dependence, once all fields are known."""
    other = space.get(domain.other)
    if domain.other == name or not isinstance(other, Values):
        lists = ", ".join(n for n, d in space.items() if isinstance(d, Values) and n != name) or "none"
        yield Problem(
            f"{where}.{name}.given", "not another field of the space with a list of values", lists, domain.other
        )
        return
    for value in other.values:
        if value not in domain.cases:
            yield Problem(
                f"{where}.{name}.cases", f"no case for {domain.other} = {value}", fix="add it, or take it out"
            )
    for case in domain.cases:
        if case not in other.values:
            yield Problem(
                f"{where}.{name}.cases", f"{domain.other} is never {case}", ", ".join(map(str, other.values)), str(case)
            )


def _in_order(space: Space) -> list[str]:
    """Fields that others depend on first; else as written."""
    return sorted(space, key=lambda name: isinstance(space[name], Given))


def has_ranges(space: Space) -> bool:
    return any(isinstance(d, Range) for domain in space.values() for d in _domains(domain))


def grid(space: Space) -> list[Settings]:
    """Every combination. ConfigError where a field has a range."""
    ranges = [name for name in space if has_ranges({name: space[name]})]
    ConfigError.raise_all(
        Problem(
            f"space.{name}", "a grid has no ranges", "a list of values", "a range", "list the values, or search: random"
        )
        for name in ranges
    )
    return list(combinations(space))


def combinations(space: Space) -> Iterator[Settings]:
    """Those of `grid`, one by one; of a space without ranges."""

    def beside(chosen: Settings, names: Sequence[str]) -> Iterator[Settings]:
        if not names:
            yield chosen
            return
        for value in _at(space[names[0]], chosen).values:  # type: ignore[union-attr]
            yield from beside({**chosen, names[0]: value}, names[1:])

    return beside({}, list(space))


def size(space: Space) -> int:
    """How many combinations a space without ranges has, without making them."""
    count = 1
    for name, domain in space.items():
        if isinstance(domain, Values):  # a field that depends on it has the values of each of its cases
            beside = [d for d in space.values() if isinstance(d, Given) and d.other == name]
            count *= sum(math.prod([len(d.cases[v].values) for d in beside]) for v in domain.values)  # type: ignore[union-attr, misc]
    return count


def draw(space: Space, seed: int, number: int) -> Settings:
    """Setting `number` of a random search: a function of seed and number, so that a search can be gone on with."""
    rng = random.Random(f"{seed}/{number}")
    settings: Settings = {}
    for name, domain in space.items():
        here = _at(domain, settings)
        settings[name] = rng.choice(here.values) if isinstance(here, Values) else here.draw(rng)
    return settings


def ask(space: Space, suggest: Callable[[str, Values | Range], Any]) -> Settings:
    """A setting whose values `suggest` chooses, name by name; a field that depends on another has a name for each case."""
    settings: Settings = {}
    for name, domain in space.items():
        label = f"{name}[{domain.other}={settings[domain.other]}]" if isinstance(domain, Given) else name
        settings[name] = suggest(label, _at(domain, settings))
    return settings


def corners(space: Space, most: int) -> list[Settings]:
    """A setting for every value of a list and both ends of a range, to be checked before anything runs: the first `most`."""
    bounded: Space = {}
    for name, domain in space.items():
        if isinstance(domain, Given):
            bounded[name] = Given(domain.other, {case: _ends(d) for case, d in domain.cases.items()})
        else:
            bounded[name] = _ends(domain)
    return list(islice(combinations(bounded), most))


def _ends(domain: Values | Range) -> Values:
    return domain if isinstance(domain, Values) else Values((domain.low, domain.high))


def _domains(domain: Domain) -> Sequence[Values | Range]:
    return list(domain.cases.values()) if isinstance(domain, Given) else [domain]


def _at(domain: Domain, settings: Settings) -> Values | Range:
    return domain.cases[settings[domain.other]] if isinstance(domain, Given) else domain
