"""The analysis of benchmarks/baselines.py on made-up rows whose truth is known. Rows of real runs: benchmarks/results."""

from __future__ import annotations

import importlib
import math
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("baselines")


def row(script: ModuleType, task: str, seed: int, by: str, prompts: int, judge: str, agrees: float) -> dict[str, Any]:
    """dpo wins on every prompt but the first three of four, ppo on all; `judge` says what is true with probability `agrees`, else
    a coin's side."""
    draw = random.Random(f"{task} {seed} {judge}")
    true = {name: [2 if name != "dpo" or i % 4 == 3 else 1 for i in range(prompts)] for name in script.POLICIES[1:]}
    said = {name: [c if draw.random() < agrees else draw.choice([1, 2]) for c in codes] for name, codes in true.items()}
    figures = {"kl_k1_per_response": 1.0 + seed, "length": 9.0}
    rewards = {name: [0.1 * seed + (0.5 if name == "ppo" else 0.2)] * prompts for name in script.POLICIES}
    return {
        "task": task,
        "seed": seed,
        "by": by,
        "prompts": [str(i) for i in range(prompts)],
        "policies": dict.fromkeys(script.POLICIES, figures),
        "rewards": {script.TRUE: rewards},
        "codes": {script.TRUE: true, judge: said},
        "about": {judge: {"flipped": 3, "unparsable": 1}} if judge == script.LLM else {},
        "reward_models": [],
        "replies_sampled": 64,
        "pairs_read": 32,
        "cpu_seconds": 1.0,
        "commit": "abc",
    }


def test_seeds_are_means_of_a_prompt_and_agreement_is_what_it_is(script: ModuleType) -> None:
    rows = [row(script, "tiny", seed, "scores", 40, script.UNSEEN, 1.0) for seed in (0, 1)]
    rows.append(row(script, "tiny", 0, script.LLM, 40, script.LLM, 0.0))
    found = script.analyse(rows)
    assert found.keys() == {"tiny"} and found["tiny"]["seeds"] == [0, 1] and found["tiny"]["llm"]["prompts"] == 40
    policies = found["tiny"]["policies"]
    assert policies["ppo"][script.TRUE] == pytest.approx([0.5, 0.6]) and policies["dpo"]["kl_k1_per_response"] == [
        1.0,
        2.0,
    ]
    wins = policies["dpo"][f"win_rate_{script.TRUE}"]
    assert wins["mean"] == 0.25 and wins["low"] < 0.25 < wins["high"] and wins["n"] == 80
    assert policies["ppo"]["true_difference"]["mean"] == pytest.approx(0.3)
    right, coin = (found["tiny"]["agreement"][f"{judge}, {script.TRUE}"] for judge in (script.UNSEEN, script.LLM))
    assert right["kappa"] == right["low"] == right["high"] == 1.0 and right["same"] == right["pairs"] == 2 * 40 * 4
    assert coin["low"] < 0 < coin["high"] and abs(coin["kappa"]) < 0.2 and coin["pairs"] == 40 * 4


def test_pairs_of_a_prompt_are_drawn_together(script: ModuleType) -> None:
    """Forty pairs that are four prompts ten times over say as much as four: the interval is as wide as that of four."""
    few = row(script, "tiny", 0, "scores", 8, script.UNSEEN, 0.5)
    many = [dict(few, seed=seed) for seed in range(10)]
    one, ten = (script.agreement(rows, script.UNSEEN) for rows in ([few], many))
    assert ten["pairs"] == 10 * one["pairs"] and ten["kappa"] == pytest.approx(one["kappa"])
    assert ten["high"] - ten["low"] == pytest.approx(one["high"] - one["low"], rel=0.05)


def test_a_verdict_that_is_missing_counts_for_nothing(script: ModuleType) -> None:
    found = script.over_prompts([{"prompts": ["1", "2", "3"]}], lambda _: script.outcomes([2, None, 0]))
    assert found["mean"] == 0.75 and found["n"] == 2
    empty = script.over_prompts([{"prompts": ["1"]}], lambda _: [None])
    none = row(script, "tiny", 0, script.LLM, 4, script.LLM, 1.0)
    none["codes"][script.LLM] = {name: [None] * 4 for name in none["codes"][script.LLM]}
    assert script.agreement([none], script.LLM) == {"kappa": None, "low": None, "high": None, "pairs": 0, "same": 0}
    assert empty["mean"] is None and math.isnan(empty["low"] or math.nan)
