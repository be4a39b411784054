"""Rows of several files in given shares."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rlhf_ray.config import DataConfig
from rlhf_ray.data.load import load_rows
from rlhf_ray.data.mixture import mixture
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.records import Row
from rlhf_ray.errors import DataError


def rows(name: str, count: int) -> list[Row]:
    return [Row(f"{name}:{i}", Prompt(f"{name}{i}")) for i in range(count)]


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ((100, 100), (1, 1), (100, 100)),
        ((100, 100), (3, 1), (100, 33)),  # 100 / 0.75 = 133.3 in all
        ((10, 1000), (0.5, 0.5), (10, 10)),
        ((70, 30, 5), (0.7, 0.2, 0.1), (35, 10, 5)),
    ],
)
def test_the_most_rows_in_these_shares(
    sizes: tuple[int, ...], weights: tuple[float, ...], expected: tuple[int, ...]
) -> None:
    files = [(name, rows(name, size)) for name, size in zip("abc", sizes)]
    found, line = mixture(files, weights, seed=0)
    counts = tuple(sum(row.where.startswith(f"{name}:") for row in found) for name, _ in files)
    assert counts == expected and len({row.where for row in found}) == len(found)
    assert line.startswith(f"mixed: {expected[0]} of {sizes[0]} rows of a, ")
    where = [row.where for row in found]
    order = {row.where: i for i, row in enumerate(row for _, some in files for row in some)}
    assert where == sorted(where, key=order.__getitem__)


def test_a_seed_chooses_the_rows_and_the_same_one_the_same_rows() -> None:
    files = [("a", rows("a", 1000)), ("b", rows("b", 100))]
    first, again, other = (mixture(files, (1, 1), seed)[0] for seed in (0, 0, 1))
    assert first == again != other
    taken = {row.where for row in first} & {row.where for row in other}
    assert 100 <= len(taken) < 130  # all of b, and of a what chance has in common: 10 of 100
    assert len(mixture(files, (1, 1), 0, max_rows=50)[0]) == 50
    with pytest.raises(DataError, match="b: no row to mix"):
        mixture([files[0], ("b", [])], (1, 1), 0)


def test_a_job_mixes_what_it_trains_on(write: Callable[..., str]) -> None:
    names = [write([{"prompt": f"{n} {i}?", "completion": n} for i in range(200)], f"{n}.jsonl") for n in "ab"]
    config = DataConfig(train=tuple(names), weights=(0.8, 0.2))
    plain, mixed = load_rows(DataConfig(train=tuple(names)), "sft"), load_rows(config, "sft")
    assert mixed.held_out == plain.held_out
    assert {row.where for row in mixed.train} < {row.where for row in plain.train}
    shares = [sum(row.completion == n for row in mixed.train) / len(mixed.train) for n in "ab"]
    assert shares == pytest.approx([0.8, 0.2], abs=0.01)
    assert " beyond the mixture" in mixed.summary[0] and mixed.summary[1].startswith("mixed: ")
    assert len(load_rows(config.model_copy(update={"max_rows": 50}), "sft").train) == 50
    for weights in ((1e308, 1e308), (5e-324, 4.0)):
        with pytest.raises(ValueError, match="weights: too far apart, or too large"):
            DataConfig(train=tuple(names), weights=weights)
    with pytest.raises(ValueError, match="weights: 1 for 2 entries of train"):
        DataConfig(train=tuple(names), weights=(1.0,))
