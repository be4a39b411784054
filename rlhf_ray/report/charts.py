"""Charts as inline SVG: lines, dots with whiskers, stacked layers, and a path in the plane.

The SVG is stretched to its box and holds shapes only; text is HTML beside it, so it keeps its size on a phone and on paper.
Under the pointer `script.js` moves one cursor through all charts that count steps, and the legend shows the values there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from rlhf_ray.report.folder import Points, mean
from rlhf_ray.report.html import Html, tag
from rlhf_ray.report.numbers import shown, tick_labels, ticks

MOST_POINTS = 400  # a longer series is drawn as means of equal runs of steps
MOST_DOTS = 60
COLOURS = 6
BOX = 1000.0


@dataclass(frozen=True)
class Line:
    """One series. low, high: ends of a whisker at each dot, of a band along a line, or of a layer where they are stacked."""

    label: str
    points: Points
    kind: Literal["line", "dashed", "dots"] = "line"
    low: Points = field(default_factory=list)
    high: Points = field(default_factory=list)
    value: str = ""  # shown in the legend instead of the last value
    steps: Sequence[float] = ()  # names the points where the horizontal axis is not the step
    colour: int = 0  # set by `draw`, by place in the chart, so that a series keeps its colour when another is missing


@dataclass(frozen=True)
class Chart:
    """note: how to read it.  whiskers: what they are, said where they are drawn.  zero: the value axis starts at 0.
    rule: a value worth a line of its own.  path: points in the plane, joined in the order of steps."""

    title: str
    unit: str
    lines: Sequence[Line]
    note: str = ""
    zero: bool = False
    rule: float | None = None
    stacked: bool = False
    path: bool = False
    x_label: str = "step"
    whiskers: str = ""

    @property
    def empty(self) -> bool:
        return not any(line.points for line in self.lines)


def draw(chart: Chart, span: tuple[float, float] | None = None) -> Html:
    """The figure: title, legend with the last values, plot, axes, note. Empty charts draw nothing.

    span: first and last step of the run, so that all its charts share one axis.
    """
    lines = [replace(line, colour=i % COLOURS) for i, line in enumerate(chart.lines) if line.points]
    if not lines:
        return Html("")
    size = 1 if chart.path else max(-(-len(line.points) // MOST_POINTS) for line in lines)
    drawn = [_spread_out(line) if chart.path else _thinned(line, size) for line in lines]
    layers = _stack(drawn) if chart.stacked else drawn
    if not layers[0].points:
        return Html("")  # layers without a step in common
    frame = _frame(chart, layers, span)
    shapes = _path_shapes(drawn[0], frame) if chart.path else _shapes(layers, frame, chart.stacked)
    unit = {"s": "seconds"}.get(chart.unit, chart.unit)
    means = f"Drawn as means of {size} steps." if size > 1 else ""
    whiskers = chart.whiskers if any(line.low for line in drawn) else ""
    note = " ".join(filter(None, (chart.note, whiskers, means)))
    return tag(
        "figure",
        tag("figcaption", tag("h4", chart.title, tag("span", unit, class_="unit") if unit else None)),
        _legend([replace(line, kind=as_drawn.kind) for line, as_drawn in zip(lines, drawn, strict=True)], chart),
        _plot(shapes, frame, chart, drawn),
        tag("p", note, class_="note") if note else None,
        class_="chart",
    )


@dataclass(frozen=True)
class _Frame:
    """The ranges shown, and the map from values to the box."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return (value - self.x0) / (self.x1 - self.x0)

    def y(self, value: float) -> float:
        return (value - self.y0) / (self.y1 - self.y0)

    def at(self, point: tuple[float, float]) -> str:
        return f"{BOX * self.x(point[0]):.4g} {BOX * (1 - self.y(point[1])):.4g}"


def _frame(chart: Chart, lines: Sequence[Line], span: tuple[float, float] | None) -> _Frame:
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in [*line.points, *line.low, *line.high]]
    ys += [0.0] if chart.zero or chart.stacked else []
    ys += [chart.rule] if chart.rule is not None else []
    x0, x1 = span if span and not chart.path else (min(xs), max(xs))
    low, high = min(ys), max(ys)
    room = (high - low or abs(high) or 1.0) * 0.08
    y0 = low if low == 0 and (chart.zero or chart.stacked) else low - room
    y1 = high + room
    if chart.unit == "share":
        y0, y1 = max(y0, min(low, 0.0)), min(y1, max(high, 1.0))
    x_room = (x1 - x0) * 0.05 if chart.path else 0.0
    return _Frame(x0 - x_room, (x1 if x1 > x0 else x0 + 1) + x_room, y0, y1 if y1 - y0 > 1e-200 else y0 + 1)


def _thinned(line: Line, size: int) -> Line:
    """Means of runs of `size` steps where there are too many points to draw, and no dots where they would touch."""
    kind = "line" if line.kind == "dots" and len(line.points) > MOST_DOTS else line.kind
    if len(line.points) <= MOST_POINTS:
        return line if kind == line.kind else replace(line, kind=kind, low=[], high=[])
    runs = [line.points[i : i + size] for i in range(0, len(line.points), size)]
    return replace(line, kind=kind, low=[], high=[], points=[(run[-1][0], mean([y for _, y in run])) for run in runs])


def _spread_out(line: Line) -> Line:
    """At most `MOST_DOTS` points of a path, evenly chosen, the first and last among them."""
    kept = sorted({round(i * (len(line.points) - 1) / (MOST_DOTS - 1)) for i in range(MOST_DOTS)})
    return replace(line, points=[line.points[i] for i in kept], steps=[line.steps[i] for i in kept])


def _stack(lines: Sequence[Line]) -> list[Line]:
    """Each series on top of those before it, at the steps where all of them have a value."""
    steps = sorted(set.intersection(*({x for x, _ in line.points} for line in lines)))
    floor = dict.fromkeys(steps, 0.0)
    stacked = []
    for line in lines:
        values = dict(line.points)
        top = {x: floor[x] + values[x] for x in steps}
        stacked.append(replace(line, points=list(top.items()), low=list(floor.items()), high=list(top.items())))
        floor = top
    return stacked


def _stairs(points: Points) -> Points:
    """Each value held over its own step, so that a step that took long does not lean on its neighbours."""
    xs = [x for x, _ in points]
    edges = [xs[0], *((a + b) / 2 for a, b in pairwise(xs)), xs[-1]]
    return [(edge, y) for i, (_, y) in enumerate(points) for edge in (edges[i], edges[i + 1])]


def _trace(points: Points, frame: _Frame) -> str:
    return "M" + "L".join(frame.at(point) for point in points)


def _shapes(lines: Sequence[Line], frame: _Frame, stacked: bool) -> list[Html]:
    shapes = []
    for line in lines:
        colour = f"s{line.colour}"
        if stacked:
            outline = _trace([*_stairs(line.high), *reversed(_stairs(line.low))], frame) + "Z"
            shapes.append(tag("path", d=outline, class_=f"area {colour}"))
        elif line.low and line.kind == "line":
            shapes.append(
                tag("path", d=_trace([*line.high, *reversed(line.low)], frame) + "Z", class_=f"band {colour}")
            )
        elif line.low:
            whiskers = "".join(f"M{frame.at(a)}L{frame.at(b)}" for a, b in zip(line.low, line.high, strict=True))
            shapes.append(tag("path", d=whiskers, class_=f"whisker {colour}"))
        if not stacked:
            style = {"line": "line", "dashed": "line dashed", "dots": "line thin"}[line.kind]
            shapes.append(tag("path", d=_trace(line.points, frame), class_=f"{style} {colour}"))
        if line.kind == "dots" or len(line.points) == 1:
            shapes.append(tag("path", d="".join(f"M{frame.at(p)}h0" for p in line.points), class_=f"dot {colour}"))
    return shapes


def _path_shapes(line: Line, frame: _Frame) -> list[Html]:
    """Points in the plane, joined in the order of steps."""
    dots = [
        tag(
            "path",
            tag("title", f"step {step:.0f}: {shown(x)}, {shown(y)}"),
            d=f"M{frame.at((x, y))}h0",
            class_="dot s0",
        )
        for (x, y), step in zip(line.points, line.steps, strict=True)
    ]
    return [tag("path", d=_trace(line.points, frame), class_="line thin s0"), *dots]


def _legend(lines: Sequence[Line], chart: Chart) -> Html:
    items = [
        tag(
            "li",
            tag("i", class_=f"key {'area' if chart.stacked else line.kind} s{line.colour}"),
            f"{line.label} ",
            tag("b", line.value or shown(line.points[-1][1], chart.unit)) if not chart.path else None,
        )
        for line in lines
    ]
    return tag("ul", items, class_="legend")


def _plot(shapes: list[Html], frame: _Frame, chart: Chart, lines: Sequence[Line]) -> Html:
    y_ticks, x_ticks = ticks(frame.y0, frame.y1, 4), ticks(frame.x0, frame.x1, 5)
    if not chart.path:
        x_ticks = [t for t in x_ticks if t == int(t)]
    grid = "".join(f"M0 {BOX * (1 - frame.y(t)):.4g}H{BOX:.0f}" for t in y_ticks)
    rule = (
        tag("path", d=f"M0 {BOX * (1 - frame.y(chart.rule)):.4g}H{BOX:.0f}", class_="rule")
        if chart.rule is not None
        else None
    )
    svg = tag(
        "svg",
        tag("title", _in_words(chart, lines)),
        tag("path", d=grid, class_="grid") if grid else None,
        rule,
        shapes,
        viewBox=f"0 0 {BOX:.0f} {BOX:.0f}",
        preserveAspectRatio="none",
        role="img",
    )
    y_axis = [
        tag("span", label, style=f"bottom:{100 * frame.y(t):.1f}%")
        for t, label in zip(y_ticks, tick_labels(y_ticks, chart.unit), strict=True)
    ]
    x_axis = [
        tag("span", label, style=f"left:{100 * frame.x(t):.1f}%")
        for t, label in zip(x_ticks, tick_labels(x_ticks), strict=True)
    ]
    values = (
        _values_at_steps(lines, chart.unit) | {"data_span": f"{frame.x0:.12g}|{frame.x1:.12g}"}
        if not chart.path
        else {}
    )
    return tag(
        "div",
        tag("div", y_axis, class_="y"),
        tag("div", svg, _ends(lines[0], frame) if chart.path else tag("i", class_="cursor", hidden=True), class_="box"),
        tag("div", chart.x_label if not chart.path else None, class_="xname"),
        tag("div", x_axis, class_="x"),
        tag("div", chart.x_label, class_="xtitle") if chart.path else None,
        class_="plot",
        **values,
    )


def _ends(line: Line, frame: _Frame) -> list[Html]:
    """Names for the first and last point of a path."""
    named = []
    for (x, y), step in ((line.points[0], line.steps[0]), (line.points[-1], line.steps[-1])):
        side = "left" if frame.x(x) > 0.5 else "right"
        height = "below" if frame.y(y) < 0.5 else "above"
        place = f"left:{100 * frame.x(x):.1f}%;bottom:{100 * frame.y(y):.1f}%"
        named.append(tag("span", f"step {step:.0f}", class_=f"name {side} {height}", style=place))
    return named


def _values_at_steps(lines: Sequence[Line], unit: str) -> dict[str, str]:
    """What the script shows under the pointer: the steps, and per series the text of its value at (or last before) each."""
    steps = sorted({x for line in lines for x, _ in line.points})
    columns = []
    for line in lines:
        texts, known, text = [], dict(line.points), ""
        for step in steps:
            text = shown(known[step], unit) if step in known else text
            texts.append(text)
        columns.append("|".join(texts))
    return {"data_steps": "|".join(f"{s:.0f}" for s in steps), "data_values": "\n".join(columns)}


def _in_words(chart: Chart, lines: Sequence[Line]) -> str:
    """For those who cannot see the curve: where each series starts, ends, and its extremes."""
    parts = []
    for line in lines:
        ys = [y for _, y in line.points]
        first, final, low, high = (shown(y, chart.unit) for y in (ys[0], ys[-1], min(ys), max(ys)))
        parts.append(f"{line.label}: {first} to {final}, lowest {low}, highest {high}")
    return f"{chart.title}. " + "; ".join(parts)


def interval(value: float, error: float | None, low: float, high: float) -> Html:
    """A dot with its 95% interval on a strip from `low` to `high`, for a cell of a table."""
    span = (high - low) or 1.0
    spread = 1.96 * (error or 0.0)
    a, b, c = (f"{BOX * (v - low) / span:.4g}" for v in (value - spread, value, value + spread))
    return tag(
        "svg",
        tag("path", d=f"M{a} 500H{c}", class_="line s0"),
        tag("path", d=f"M{b} 500h0", class_="dot s0"),
        viewBox=f"0 0 {BOX:.0f} {BOX:.0f}",
        preserveAspectRatio="none",
        class_="interval",
        aria_hidden="true",
    )


def shares(lines: Sequence[Line]) -> list[Line]:
    """The same series, each with its share of their common sum as its legend value."""
    sums = [sum(y for _, y in line.points) for line in lines]
    total = sum(sums) or 1.0
    return [replace(line, value=shown(part / total, "share")) for line, part in zip(lines, sums, strict=True)]


def constant(points: Points) -> bool:
    return all(a[1] == b[1] for a, b in pairwise(points))
