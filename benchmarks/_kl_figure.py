"""The figure of kl_study.py as an SVG file: gold over sqrt(KL), a dot for each form and target, the line of best of n."""

from __future__ import annotations

from typing import Any

from _kl_analysis import PENALTIES

from rlhf_ray.report.html import Html, tag
from rlhf_ray.report.numbers import tick_labels, ticks

COLOURS = dict(zip(PENALTIES, ("#1f6feb", "#d1242f", "#1a7f37", "#8250df", "#bf8700", "#57606a"), strict=True))
LEFT, TOP, WIDTH, HEIGHT = 60, 16, 460, 300
KL_TICKS = (0.25, 1.0, 2.5, 6.0)


def draw(measured: dict[str, Any]) -> str:
    """The text of the file."""
    dots = [(cell["penalty"], cell["kl"], cell["gold"]) for cell in measured["cells"] if cell["near"]]
    line = [(0.0, measured["base"]), *((row["kl"], row["gold"]) for row in measured["best_of_n"])]
    golds = [gold for *_, gold in dots] + [gold for _, gold in line]
    low, high = min(golds) - 0.02, max(golds) + 0.02
    widest = max(kl for _, kl, _ in dots) ** 0.5 * 1.05

    def x(kl: float) -> float:
        return round(LEFT + WIDTH * max(kl, 0.0) ** 0.5 / widest, 1)

    def y(gold: float) -> float:
        return round(TOP + HEIGHT * (high - gold) / (high - low), 1)

    bottom, right = TOP + HEIGHT, LEFT + WIDTH
    marks = ticks(low, high, 5)
    shapes: list[Html] = [tag("rect", width=680, height=370, fill="white")]
    for value, label in zip(marks, tick_labels(marks), strict=True):
        shapes.append(tag("path", d=f"M{LEFT} {y(value)}H{right}", stroke="#d0d7de"))
        shapes.append(tag("text", label, x=LEFT - 6, y=y(value) + 4, text_anchor="end"))
    for kl in KL_TICKS:
        shapes.append(tag("path", d=f"M{x(kl)} {bottom}v5", stroke="#57606a"))
        shapes.append(tag("text", f"{kl:g}", x=x(kl), y=bottom + 18, text_anchor="middle"))
    shapes.append(
        tag(
            "text",
            "KL to the start, nats per reply (root scale)",
            x=LEFT + WIDTH / 2,
            y=bottom + 38,
            text_anchor="middle",
        )
    )
    shapes.append(
        tag(
            "text",
            "gold reward",
            x=16,
            y=TOP + HEIGHT / 2,
            text_anchor="middle",
            transform=f"rotate(-90 16 {TOP + HEIGHT / 2})",
        )
    )
    path = "M" + "L".join(f"{x(kl)} {y(gold)}" for kl, gold in line)
    shapes.append(tag("path", d=path, fill="none", stroke="black", stroke_dasharray="5 3"))
    for penalty, kl, gold in dots:
        told = tag("title", f"{penalty}: {gold:.3f} at {kl:.2f} nats")
        shapes.append(tag("circle", told, cx=x(kl), cy=y(gold), r=4, fill=COLOURS[penalty]))
    for i, penalty in enumerate(PENALTIES):
        shapes.append(tag("circle", cx=right + 20, cy=TOP + 12 + 20 * i, r=4, fill=COLOURS[penalty]))
        shapes.append(tag("text", penalty, x=right + 32, y=TOP + 16 + 20 * i))
    at = TOP + 12 + 20 * len(PENALTIES)
    shapes.append(tag("path", d=f"M{right + 10} {at}h20", stroke="black", stroke_dasharray="5 3"))
    shapes.append(tag("text", "best of n", x=right + 32, y=at + 4))
    blocks = f"{measured['blocks']} blocks"
    shapes.append(tag("text", f"means of {blocks}" if measured["blocks"] > 1 else "one block", x=right + 10, y=at + 30))
    return tag(
        "svg",
        shapes,
        xmlns="http://www.w3.org/2000/svg",
        viewBox="0 0 680 370",
        width=680,
        height=370,
        font_family="sans-serif",
        font_size=13,
    )
