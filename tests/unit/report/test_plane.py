"""Dots in the plane."""

from __future__ import annotations

from rlhf_ray.report.numbers import shown
from rlhf_ray.report.plane import Dots, Plane, draw_plane


def test_dots_whiskers_frontier_and_limit() -> None:
    series = [Dots("kl <b>", [(1.0, 2.0), (3.0, 4.0)], ["a", "b"], [1.5, 3.5], [2.5, 4.5]), Dots("nothing", [], [])]
    page = draw_plane(Plane("T", "nats", series, [(1.0, 2.0), (3.0, 4.0)], (3.0, 4.0), (5.0, "cap 5")))
    assert page.count('class="dot s0"') == 2 and page.count('class="whisker s0"') == 2
    assert f"<title>a: {shown(1.0)}, {shown(2.0)}</title>" in page and "<title>cap 5</title>" in page
    assert "kl &lt;b&gt;" in page and "nothing" not in page
    assert page.count('class="dot ring s0"') == 1 and page.count("line thin") == 1


def test_no_dots_no_figure_and_one_dot_is_no_division_by_zero() -> None:
    assert draw_plane(Plane("T", "nats", [Dots("a", [], [])])) == ""
    assert "nan" not in draw_plane(Plane("T", "nats", [Dots("a", [(0.0, 0.0)], ["x"])]))
