"""The analysis of benchmarks/kl_study.py on made-up rows whose truth is known. Rows of real runs: benchmarks/results."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import random
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def analysis(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("_kl_analysis")


def made_up(
    analysis: ModuleType, blocks: int, noise: float, planted: dict[str, float], seed: int = 0
) -> list[dict[str, Any]]:
    """gold = 0.4 + block + planted + 0.2 sqrt(KL) - 0.04 KL + block x form + noise, at a KL that misses its target, for bregman
    most. The noise of a cell is a third of `noise`, that of a block x form is `noise`; blocks differ by 0.2."""
    draw = random.Random(seed)
    rows = []
    for block in range(blocks):
        level = draw.gauss(0.4, 0.2)
        for penalty in analysis.PENALTIES:
            own = draw.gauss(0.0, noise)
            for target in analysis.TARGETS:
                kl = target * draw.uniform(0.8, 1.2) * (1.3 if penalty == "bregman" else 1.0)
                gold = level + planted.get(penalty, 0.0) + own + draw.gauss(0.0, noise / 3)
                gold += 0.2 * math.sqrt(kl) - 0.04 * kl
                rows.append(_row(block, penalty, target, kl, gold))
        for n in analysis.BEST_OF:
            kl = math.log(n) - (n - 1) / n
            rows.append(_row(block, "best_of_n", float(n), kl, level + 0.2 * math.sqrt(kl)))
        rows.append(_row(block, "base", 0.0, 0.0, level))
    return rows


def _row(seed: int, penalty: str, target: float, kl: float, gold: float) -> dict[str, Any]:
    rest = {"proxy": 1.0, "length": 40.0, "steps": 24, "coefficient": 0.1}
    return {"seed": seed, "penalty": penalty, "target": target, "kl": kl, "gold": gold, **rest}


def test_a_planted_difference_is_found_and_nothing_else(analysis: ModuleType) -> None:
    found = analysis.analyse(made_up(analysis, 8, 0.01, {"bregman": -0.1}))
    verdicts = {form: told["verdict"] for form, told in found["comparisons"].items()}
    assert verdicts == dict.fromkeys(verdicts, "equivalent") | {"bregman": "differs"}
    assert found["comparisons"]["bregman"]["difference"] == pytest.approx(-0.1, abs=0.02)
    assert found["any_difference_p"] < 0.001


def test_the_curve_takes_out_a_kl_that_missed_its_target(analysis: ModuleType) -> None:
    """Without noise the figures are those that the rows were made by."""
    rows = made_up(analysis, 2, 0.0, {"jensen_shannon": 0.05})
    found = analysis.analyse(rows)
    assert found["curve"] == {"sqrt_kl": pytest.approx(0.2), "kl": pytest.approx(-0.04)}
    assert found["comparisons"]["jensen_shannon"]["difference"] == pytest.approx(0.05)
    assert found["comparisons"]["bregman"]["difference"] == pytest.approx(0.0, abs=1e-9)
    base = statistics.fmean(row["gold"] for row in rows if row["penalty"] == "base")
    at = found["at_target"]["2.5"]["bregman"]["mean"]
    assert at == pytest.approx(base + 0.2 * math.sqrt(2.5) - 0.04 * 2.5)


def test_equivalence_is_claimed_where_there_is_no_difference_and_enough_blocks(analysis: ModuleType) -> None:
    found = analysis.analyse(made_up(analysis, 8, 0.01, {}))["comparisons"]
    assert {told["verdict"] for told in found.values()} == {"equivalent"}
    for told in found.values():
        assert -0.03 < told["interval_90"][0] < told["interval_90"][1] < 0.03


def test_noisy_blocks_claim_nothing(analysis: ModuleType) -> None:
    found = analysis.analyse(made_up(analysis, 8, 0.08, {}))["comparisons"]
    assert {told["verdict"] for told in found.values()} == {"open"}


def test_nothing_is_claimed_before_the_last_block(analysis: ModuleType) -> None:
    rows = made_up(analysis, 7, 0.01, {"bregman": -0.1})
    found = analysis.analyse(rows)["comparisons"]
    assert found["bregman"]["p_holm"] < 0.001
    assert {told["verdict"] for told in found.values()} == {"interim"}
    assert "comparisons" not in analysis.analyse([row for row in rows if row["seed"] == 0])


def test_error_rates(analysis: ModuleType) -> None:
    """Without a difference at most 5 % of studies call any form different, and with one at the margin at most 5 % call it
    equivalent: of 60 more than 8 with a probability below 0.3 %."""
    differ = equivalent = 0
    for seed in range(60):
        null = analysis.compare(_groups(analysis, seed, {}))
        differ += any("differs" in told["verdict"] for told in null.values())
        edge = analysis.compare(_groups(analysis, seed, {"none": 0.03}))
        equivalent += "equivalent" in edge["none"]["verdict"]
    assert differ <= 8 and equivalent <= 8


def _groups(analysis: ModuleType, seed: int, planted: dict[str, float]) -> dict[str, list[float]]:
    draw = random.Random(seed)
    blocks = [draw.gauss(0.0, 0.1) for _ in range(4)]
    return {p: [b + planted.get(p, 0.0) + draw.gauss(0.0, 0.01) for b in blocks] for p in analysis.PENALTIES}


def test_a_block_that_is_not_complete_is_left_out(analysis: ModuleType) -> None:
    rows = made_up(analysis, 3, 0.01, {})
    short = [row for row in rows if (row["seed"], row["penalty"], row["target"]) != (2, "none", 6.0)]
    assert analysis.complete_seeds(short) == [0, 1]
    found = analysis.analyse(short)
    assert found["blocks"] == 2 and found["unfinished_rows"] == 24
    with pytest.raises(ValueError, match="no block is complete"):
        analysis.analyse(rows[:5])


def test_a_run_that_left_its_target_is_told_and_not_compared(analysis: ModuleType) -> None:
    """One run at 300 nats leaves the curve and the form's other runs as they are; a form that has no other in a block is out."""
    rows = made_up(analysis, 3, 0.0, {})
    away = [{**r, "kl": 300.0, "gold": -0.5} if _is(r, 1, "bregman", {1.0}) else r for r in rows]
    found = analysis.analyse(away)
    assert found["curve"] == {"sqrt_kl": pytest.approx(0.2), "kl": pytest.approx(-0.04)}
    assert found["comparisons"]["bregman"]["difference"] == pytest.approx(0.0, abs=1e-9)
    (cell,) = [c for c in found["cells"] if (c["penalty"], c["target"]) == ("bregman", 1.0)]
    assert cell["near"] == cell["held"] == 2 and cell["kl_range"][1] == 300.0 and cell["gold"] > 0
    gone = [{**r, "kl": 300.0} if _is(r, 1, "bregman", {1.0, 2.5, 6.0}) else r for r in rows]
    assert sorted(analysis.analyse(gone)["comparisons"]) == ["clamped_kl", "jensen_shannon", "none", "squared_error"]


def _is(row: dict[str, Any], seed: int, penalty: str, targets: set[float]) -> bool:
    return (row["seed"], row["penalty"]) == (seed, penalty) and row["target"] in targets


def test_holm(analysis: ModuleType) -> None:
    """The smallest p times 3, the next times 2 but not below the one before, the last as it is."""
    assert analysis.holm([0.04, 0.01, 0.015]) == pytest.approx([0.04, 0.03, 0.03])
    assert analysis.holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(("t", "freedom", "p"), [(2.228, 10, 0.025), (-2.228, 10, 0.975), (1.812, 10, 0.05)])
def test_one_sided_p_is_students(analysis: ModuleType, t: float, freedom: int, p: float) -> None:
    """Values of Student's table."""
    assert analysis.one_sided(t * 0.5, 0.5, freedom) == pytest.approx(p, abs=2e-4)


def test_best_of_n_is_the_mean_over_all_draws(analysis: ModuleType) -> None:
    draw = random.Random(1)
    gold, proxy = ([[draw.random() for _ in range(6)] for _ in range(2)] for _ in range(2))
    found = analysis.best_of(3, gold, proxy)
    by_hand = [max(chosen)[1] for p, g in zip(proxy, gold) for chosen in itertools.combinations(list(zip(p, g)), 3)]
    assert found["gold"] == pytest.approx(statistics.fmean(by_hand))
    assert found["kl"] == pytest.approx(math.log(3) - 2 / 3)


def test_best_of_n_between_two_n(analysis: ModuleType) -> None:
    cells = {(r["seed"], r["penalty"], r["target"]): r for r in made_up(analysis, 1, 0.0, {})}
    level = cells[0, "base", 0.0]["gold"]
    assert analysis.best_of_at(cells, 0, 2.5) == pytest.approx(level + 0.2 * math.sqrt(2.5))
    with pytest.raises(ValueError, match="outside"):
        analysis.best_of_at(cells, 0, 6.0)


def test_the_figure_is_small_xml_and_says_what_it_shows(analysis: ModuleType) -> None:
    from xml.etree import ElementTree

    text = importlib.import_module("_kl_figure").draw(analysis.analyse(made_up(analysis, 2, 0.01, {})))
    assert len(text) < 20_000
    told = " ".join(ElementTree.fromstring(text).itertext())
    assert all(penalty in told for penalty in analysis.PENALTIES) and "best of n" in told


def test_the_committed_figures_are_those_of_the_committed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that is changed after the runs, or a figure that the rows do not give, shows here."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    study, analysis = importlib.import_module("kl_study"), importlib.import_module("_kl_analysis")
    rows = study.read_rows()
    assert all(0 <= row["seed"] < analysis.BLOCKS and row["commit"] for row in rows)
    measured = json.loads((BENCHMARKS / "results" / "kl_study_gold.json").read_text())["measured"]
    assert rounded(json.dumps(measured)) == rounded(json.dumps(analysis.analyse(rows)))
    assert study.FIGURE.read_text() == importlib.import_module("_kl_figure").draw(measured)


def rounded(text: str) -> Any:
    """The last bits of least squares are the processor's."""
    return json.loads(text, parse_float=lambda number: round(float(number), 6))
