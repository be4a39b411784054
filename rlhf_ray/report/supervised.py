"""The stories of SFT, DPO and reward-model runs."""

from __future__ import annotations

import math
from typing import Any

from rlhf_ray.console import duration
from rlhf_ray.metrics import METRICS
from rlhf_ray.report.charts import Chart, Line
from rlhf_ray.report.folder import Points, RunFiles, is_number, last
from rlhf_ray.report.html import Html, tag
from rlhf_ray.report.numbers import count, shown
from rlhf_ray.report.plane import Dots, Plane, draw_plane
from rlhf_ray.report.story import Finding, Story, Tile, change

CALIBRATION_ERROR = 0.1
LENGTH_CORRELATION = 0.5
"""From here on a figure is a concern; where trouble usually shows, not laws."""


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


def dpo_story(run: RunFiles) -> Story:
    accuracy = run.points("eval/accuracy")
    rewards = "beta x (log p - log p of the reference)"
    charts = [
        _accuracy(
            run,
            "rewards/accuracies",
            "Pairs whose chosen reply the policy has come to prefer, compared with its reference. 50% is chance.",
        ),
        _loss(run, "0.693 is where policy and reference are the same."),
        Chart(
            "Implied rewards",
            "nats",
            [
                Line("chosen", run.points("rewards/chosen")),
                Line("rejected", run.points("rewards/rejected")),
                Line("held-out chosen", run.points("eval/rewards/chosen"), "dots"),
                Line("held-out rejected", run.points("eval/rewards/rejected"), "dots"),
            ],
            f"{rewards}. If both fall, the policy moves away from all replies of the data: raise beta, or set rpo_alpha.",
            rule=0.0,
        ),
        *_optimiser(run),
    ]
    low, high = last(run.points("eval/accuracy_low")), last(run.points("eval/accuracy_high"))
    return Story(
        _sentence(run, "eval/accuracy", "Held-out accuracy", "Training loss"),
        tiles=[
            *([Tile("Held-out accuracy", shown(accuracy[-1][1], "share"), _between(low, high))] if accuracy else []),
            *_tile(run, "eval/rewards/margins", "Held-out margin"),
            *_tile(run, "eval/loss", "Held-out loss"),
            *_effort(run),
        ],
        findings=[*_chance(low, "More pairs, more steps or a lower beta may help."), *_unlikely(run), *_overfit(run)],
        groups=[("Quality and optimisation", charts)],
        tables=[table] if (table := _rates(run)) else [],
    )


def _unlikely(run: RunFiles) -> list[Finding]:
    """DPO may lower the chosen reply, too, as long as the rejected one falls further (arXiv:2404.19733, section 4)."""
    value = last(run.points("eval/rewards/chosen"))
    if value is None:
        return []
    text = f"their implied reward is {shown(value)}."
    if value >= 0:
        return [Finding(False, "Chosen replies did not become less likely", text)]
    return [Finding(True, "Chosen replies have become less likely", text + " rpo_alpha: 1 holds them up.")]


def reward_story(run: RunFiles) -> Story:
    accuracy = run.points("eval/accuracy")
    charts = [
        _accuracy(
            run,
            "accuracy",
            "Pairs whose chosen reply scores higher. 50% is chance. On human preferences about 65% is normal, since people"
            " agree among themselves about as often.",
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
    return Story(
        _sentence(run, "eval/accuracy", "Held-out accuracy", "Training loss"),
        tiles=[
            *([Tile("Held-out accuracy", shown(accuracy[-1][1], "share"), _between(low, high))] if accuracy else []),
            *_tile(run, "eval/margin", "Held-out margin"),
            *_tile(run, "eval/loss", "Held-out loss"),
            *_effort(run),
        ],
        findings=[
            *_chance(low, "PPO on it would chase noise, and is refused: use more pairs."),
            *_calibration(run),
            *_length_bias(run),
            *_reload(run),
            *_overfit(run),
        ],
        groups=[("Quality and optimisation", charts)],
        tables=[table for table in (_reliability(run), _groups(run), _rates(run)) if table],
    )


def _held_out(run: RunFiles) -> dict[str, Any]:
    """What the manifest keeps of held-out pairs; empty in runs of older versions."""
    reward = run.manifest.get("reward")
    found = reward.get("held_out") if isinstance(reward, dict) else None
    return found if isinstance(found, dict) else {}


def _has_numbers(found: Any, names: tuple[str, ...]) -> bool:
    return isinstance(found, dict) and all(is_number(found.get(name)) for name in names)


def _reliability(run: RunFiles) -> Html | None:
    """Observed against predicted preference, with the line on which they agree."""
    told = _held_out(run).get("reliability")
    names = ("predicted", "observed", "pairs", "low", "high")
    bins = [b for b in told if _has_numbers(b, names) and b["pairs"]] if isinstance(told, list) else []
    if not bins:
        return None
    dots = Dots(
        "held-out pairs",
        [(b["predicted"], b["observed"]) for b in bins],
        [f"{b['pairs']:.0f} pairs" for b in bins],
        [b["low"] for b in bins],
        [b["high"] for b in bins],
    )
    note = (
        "How often the first reply of a pair was the chosen one, where the model says so with the probability below. On the line"
        " the model is as sure as it is right; a flatter course is overconfident. Whiskers: 95% interval."
    )
    diagonal = [(0.0, 0.0), (1.0, 1.0)]
    return tag(
        "div", draw_plane(Plane("Reliability", "predicted", [dots], frontier=diagonal, note=note)), class_="charts"
    )


def _groups(run: RunFiles) -> Html | None:
    """Accuracy of each group of pairs, where the data name groups."""
    told = _held_out(run).get("groups")
    names = ("accuracy", "low", "high", "pairs")
    groups = {n: of for n, of in told.items() if _has_numbers(of, names)} if isinstance(told, dict) else {}
    if not groups:
        return None
    head = tag("tr", [tag("th", name, scope="col") for name in ("group", "accuracy", "95% interval", "pairs")])
    rows = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            tag("td", shown(of["accuracy"], "share"), class_="number"),
            tag("td", f"{shown(of['low'], 'share')} to {shown(of['high'], 'share')}", class_="number"),
            tag("td", f"{of['pairs']:.0f}", class_="number"),
        )
        for name, of in groups.items()
    ]
    return tag("div", tag("table", tag("thead", head), tag("tbody", rows), class_="comparison"), class_="wide")


def _calibration(run: RunFiles) -> list[Finding]:
    value = last(run.points("eval/calibration_error"))
    if value is None:
        return []
    text = f"expected calibration error {shown(value, 'share')} (ten bins)."
    if value < CALIBRATION_ERROR:
        return [Finding(False, "The model is about as sure as it is right", text)]
    meaning = " Margins say more, or less, than the model knows: train for fewer steps, or on more pairs."
    return [Finding(True, "The model is not as sure as it is right", text + meaning)]


def _reload(run: RunFiles) -> list[Finding]:
    value = run.results.get("reload_difference")
    if value is None:
        return []
    return [Finding(False, "The saved adapter scores as the trained one", f"largest difference {shown(value)}.")]


def _accuracy(run: RunFiles, training: str, note: str) -> Chart:
    held_out = run.points("eval/accuracy")
    lines = [
        Line("training", run.points(training)),
        Line("held-out", held_out, "dots", *_interval(run, held_out)),
    ]
    return Chart("Accuracy", "share", lines, note, rule=0.5, whiskers="Whiskers: 95% interval.")


def _between(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"95% interval {shown(low, 'share')} to {shown(high, 'share')}"


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
    if late := _late_start(run, name):
        return f"{label} went from {shown(values[0], unit)} {late} to {shown(values[-1], unit)} at step {run.steps}."
    return f"{label} went from {shown(values[0], unit)} to {shown(values[-1], unit)} in {count(run.steps, 'step')}."


def _late_start(run: RunFiles, name: str) -> str:
    """`at step 31`, where that is the first figure's: reward models are not measured before they are trained. Else empty."""
    first = run.points(name)[0][0]
    return f"at step {first:.0f}" if first > 1 else ""


def _tile(run: RunFiles, name: str, label: str) -> list[Tile]:
    values, unit = run.values(name), METRICS[name].unit
    if not values:
        return []
    since = change(values, unit, _late_start(run, name) or "at the start")
    return [Tile(label, shown(values[-1], unit), since)]


def _effort(run: RunFiles) -> list[Tile]:
    tiles = [Tile("Steps", shown(run.steps), _epochs(run))] if run.steps else []
    if run.seconds is not None:
        tiles.append(Tile("Time", duration(run.seconds)))
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


def _chance(low: float | None, advice: str) -> list[Finding]:
    if low is None:
        return []
    text = f"the 95% interval of the accuracy starts at {shown(low, 'share')}."
    if low > 0.5:
        return [Finding(False, "The model is better than chance", text)]
    return [Finding(True, "The model may be no better than chance", f"{text} {advice}")]


def _length_bias(run: RunFiles) -> list[Finding]:
    value = last(run.points("eval/length_correlation"))
    if value is None:
        return []
    text = f"correlation of score and length {shown(value)}."
    shorter, longer = (last(run.points(f"eval/accuracy_{which}_chosen")) for which in ("shorter", "longer"))
    if shorter is not None and longer is not None:
        text += f" Accuracy {shown(shorter, 'share')} where the shorter reply is better, {shown(longer, 'share')} where not."
    tells_by_length = shorter is not None and longer is not None and min(shorter, longer) < 0.5 < max(shorter, longer)
    if abs(value) < LENGTH_CORRELATION and not tells_by_length:
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
