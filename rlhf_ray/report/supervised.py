"""The stories of SFT and reward-model runs."""

from __future__ import annotations

import math

from rlhf_ray.console import duration
from rlhf_ray.metrics import METRICS
from rlhf_ray.report.charts import Chart, Line
from rlhf_ray.report.folder import Points, RunFiles, last
from rlhf_ray.report.html import Html, tag
from rlhf_ray.report.numbers import count, shown
from rlhf_ray.report.story import Finding, Story, Tile, change


def sft_story(run: RunFiles) -> Story:
    held_out = run.values("eval/loss")
    charts = [
        _loss(run, "Mean over reply tokens. Held-out loss should fall and flatten; if it rises while training loss falls, the"
              " adapter memorises: train for fewer steps."),
        *_optimiser(run),
    ]  # fmt: skip
    return Story(
        _sentence(run, "eval/loss", "Held-out loss", "Training loss"),
        tiles=[
            *_tile(run, "eval/loss", "Held-out loss"),
            *([Tile("Held-out perplexity", shown(math.exp(min(held_out[-1], 50.0))))] if held_out else []),
            *_tile(run, "loss", "Training loss"),
            *_effort(run),
        ],
        findings=_overfit(run),
        groups=[("Loss and optimisation", charts)],
    )


def reward_story(run: RunFiles) -> Story:
    accuracy = run.points("eval/accuracy")
    charts = [
        Chart(
            "Accuracy",
            "share",
            [
                Line("training", run.points("accuracy")),
                Line("held-out", accuracy, "dots", *_interval(run, accuracy)),
            ],
            "Pairs whose chosen reply scores higher. 50% is chance. On human preferences about 65% is normal, since people"
            " agree among themselves about as often.",
            rule=0.5,
            whiskers="Whiskers: 95% interval.",
        ),
        _loss(run, "Bradley-Terry loss; 0.693 is chance."),
        Chart(
            "Margin",
            "reward",
            [Line("training", run.points("margin")), Line("held-out", run.points("eval/margin"), "dots")],
            "Mean score of chosen minus rejected. It sets the scale of the rewards that PPO sees.",
            zero=True,
        ),
        *_optimiser(run),
    ]
    low, high = last(run.points("eval/accuracy_low")), last(run.points("eval/accuracy_high"))
    interval = (
        f"95% interval {shown(low, 'share')} to {shown(high, 'share')}" if low is not None and high is not None else ""
    )
    return Story(
        _sentence(run, "eval/accuracy", "Held-out accuracy", "Training loss"),
        tiles=[
            *([Tile("Held-out accuracy", shown(accuracy[-1][1], "share"), interval)] if accuracy else []),
            *_tile(run, "eval/margin", "Held-out margin"),
            *_tile(run, "eval/loss", "Held-out loss"),
            *_effort(run),
        ],
        findings=[*_chance(low), *_length_bias(run), *_overfit(run)],
        groups=[("Quality and optimisation", charts)],
        tables=[table] if (table := _rates(run)) else [],
    )


def _interval(run: RunFiles, accuracy: Points) -> tuple[Points, Points]:
    """The ends of the interval where both were written, for every evaluation or for none."""
    low, high = run.points("eval/accuracy_low"), run.points("eval/accuracy_high")
    steps = [x for x, _ in accuracy]
    return (low, high) if [x for x, _ in low] == steps == [x for x, _ in high] else ([], [])


def _sentence(run: RunFiles, held_out: str, label: str, other: str) -> str:
    name, label = (held_out, label) if run.values(held_out) else ("loss", other)
    values, unit = run.values(name), METRICS[name].unit
    if not values:
        return "No step has been finished yet."
    if len(values) == 1:
        return f"{label} is {shown(values[0], unit)} after {count(run.steps, 'step')}."
    return f"{label} went from {shown(values[0], unit)} to {shown(values[-1], unit)} in {count(run.steps, 'step')}."


def _tile(run: RunFiles, name: str, label: str) -> list[Tile]:
    values, unit = run.values(name), METRICS[name].unit
    return [Tile(label, shown(values[-1], unit), change(values, unit))] if values else []


def _effort(run: RunFiles) -> list[Tile]:
    tiles = [Tile("Steps", shown(run.steps), _epochs(run))] if run.steps else []
    seconds = run.summary.get("seconds")
    if isinstance(seconds, (int, float)):
        tiles.append(Tile("Time", duration(float(seconds))))
    return tiles


def _epochs(run: RunFiles) -> str:
    epochs = run.values("epoch")
    return f"{epochs[-1]:.3g} {'epoch' if epochs[-1] == 1 else 'epochs'}" if epochs else ""


def _loss(run: RunFiles, note: str) -> Chart:
    lines = [Line("training", run.points("loss")), Line("held-out", run.points("eval/loss"), "dots")]
    return Chart("Loss", "nats", lines, note)


def _optimiser(run: RunFiles) -> list[Chart]:
    limit = run.config.get("max_grad_norm", 1.0)
    return [
        Chart(
            "Learning rate", "", [Line("learning rate", run.points("learning_rate"))], "Warm-up, then decay.", zero=True
        ),
        Chart(
            "Gradient norm",
            "before clipping",
            [Line("norm", run.points("grad_norm"))],
            f"Norms over max_grad_norm = {limit} are cut to it. Steady is good; growth is not.",
            zero=True,
        ),
    ]


def _overfit(run: RunFiles) -> list[Finding]:
    losses = run.values("eval/loss")
    if len(losses) < 3:
        return []
    best, final = min(losses), losses[-1]
    text = f"lowest {shown(best)}, last {shown(final)}."
    if final <= best * 1.02:
        return [Finding(False, "Held-out loss ends at its lowest", text)]
    meaning = " Train for fewer steps, or set load_best_model_at_end."
    return [Finding(True, "Held-out loss has risen again", text + meaning)]


def _chance(low: float | None) -> list[Finding]:
    if low is None:
        return []
    text = f"the 95% interval of the accuracy starts at {shown(low, 'share')}."
    if low > 0.5:
        return [Finding(False, "The model is better than chance", text)]
    return [
        Finding(True, "The model may be no better than chance", text + " PPO on it would chase noise: use more pairs.")
    ]


def _length_bias(run: RunFiles) -> list[Finding]:
    value = last(run.points("eval/length_correlation"))
    if value is None:
        return []
    text = f"correlation of score and length {shown(value)}."
    if abs(value) < 0.5:
        return [Finding(False, "Scores do not follow length", text)]
    return [Finding(True, "Scores follow length", text + " PPO will find that out: watch the reply length.")]


def _rates(run: RunFiles) -> Html | None:
    """The other figures of the last evaluation, with what they mean."""
    names = [n for n in METRICS if n.startswith("eval/") and run.values(n)]
    rows = [
        tag("tr", tag("td", METRICS[n].meaning), tag("td", shown(run.values(n)[-1], METRICS[n].unit), class_="number"))
        for n in names
    ]
    return tag("table", tag("tbody", rows), class_="facts") if rows else None
