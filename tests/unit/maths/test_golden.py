"""The golden values are what the kept script derives, and they agree with the published tables."""

from __future__ import annotations

import ast
import runpy
from typing import Any

import pytest


def test_the_script_still_derives_the_stored_values(golden: dict[str, Any], golden_dir) -> None:
    derived = runpy.run_path(str(golden_dir / "derive.py"))["derive"]()
    _same(derived, golden, "golden")


def _same(derived: Any, stored: Any, where: str) -> None:
    if isinstance(stored, dict):
        assert list(derived) == list(stored), where
        for key in stored:
            _same(derived[key], stored[key], f"{where}.{key}")
    elif isinstance(stored, list):
        assert len(derived) == len(stored), where
        for i, (a, b) in enumerate(zip(derived, stored)):
            _same(a, b, f"{where}[{i}]")
    elif isinstance(stored, float):
        assert derived == pytest.approx(stored, rel=1e-12, abs=1e-15), where  # libm may differ in the last bit
    else:
        assert derived == stored, where


def test_the_script_imports_neither_torch_nor_the_project(golden_dir) -> None:
    tree = ast.parse((golden_dir / "derive.py").read_text(encoding="utf-8"))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names == {"__future__", "hashlib", "json", "math", "pathlib"}


@pytest.mark.parametrize(
    ("d", "kl", "clamped", "squared", "bregman", "js"),
    [
        (-2.0, -2, 0, 2, 4.389056, 0.283110),
        (-0.5, -0.5, 0, 0.125, 0.148721, 0.109535),
        (0.0, 0, 0, 0, 0, 0),
        (0.5, 0.5, 0.5, 0.125, 0.106531, 0.109535),
        (2.0, 2, 2, 2, 1.135335, 0.283110),
    ],
)
def test_published_penalty_table(golden, d, kl, clamped, squared, bregman, js) -> None:
    expected = {"kl": kl, "clamped_kl": clamped, "squared_error": squared, "bregman": bregman, "jensen_shannon": js}
    assert dict(golden["penalties"])[d] == pytest.approx(expected | {"none": 0}, abs=1e-6)


@pytest.mark.parametrize(
    ("case", "advantages", "returns"),
    [
        ("ends at eos", [0.4567, 0.386, 0.28], [0.9567, 0.986, 0.98]),
        ("cut off by length", [1.08845, 1.051, 0.98], [1.58845, 1.651, 1.68]),
        ("lambda 1", [0.49, 0.40, 0.28], [0.99, 1.00, 0.98]),
        ("lambda 0", [0.09, 0.12, 0.28], [0.59, 0.72, 0.98]),
        ("gamma .9 lambda .8", [0.211152, 0.2516, 0.28], [0.711152, 0.8516, 0.98]),
    ],
)
def test_published_gae_table(golden, case, advantages, returns) -> None:
    assert golden["gae"]["cases"][case]["advantages"] == pytest.approx(advantages, abs=1e-9)
    assert golden["gae"]["cases"][case]["returns"] == pytest.approx(returns, abs=1e-9)


def test_published_single_numbers(golden) -> None:
    assert golden["gae"]["wrong_pad_counted"] == pytest.approx([0.9034, 0.8563, 0.775], abs=1e-4)
    white = golden["whitening"]
    assert (white["mean"], white["var"]) == (2.5, 1.25)
    assert white["centred"][0] == pytest.approx([-1.341641, -0.447214, 0.447214], abs=1e-6)
    assert white["uncentred"][0] == pytest.approx([1.158359, 2.052786, 2.947214], abs=1e-6)
    assert (white["wrong_unmasked_mean"], white["wrong_unmasked_var"]) == (1.25, 2.1875)
    assert white["wrong_unmasked_pad"] == pytest.approx(-0.845154, abs=1e-6)
    losses = golden["losses"]
    assert [x[2] for x in losses["policy"][:4]] == pytest.approx([-1.2, -0.5, 1.5, 0.8])
    assert [x[3] for x in losses["value"][:2]] == pytest.approx([0.845, 0.98])
    assert (losses["normalised"], losses["wrong_mean_of_means"]) == (1.4, 2.0)
    wins = golden["win_rate"]
    assert (wins["rate"], wins["se"]) == pytest.approx((46.63760896637609, 1.751619984513092), rel=1e-13)
    assert wins["wrong_draws_are_losses"] == pytest.approx(46.08, abs=0.005)
    # The first outputs of SplitMix64 for seed 1234567, as printed by its authors' reference implementation.
    assert golden["random"]["splitmix64_1234567"][:2] == ["6457827717110365317", "3203168211198807973"]
