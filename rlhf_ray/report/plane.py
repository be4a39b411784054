"""Dots in the plane: one figure against another, in series, with the frontier drawn through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rlhf_ray.report.charts import BOX, COLOURS
from rlhf_ray.report.folder import Points
from rlhf_ray.report.html import Html, tag
from rlhf_ray.report.numbers import shown, tick_labels, ticks


@dataclass(frozen=True)
class Dots:
    """A series. names: what each dot is, said under the pointer.  low, high: ends of the whisker at each dot, if there are any."""

    label: str
    points: Points
    names: Sequence[str]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Plane:
    """frontier: points joined by a line.  marked: one point with a ring.  limit: a vertical line, with its name."""

    title: str
    x_label: str
    series: Sequence[Dots]
    frontier: Points = field(default_factory=list)
    marked: tuple[float, float] | None = None
    limit: tuple[float, str] | None = None
    note: str = ""


def draw_plane(plane: Plane) -> Html:
    """The figure; nothing if there are no dots."""
    xs = [x for s in plane.series for x, _ in s.points]
    if not xs:
        return Html("")
    ys = [y for s in plane.series for y in [*(p[1] for p in s.points), *s.low, *s.high]]
    if plane.limit is not None:
        xs.append(plane.limit[0])
    (x0, x1), (y0, y1) = _room([*xs, 0.0] if min(xs) > 0 else xs), _room(ys)  # nats start at 0

    def at(x: float, y: float) -> str:
        return f"{BOX * (x - x0) / (x1 - x0):.4g} {BOX * (1 - (y - y0) / (y1 - y0)):.4g}"

    x_ticks, y_ticks = ticks(x0, x1, 5), ticks(y0, y1, 4)
    grid = "".join(f"M{at(x0, t)}H{BOX:.0f}" for t in y_ticks)
    shapes = [tag("path", d=grid, class_="grid")]
    if plane.limit is not None:
        shapes.append(tag("path", tag("title", plane.limit[1]), d=f"M{at(plane.limit[0], y0)}V0", class_="rule"))
    if len(plane.frontier) > 1:
        shapes.append(tag("path", d="M" + "L".join(at(*p) for p in plane.frontier), class_="line thin s5"))
    if plane.marked is not None:
        shapes.append(tag("path", d=f"M{at(*plane.marked)}h0", class_="dot ring s0"))
    shapes += [shape for i, series in enumerate(plane.series) for shape in _dots(series, i % COLOURS, at)]
    svg = tag(
        "svg",
        tag("title", _in_words(plane)),
        shapes,
        viewBox=f"0 0 {BOX:.0f} {BOX:.0f}",
        preserveAspectRatio="none",
        role="img",
    )
    y_axis = [
        tag("span", text, style=f"bottom:{100 * (t - y0) / (y1 - y0):.1f}%")
        for t, text in zip(y_ticks, tick_labels(y_ticks))
    ]
    x_axis = [
        tag("span", text, style=f"left:{100 * (t - x0) / (x1 - x0):.1f}%")
        for t, text in zip(x_ticks, tick_labels(x_ticks))
    ]
    legend = [
        tag("li", tag("i", class_=f"key dots s{i % COLOURS}"), s.label) for i, s in enumerate(plane.series) if s.points
    ]
    return tag(
        "figure",
        tag("figcaption", tag("h4", plane.title)),
        tag("ul", legend, class_="legend"),
        tag(
            "div",
            tag("div", y_axis, class_="y"),
            tag("div", svg, class_="box"),
            tag("div", class_="xname"),
            tag("div", x_axis, class_="x"),
            tag("div", plane.x_label, class_="xtitle"),
            class_="plot",
        ),
        tag("p", plane.note, class_="note") if plane.note else None,
        class_="chart",
    )


def _dots(series: Dots, colour: int, place: Callable[[float, float], str]) -> list[Html]:
    shapes = []
    for (x, _), low, high in zip(series.points, series.low, series.high):
        shapes.append(tag("path", d=f"M{place(x, low)}L{place(x, high)}", class_=f"whisker s{colour}"))
    for (x, y), name in zip(series.points, series.names, strict=True):
        told = tag("title", f"{name}: {shown(x)}, {shown(y)}")
        shapes.append(tag("path", told, d=f"M{place(x, y)}h0", class_=f"dot s{colour}"))
    return shapes


def _room(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low or abs(high) or 1.0) * 0.07
    return low - room, high + room


def _in_words(plane: Plane) -> str:
    """For those who cannot see the dots."""
    parts = [
        f"{s.label}: " + ", ".join(f"({shown(x)}, {shown(y)})" for x, y in s.points) for s in plane.series if s.points
    ]
    return f"{plane.title}, against {plane.x_label}. " + "; ".join(parts)
