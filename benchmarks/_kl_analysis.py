"""The analysis that kl_study.py registers, from its rows alone. Statistics are those of rlhf_ray.maths."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlhf_ray.maths.comparisons import range_p_value, worse_than_best
from rlhf_ray.maths.intervals import mean_interval, student_quantile
from rlhf_ray.maths.standard_errors import block_deviation, error_of_difference, error_of_mean, standard_error

TARGETS = (1.0, 2.5, 6.0)
PENALTIES = ("kl", "clamped_kl", "bregman", "jensen_shannon", "squared_error", "none")
REFERENCE = "kl"
BEST_OF = (2, 4, 8, 16, 32, 64)
BLOCKS = 8
"""Seeds 0 to 7. With fewer nothing is claimed: who may look and go on finds something sooner or later."""
MARGIN, LEVEL = 0.03, 0.05
WITHIN = 2.0
OWN_ERROR_FROM = 3
"""Blocks from which on a difference's own spread counts."""

Row = dict[str, Any]


def complete_seeds(rows: Sequence[Row]) -> list[int]:
    """Blocks of the study that have all their rows."""
    cells = {(penalty, target) for penalty in PENALTIES for target in TARGETS}
    cells |= {("best_of_n", float(n)) for n in BEST_OF} | {("base", 0.0)}
    there: dict[int, set[tuple[str, float]]] = {}
    for row in (row for row in rows if row["seed"] < BLOCKS):
        there.setdefault(row["seed"], set()).add((row["penalty"], row["target"]))
    return sorted(seed for seed, found in there.items() if cells <= found)


def is_near(row: Row) -> bool:
    """Whether the policy is where it should be: its KL within a factor of WITHIN of the target."""
    return bool(row["target"] / WITHIN <= row["kl"] <= row["target"] * WITHIN)


def analyse(rows: Sequence[Row]) -> dict[str, Any]:
    """Every figure of the study. ValueError without a complete block; without two of them no comparison is made."""
    seeds = complete_seeds(rows)
    if not seeds:
        raise ValueError("kl_study: no block is complete, so there is nothing to analyse")
    cells = {(row["seed"], row["penalty"], row["target"]): row for row in rows}
    slopes = curve(cells, seeds)
    compared = [p for p in PENALTIES if all(_near(cells, seed, p) for seed in seeds)]
    adjusted = {p: [_at(cells, seed, p, slopes, _mean_curve()) for seed in seeds] for p in compared}
    found: dict[str, Any] = {
        "blocks": len(seeds),
        "blocks_planned": BLOCKS,
        "seeds": seeds,
        "unfinished_rows": sum(row["seed"] not in seeds for row in rows),
        "margin": MARGIN,
        "within": WITHIN,
        "curve": {"sqrt_kl": slopes[0], "kl": slopes[1]},
        "cells": [_cell(cells, seeds, p, target) for p in PENALTIES for target in TARGETS],
        "best_of_n": [_best_of_row(cells, seeds, n) for n in BEST_OF],
        "base": statistics.fmean(cells[seed, "base", 0.0]["gold"] for seed in seeds),
        "mean_over_targets": {p: statistics.fmean(values) for p, values in adjusted.items()},
        "at_target": {f"{t:g}": _at_target(cells, seeds, slopes, t) for t in TARGETS},
        "against_best_of_n": {f"{t:g}": _at_target(cells, seeds, slopes, t, best_of_at) for t in TARGETS[:2]},
    }
    if len(seeds) > 1 and REFERENCE in adjusted and len(adjusted) > 1:
        found["comparisons"] = compare(adjusted)
        if len(seeds) < BLOCKS:
            for told in found["comparisons"].values():
                told["verdict"] = "interim"
        found["any_difference_p"] = min(worse_than_best(list(adjusted.values()), blocks=True))
    return found


def curve(cells: dict[Any, Row], seeds: Sequence[int]) -> tuple[float, float]:
    """(b1, b2) of gold = cell + b1 sqrt(KL) + b2 KL by least squares, each block x form with an intercept of its own."""
    x, y = [], []
    for seed in seeds:
        for penalty in PENALTIES:
            rows = _near(cells, seed, penalty)
            points = [_curve(row["kl"]) for row in rows]
            for row, point in zip(rows, points):
                x.append([a - m for a, m in zip(point, _mean(points))])
                y.append([row["gold"] - statistics.fmean(r["gold"] for r in rows)])
    made = torch.linalg.lstsq(torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64))
    first, second = made.solution.flatten().tolist()
    return first, second


def compare(groups: dict[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Each form against REFERENCE: value b of every group is of block b. Two-way table without interaction.

    difference, its error and degrees of freedom, its 90 % interval (the one that two one-sided tests at 5 % read), p and
    p_equivalent, also adjusted by Holm, and `verdict`: differs, equivalent, both of them, or open."""
    blocks = len(groups[REFERENCE])
    freedom = (len(groups) - 1) * (blocks - 1)
    wide = student_quantile(1 - 2 * LEVEL, freedom)
    mean_error = error_of_mean([block_deviation(list(groups.values()))] * blocks)
    found: dict[str, dict[str, Any]] = {}
    for form in (name for name in groups if name != REFERENCE):
        differences = [a - b for a, b in zip(groups[form], groups[REFERENCE], strict=True)]
        error, difference = error_of_difference(mean_error, mean_error), statistics.fmean(differences)
        if blocks >= OWN_ERROR_FROM:
            error = max(error, standard_error(differences))
        found[form] = {
            "difference": difference,
            "standard_error": error,
            "freedom": freedom,
            "interval_90": [difference - wide * error, difference + wide * error],
            "p": two_sided(difference, error, freedom),
            "p_equivalent": one_sided(MARGIN - abs(difference), error, freedom),
        }
    for name in ("p", "p_equivalent"):
        for told, value in zip(found.values(), holm([told[name] for told in found.values()])):
            told[f"{name}_holm"] = value
    for told in found.values():
        claims = {"differs": told["p_holm"] < LEVEL, "equivalent": told["p_equivalent_holm"] < LEVEL}
        told["verdict"] = " and ".join(name for name, holds in claims.items() if holds) or "open"
    return found


def two_sided(difference: float, error: float, freedom: int) -> float:
    """Student's: the range of two is sqrt(2) |t|."""
    if error == 0:
        return float(difference == 0)
    return range_p_value(math.sqrt(2) * abs(difference) / error, 2, freedom)


def one_sided(above: float, error: float, freedom: int) -> float:
    """P(T >= above / error)."""
    half = two_sided(above, error, freedom) / 2
    return half if above > 0 else 1 - half


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for all at once: p_(i) times those not yet rejected, never less than the one before (Holm 1979)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def best_of(n: int, gold: Sequence[Sequence[float]], proxy: Sequence[Sequence[float]]) -> dict[str, float]:
    """Mean gold and proxy of the best of n replies by the proxy, over prompts: over all draws of n out of a prompt's m replies.

    Reply i from below (by proxy) is the best of C(i - 1, n - 1) of C(m, n) draws.   gold, proxy: a list of m for each prompt.
    kl: ln n - (n - 1) / n, which it is at most (Beirami et al. 2024, arXiv:2401.01879)."""
    golds, proxies = [], []
    for of_gold, of_proxy in zip(gold, proxy, strict=True):
        pairs = sorted(zip(of_proxy, of_gold))
        weights = [math.comb(i, n - 1) / math.comb(len(pairs), n) for i in range(len(pairs))]
        golds.append(math.fsum(w * g for w, (_, g) in zip(weights, pairs)))
        proxies.append(math.fsum(w * p for w, (p, _) in zip(weights, pairs)))
    return {
        "kl": math.log(n) - (n - 1) / n,
        "gold": statistics.fmean(golds),
        "gold_se": standard_error(golds),
        "proxy": statistics.fmean(proxies),
    }


def best_of_at(cells: dict[Any, Row], seed: int, kl: float) -> float:
    """Gold of best of n at `kl` nats, on the line between the two n around it, over sqrt(KL)."""
    points = [
        (_curve(cells[seed, "best_of_n", float(n)]["kl"])[0], cells[seed, "best_of_n", float(n)]["gold"])
        for n in BEST_OF
    ]
    at, xs = _curve(kl)[0], [x for x, _ in points]
    right = bisect_right(xs, at)
    if not 0 < right < len(points):
        raise ValueError(f"best of n: {kl:g} nats are outside of {BEST_OF[0]} to {BEST_OF[-1]}")
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


def _curve(kl: float) -> tuple[float, float]:
    """What gold is a straight line of. A k1 that came out below 0 is of a policy that hardly moved."""
    return math.sqrt(max(kl, 0.0)), kl


def _mean(points: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(statistics.fmean(column) for column in zip(*points))


def _mean_curve() -> tuple[float, ...]:
    return _mean([_curve(target) for target in TARGETS])


def _near(cells: dict[Any, Row], seed: int, penalty: str) -> list[Row]:
    """The rows of a block x form that are where they should be."""
    return [row for target in TARGETS if is_near(row := cells[seed, penalty, target])]


def _moved(row: Row, slopes: Sequence[float], to: Sequence[float]) -> float:
    """Its gold, moved along the curve."""
    return float(row["gold"] + sum(b * (there - here) for b, there, here in zip(slopes, to, _curve(row["kl"]))))


def _at(cells: dict[Any, Row], seed: int, penalty: str, slopes: Sequence[float], to: Sequence[float]) -> float:
    """Mean gold of a block x form over its rows near their targets, each moved along the curve to `to`."""
    return statistics.fmean(_moved(row, slopes, to) for row in _near(cells, seed, penalty))


def _at_target(
    cells: dict[Any, Row],
    seeds: Sequence[int],
    slopes: Sequence[float],
    target: float,
    less: Callable[[dict[Any, Row], int, float], float] = lambda cells, seed, kl: 0.0,
) -> dict[str, Any]:
    """Gold of each form, moved along the curve from the KL that was reached to the target, less what `less` says of the block: mean
    over the blocks where it is near, with its 95 % interval (Student's); None where there is none."""
    found = {}
    for penalty in PENALTIES:
        rows = {seed: row for seed in seeds if is_near(row := cells[seed, penalty, target])}
        values = [_moved(row, slopes, _curve(target)) - less(cells, seed, target) for seed, row in rows.items()]
        ends = mean_interval(values, 0.95, 0)
        interval = None if math.isnan(ends.low) else [ends.low, ends.high]
        found[penalty] = {"mean": statistics.fmean(values) if values else None, "interval_95": interval}
    return found


def _cell(cells: dict[Any, Row], seeds: Sequence[int], penalty: str, target: float) -> dict[str, Any]:
    """What was reached. near, held: in how many blocks the KL read is near the target, and the run had it at its end; kl, gold,
    ...: means over those near, None where there is none. kl_range, coefficient, steps: over all; ended: where others ran."""
    rows = [cells[seed, penalty, target] for seed in seeds]
    near = [row for row in rows if is_near(row)]
    reached = [row["kl"] for row in rows]
    names = ("kl", "gold", "proxy", "length")
    return {
        "penalty": penalty,
        "target": target,
        "near": len(near),
        "held": sum("ended" not in row for row in near) if penalty != "none" else 0,
        **{name: statistics.fmean(row[name] for row in near) if near else None for name in names},
        "kl_range": [min(reached), max(reached)],
        "coefficient": statistics.median(row["coefficient"] for row in rows),
        "steps": statistics.fmean(row["steps"] for row in rows),
        "ended": [row["ended"]["kl"] for row in rows if "ended" in row],
    }


def _best_of_row(cells: dict[Any, Row], seeds: Sequence[int], n: int) -> dict[str, float]:
    rows = [cells[seed, "best_of_n", float(n)] for seed in seeds]
    return {"n": n, **{name: statistics.fmean(row[name] for row in rows) for name in ("kl", "gold", "proxy")}}
