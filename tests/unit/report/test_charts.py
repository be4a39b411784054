"""Charts: where points land, what is stacked, what the axes say. Coordinates: the box is 1000 x 1000, y runs downwards."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.report.charts import MOST_DOTS, MOST_POINTS, Chart, Line, constant, draw, shares
from rlhf_ray.report.numbers import count, percent, shown, size, tick_labels, ticks, with_error


def traces(figure: str, kind: str) -> list[list[tuple[float, float]]]:
    """The points of every path of a class, in box coordinates."""
    found = re.findall(rf'<path d="([^"]*)" class="(?:{kind})', figure)
    return [[(float(x), float(y)) for x, y in re.findall(r"([\d.e+-]+) ([\d.e+-]+)", d)] for d in found]


def test_points_land_where_they_belong() -> None:
    """From 0 to 2 with 8% of room above and zero as floor: 2 lies at 1 - 2/2.16 = 0.0741 of the height."""
    figure = draw(Chart("T", "", [Line("a", [(0, 0), (5, 1), (10, 2)])], zero=True))
    assert traces(figure, "line s0") == [
        [(0, 1000), (500, pytest.approx(537.0)), (1000, pytest.approx(74.07, abs=0.01))]
    ]


def test_the_axis_spans_the_run_and_not_only_the_series() -> None:
    figure = draw(Chart("T", "", [Line("a", [(5, 1), (10, 2)])]), span=(0, 20))
    assert [x for x, _ in traces(figure, "line s0")[0]] == [250, 500]
    assert 'data-span="0|20"' in figure


def test_layers_are_stacked_in_order_and_touch() -> None:
    lines = [Line("low", [(1, 1), (2, 1)]), Line("high", [(1, 2), (2, 3)])]
    low, high = traces(draw(Chart("T", "s", lines, stacked=True)), "area")
    top_of_low = [y for _, y in low[: len(low) // 2]]
    bottom_of_high = [y for _, y in high[len(high) // 2 :]][::-1]
    assert top_of_low == bottom_of_high
    full = 4 * 1.08  # the tallest stack and 8% of room
    assert sorted({y for _, y in high}) == pytest.approx([1000 * (1 - v / full) for v in (4, 3, 1)], abs=0.1)


def test_whiskers_end_at_the_given_values() -> None:
    line = Line("a", [(0, 1), (1, 1)], "dots", low=[(0, 0), (1, 0)], high=[(0, 2), (1, 2)])
    figure = draw(Chart("T", "", [line], whiskers="Whiskers: x."))
    (points,) = traces(figure, "whisker s0")
    bottom, top = 1000 * (1 - 0.16 / 2.32), 1000 * 0.16 / 2.32
    assert [y for _, y in points] == [pytest.approx(v, abs=0.1) for v in (bottom, top, bottom, top)]
    assert "Whiskers: x." in figure


def test_a_long_series_keeps_its_mean_and_its_last_value_in_the_legend() -> None:
    points = [(float(i), float(i % 7)) for i in range(10 * MOST_POINTS)]
    figure = draw(Chart("T", "", [Line("a", points)], "Note.", zero=True))
    (drawn,) = traces(figure, "line s0")
    height = 6 * 1.08 if max(y for _, y in points) == 6 else math.nan
    values = [(1 - y / 1000) for _, y in drawn]
    assert len(drawn) == MOST_POINTS and "Note. Drawn as means of 10 steps." in figure
    top = max(sum(y for _, y in points[i : i + 10]) / 10 for i in range(0, len(points), 10)) * 1.08
    assert sum(values) / len(values) * top == pytest.approx(sum(y for _, y in points) / len(points), rel=0.01)
    assert f"<b>{shown(points[-1][1])}</b>" in figure and height > top


def test_many_evaluations_become_a_line_without_dots() -> None:
    points = [(float(i), 1.0 + i) for i in range(MOST_DOTS + 1)]
    figure = draw(Chart("T", "", [Line("a", points, "dots", points, points)], whiskers="Whiskers."))
    assert not traces(figure, "dot") and not traces(figure, "whisker") and "Whiskers." not in figure


def test_a_path_names_its_steps_and_keeps_both_ends() -> None:
    points = [(float(i * i), float(i)) for i in range(200)]
    figure = draw(Chart("T", "", [Line("a", points, steps=range(200))], path=True, x_label="KL"))
    assert figure.count('class="dot s0"') <= MOST_DOTS
    assert (
        ">step 0</span>" in figure and ">step 199</span>" in figure and "<title>step 199: 39,601, 199</title>" in figure
    )


def test_colours_stay_with_the_series_when_another_is_missing() -> None:
    figure = draw(Chart("T", "", [Line("a", []), Line("b", [(0, 1), (1, 2)])]))
    assert 'class="line s1"' in figure and "s0" not in figure


def test_nothing_to_draw_draws_nothing() -> None:
    chart = Chart("T", "", [Line("a", [])])
    assert chart.empty and draw(chart) == ""
    assert draw(Chart("T", "s", [Line("a", [(1, 1)]), Line("b", [(2, 1)])], stacked=True)) == ""


def test_under_the_pointer_each_step_has_the_last_known_value() -> None:
    chart = Chart("T", "share", [Line("a", [(1, 0.5), (2, 0.25)]), Line("b", [(2, 1.0)])])
    figure = draw(chart)
    assert 'data-steps="1|2"' in figure and 'data-values="50%|25%\n|100%"' in figure


def test_charts_can_be_heard() -> None:
    figure = draw(Chart("Reward", "", [Line("training", [(0, 1.0), (1, 3.0), (2, 2.0)])]))
    assert "<title>Reward. training: 1.00 to 2.00, lowest 1.00, highest 3.00</title>" in figure


def test_shares_add_up() -> None:
    assert [line.value for line in shares([Line("a", [(0, 1.0), (1, 2.0)]), Line("b", [(0, 1.0)])])] == ["75%", "25%"]


def test_constant() -> None:
    assert constant([]) and constant([(0, 1.0), (1, 1.0)]) and not constant([(0, 1.0), (1, 2.0)])


finite = st.floats(-1e99, 1e99)


@given(
    st.lists(st.tuples(st.integers(0, 10**9), finite), min_size=1, max_size=20),
    st.booleans(),
    st.sampled_from(["", "share", "s", "bytes"]),
)
def test_any_numbers_can_be_drawn_inside_the_box(points: list[tuple[int, float]], zero: bool, unit: str) -> None:
    line = Line("a", sorted({x: (float(x), y) for x, y in points}.values()))
    figure = draw(Chart("T", unit, [line], zero=zero))
    assert "nan" not in figure and "inf" not in figure.replace("infinity", "")
    assert all(-1 <= v <= 1001 for path in traces(figure, "line|dot") for point in path for v in point)


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12), st.integers(2, 6))
def test_ticks_are_round_even_and_inside(low: float, gap: float, wanted: int) -> None:
    high = low + gap
    if high - low < 1e-6 * max(abs(low), abs(high)):
        return  # closer than a chart can tell
    found = ticks(low, high, wanted)
    steps = {round(b / a if a else 0, 6) for a, b in zip(found, found)}
    assert 1 <= len(found) <= wanted + 2 and steps <= {0, 1}
    assert all(low - 1e-6 * gap <= t <= high + 1e-6 * gap for t in found)
    if len(found) > 1:
        step = found[1] - found[0]
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5, 10)) < 1e-2


@pytest.mark.parametrize(
    ("values", "unit", "labels"),
    [
        ([0, 20, 40], "", ["0", "20", "40"]),
        ([0, 0.25, 0.5], "", ["0.00", "0.25", "0.50"]),
        ([-1, 0, 1], "", ["−1", "0", "1"]),
        ([0, 0.5, 1], "share", ["0%", "50%", "100%"]),
        ([0.975, 1.0], "share", ["97.5%", "100.0%"]),
        ([0, 1e-5, 2e-5], "", ["0", "1e−5", "2e−5"]),
        ([0, 10000, 20000], "", ["0k", "10k", "20k"]),
        ([0, 5e8, 1e9], "bytes", ["0", "500 MB", "1.0 GB"]),
        ([], "", []),
    ],
)
def test_tick_labels(values: list[float], unit: str, labels: list[str]) -> None:
    assert tick_labels(values, unit) == labels


def test_numbers_for_readers() -> None:
    assert (
        shown(-1.234) == "−1.23"
        and shown(2e-5) == "2.0e−5"
        and shown(0.5, "share") == "50%"
        and shown(95, "s") == "1 min 35 s"
    )
    assert percent(0.1234) == "12.3%" and percent(-0.5) == "−50%"
    assert [size(v) for v in (0, 999, 1234, 1_234_567, 5e9)] == ["0 B", "999 B", "1.2 kB", "1.2 MB", "5.0 GB"]
    assert count(1, "step") == "1 step" and count(3000, "step") == "3,000 steps" and count(0, "step") == "0 steps"


@pytest.mark.parametrize(
    ("value", "error", "unit", "text"),
    [
        (1.6171, 0.06, "", "1.62 ± 0.06"),
        (1.6171, 0.013, "", "1.617 ± 0.013"),
        (-0.5, 0.3, "", "−0.5 ± 0.3"),
        (12.0, 5.0, "", "12 ± 5"),
        (0.93, 0.02, "share", "93% ± 2"),
        (1.5, 0.0, "", "1.50"),
    ],
)
def test_errors_set_the_decimals(value: float, error: float, unit: str, text: str) -> None:
    assert with_error(value, error, unit) == text
