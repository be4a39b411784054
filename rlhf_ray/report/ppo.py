"""The story of a PPO run."""

from __future__ import annotations

from rlhf_ray.console import duration
from rlhf_ray.maths.standard_errors import deviation
from rlhf_ray.metrics import START_KL, held_out_reward, standard_error_name, start_kl
from rlhf_ray.report.charts import Chart, Line, constant, shares
from rlhf_ray.report.findings import ppo_findings
from rlhf_ray.report.folder import RunFiles
from rlhf_ray.report.numbers import count, shown, with_error
from rlhf_ray.report.story import Story, Tile, change

STEP_PHASES = ("generate", "score", "update", "publish")  # parts of time/step
EXTRA_PHASES = ("evaluate", "checkpoint")


def ppo_story(run: RunFiles) -> Story:
    return Story(
        sentence=_sentence(run),
        tiles=_tiles(run),
        findings=ppo_findings(run),
        groups=(
            ("Reward and distance", _reward_charts(run)),
            ("Replies", _response_charts(run)),
            ("Optimisation", _optimisation_charts(run)),
            ("Time and memory", _time_charts(run)),
        ),
    )


def _sentence(run: RunFiles) -> str:
    watch = run.config.get("watch")
    name, label = held_out_reward(watch), "Held-out reward" if watch is None else f"Held-out {watch}, not maximised,"
    if not run.values(name):
        name, label = "reward/mean", "Training reward"
    rewards, kl = run.values(name), run.values(start_kl(run.names()))
    if not rewards:
        return "No step has been finished yet."
    if len(rewards) == 1:
        when = f"after {count(run.steps, 'step')}" if run.steps else "before the first update"
        return f"{label} is {shown(rewards[0])} {when}."
    origin = "the policy it started from" if run.values(START_KL) else "the reference"
    distance = f", at {shown(kl[-1])} nats of KL per reply from {origin}" if kl else ""
    went = f"{label} went from {shown(rewards[0])} to {shown(rewards[-1])} in {count(run.steps, 'step')}{distance}."
    return went + _kept(run, name)


def _kept(run: RunFiles, name: str) -> str:
    """Which adapter is the result, where that is not the last step's."""
    best = run.results.get("best/step") if run.config.get("load_best_model_at_end") else None
    if best is None or best == run.steps:
        return ""
    there = dict(run.points(name)).get(best)
    several = f": the highest of {len(run.values(name))}, and so likely too high"
    measured = f", where it was {shown(there)}{several}" if there is not None else ""
    return f" The adapter that was kept is that of step {best:.0f}{measured}."


def _tiles(run: RunFiles) -> list[Tile]:
    tiles = []
    held_out, errors = run.values("eval/reward"), run.values("eval/reward_se")
    if held_out:
        value = with_error(held_out[-1], errors[-1]) if errors else shown(held_out[-1])
        tiles.append(Tile("Held-out reward", value, change(held_out)))
    watched = run.values(held_out_reward(run.config["watch"])) if run.config.get("watch") else []
    if watched:
        tiles.append(Tile(f"Held-out {run.config['watch']}, not maximised", shown(watched[-1]), change(watched)))
    for name, label, unit in (
        ("reward/mean", "Training reward", ""),
        (START_KL, "KL per reply from the start (k1)", ""),
        ("kl/k1_per_response", "KL per reply (k1)", ""),
        ("response/length", "Reply length", ""),
        ("response/finished", "Finished", "share"),
    ):
        values = run.values(name)
        if values:
            tiles.append(Tile(label, shown(values[-1], unit), change(values, unit)))
    k3, times = run.values("kl/k3_per_response"), run.values("time/step")
    for i, tile in enumerate(tiles):
        if tile.label == "KL per reply from the start (k1)":
            tiles[i] = Tile(tile.label, f"{tile.value} nats", tile.detail)
        if tile.label == "KL per reply (k1)":
            tiles[i] = Tile(tile.label, f"{tile.value} nats", f"k3 {shown(k3[-1])} nats" if k3 else tile.detail)
        if tile.label == "Reply length":
            tiles[i] = Tile(tile.label, f"{tile.value} tokens", tile.detail)
    if times:
        total = run.seconds or sum(times)
        tiles.append(
            Tile("Time", duration(total), f"{count(run.steps, 'step')}, {duration(sum(times) / len(times))} each")
        )
    return tiles


def _reward_charts(run: RunFiles) -> list[Chart]:
    held_out, errors = run.points("eval/reward"), dict(run.points("eval/reward_se"))
    moved = bool(run.values(START_KL))
    low = [(x, y - 2 * errors[x]) for x, y in held_out] if all(x in errors for x, _ in held_out) else []
    high = [(x, y + 2 * errors[x]) for x, y in held_out] if low else []
    charts = [
        Chart(
            "Reward",
            "raw, per reply",
            [
                Line("training", run.points("reward/mean")),
                Line("held-out", held_out, "dots", low, high),
            ],
            "Raw reward, before baseline and penalties. It should rise and flatten; if the held-out curve turns down while the"
            " training curve still rises, the policy is exploiting the reward model.",
            whiskers="Whiskers: ± 2 standard errors.",
        ),
        Chart(
            "KL from the reference",
            "nats per reply",
            [
                Line("k1", run.points("kl/k1_per_response")),
                Line("k3", run.points("kl/k3_per_response"), "dashed"),
                *([Line("k1 from the start", run.points(START_KL))] if moved else []),
            ],
            "How far the policy has moved, summed over a reply. k1 is unbiased and noisy, k3 never negative; both estimate the"
            " same distance, so a lasting gap, or a clearly negative k1, means sampling and scoring disagree."
            + (" Each reset of the reference takes both back to 0, and the start stays where it is." if moved else ""),
            zero=True,
        ),
        *_proxy_and_watch(run),
        _frontier(run),
        _penalty(run),
    ]
    coefficient = run.points("kl/coef")
    if not constant(coefficient):
        note = "The controller raises it while the measured KL is over its target, and lowers it below."
        charts.append(Chart("KL coefficient", "", [Line("coefficient", coefficient)], note))
    sources = [n for n in run.names() if n.startswith("reward/") and n.count("/") == 1 and n not in _REWARD_FIGURES]
    if len(sources) > 1:
        lines = [Line(n.removeprefix("reward/"), run.points(n)) for n in sources[:6]]
        charts.append(Chart("Reward sources", "reward", lines, "Each source before its weight."))
    return charts + _ensemble_charts(run)


def _proxy_and_watch(run: RunFiles) -> list[Chart]:
    """What is maximised beside what watches, on one scale: that of the replies' own spread before training."""
    watch = run.config.get("watch")
    if watch is None:
        return []
    lines = [
        _gain(run, label, metric)
        for label, metric in (("maximised", "eval/reward"), (f"{watch}, not maximised", held_out_reward(watch)))
    ]
    note = (
        "Held-out rewards, each as its change since the first evaluation, in standard deviations over replies that it had then."
        " While both rise, the reward stands for what is wanted; where they part, the policy has found what only the first pays"
        " for."
    )
    return [
        Chart(
            "Proxy and watch", "standard deviations", lines, note, rule=0.0, whiskers="Whiskers: ± 2 standard errors."
        )
    ]


def _gain(run: RunFiles, label: str, metric: str) -> Line:
    """Empty where a standard error is missing, or nothing varied at first."""
    points, errors = run.points(metric), dict(run.points(standard_error_name(metric)))
    rows = dict(run.points("eval/rows"))
    if not points or any(x not in errors for x, _ in points):
        return Line(label, [])
    (start, first) = points[0]
    spread = deviation(errors[start], rows.get(start, 0.0))
    if spread <= 0:
        return Line(label, [])
    low, high = ([(x, (y - first + sign * 2 * errors[x]) / spread) for x, y in points] for sign in (-1, 1))
    return Line(label, [(x, (y - first) / spread) for x, y in points], "dots", low, high)


def _ensemble_charts(run: RunFiles) -> list[Chart]:
    charts = []
    for spread in [n for n in run.names() if n.startswith("reward/") and n.endswith("/std") and n.count("/") == 2]:
        name = spread.split("/")[1]
        members = [n for n in run.names() if n.startswith(f"reward/{name}/") and n != spread]
        lines = [Line(n.rsplit("/", 1)[1], run.points(n)) for n in members[:5]]
        charts.append(
            Chart(
                f"Members of ensemble {name}",
                "reward",
                [*lines, Line("disagreement (std)", run.points(spread), "dashed")],
                "Each member as it is aggregated, and their standard deviation on the same reply, mean over replies. A disagreement"
                " that grows says that replies have left what the members learnt from.",
            )
        )
    return charts


_REWARD_FIGURES = tuple(f"reward/{n}" for n in ("mean", "std", "min", "max", "score", "shaped"))


def _frontier(run: RunFiles) -> Chart:
    """Reward over KL: on held-out prompts where both were measured, else in training."""
    names = ("eval/kl_k1_per_response", "eval/reward")
    if len(run.points(names[0])) < 2:
        names = (start_kl(run.names()), "reward/mean")
    kl, reward = dict(run.points(names[0])), dict(run.points(names[1]))
    steps = [step for step in sorted(kl) if step in reward]
    where = "held-out" if names[0].startswith("eval") else "training"
    return Chart(
        "Reward bought with KL",
        "reward",
        [Line(f"{where} prompts", [(kl[s], reward[s]) for s in steps], steps=steps)] if len(steps) > 1 else [],
        "The path of the run. Runs compare fairly only at equal KL: the better one lies higher. Moving right without rising"
        " is distance without gain.",
        path=True,
        x_label="KL, nats per reply",
    )


def _penalty(run: RunFiles) -> Chart:
    coefficients, spread = dict(run.points("kl/coef")), run.points("reward/std")
    charged = [(x, coefficients[x] * y) for x, y in run.points("kl/penalty_per_response") if x in coefficients]
    kind = run.config.get("kl_penalty", "kl")
    fixed = f" The coefficient is fixed at {next(iter(coefficients.values())):g}." if _fixed(run) else ""
    return Chart(
        "Penalty charged",
        "reward per reply",
        [Line("coefficient × penalty", charged), Line("spread of rewards (std)", spread, "dashed")],
        f"What the {kind} penalty takes off a reply's reward. Far below the spread of rewards it has little effect; above"
        f" it, it outweighs them.{fixed}",
        zero=True,
    )


def _fixed(run: RunFiles) -> bool:
    points = run.points("kl/coef")
    return bool(points) and constant(points)


def _response_charts(run: RunFiles) -> list[Chart]:
    return [
        Chart(
            "Reply length",
            "tokens",
            [Line("training", run.points("response/length")), Line("held-out", run.points("eval/length"), "dots")],
            "If replies grow while held-out reward does not, the reward model pays for length.",
        ),
        Chart(
            "Finished replies",
            "share",
            [Line("training", run.points("response/finished")), Line("held-out", run.points("eval/finished"), "dots")],
            "Replies that end by themselves. The rest were cut at response_length; a falling share needs a longer limit or a"
            " higher missing_eos_penalty.",
        ),
        Chart(
            "Entropy",
            "nats per token",
            [Line("policy", run.points("policy/entropy"))],
            "Spread of the next-token distribution. A slow fall is normal; a fall towards 0 means the policy repeats itself.",
            zero=True,
        ),
        Chart(
            "Repetition",
            "share",
            [Line("training", run.points("response/repetition"))],
            "Of a reply's pairs of neighbouring tokens, those that it has said before. A rise: the policy repeats itself.",
            zero=True,
        ),
        Chart(
            "Spread of rewards",
            "reward",
            [Line("standard deviation", run.points("reward/std"))],
            "Between the replies of a step. At 0 all replies score alike and nothing can be learned.",
            zero=True,
        ),
    ]


def _optimisation_charts(run: RunFiles) -> list[Chart]:
    limit = run.config.get("cliprange", 0.2)
    return [
        Chart(
            "Clipped tokens",
            "share",
            [
                Line("policy", run.points("policy/clip_fraction")),
                Line("value", run.points("value/clip_fraction"), "dashed"),
            ],
            f"Tokens whose ratio left 1 ± {limit}. Usually below 20%; above 30% the steps are too large.",
            zero=True,
        ),
        Chart(
            "Step size",
            "nats per token",
            [Line("approx_kl", run.points("policy/approx_kl"))],
            "KL of the new policy from the one that sampled. Usually 0.001 to 0.02; spikes precede instability.",
            zero=True,
        ),
        Chart(
            "Value model",
            "explained variance",
            [Line("explained variance", run.points("value/explained_variance"))],
            "1 is a perfect value model, 0 no better than a constant, below 0 harmful. It should rise above 0 within a few steps.",
            rule=0.0,
        ),
        Chart(
            "Gradient norms",
            "before clipping",
            [Line("policy", run.points("grad_norm/policy")), Line("value", run.points("grad_norm/value"), "dashed")],
            f"Norms over max_grad_norm = {run.config.get('max_grad_norm', 1.0)} are cut to it. Steady is good; growth is not.",
            zero=True,
        ),
        Chart(
            "Losses",
            "",
            [Line("policy", run.points("loss/policy")), Line("value", run.points("loss/value"), "dashed")],
            "The value loss should fall. The policy loss hovers around 0 and says little.",
        ),
        Chart(
            "Learning rates",
            "",
            [Line("policy", run.points("lr/policy")), Line("value", run.points("lr/value"), "dashed")],
            "Warm-up, then decay, as configured.",
            zero=True,
        ),
        Chart(
            "Largest ratio",
            "new / old probability",
            [Line("largest", run.points("ratio/max"))],
            "Of any token in the step. Values of ten and more mean single tokens dominate an update.",
        ),
        Chart(
            "Sampler against learner",
            "nats per token",
            [Line("mean absolute difference", run.points("sampler/logprob_difference"))],
            "Difference of log-probabilities for the same tokens: rounding only, below 0.001 in float32 and 0.05 in bfloat16.",
            zero=True,
        ),
    ]


def _time_charts(run: RunFiles) -> list[Chart]:
    tokens, sampling = dict(run.points("tokens/generated")), dict(run.points("time/generate"))
    speed = [(step, tokens[step] / sampling[step]) for step in sorted(tokens) if sampling.get(step)]
    memory = [name for name in run.names() if name.startswith("memory/")][:6]
    stacked = "Stacked by phase; the legend gives each phase's share of the whole."
    idle = [name for name in run.names() if name.startswith("time/idle_")]
    waiting = "Share of each step in which a role had nothing to do (placement: split)."
    idle_lines = [Line(n.removeprefix("time/idle_"), run.points(n)) for n in idle]
    return [
        Chart("Time per step", "s", shares(_phases(run)), stacked, stacked=True),
        *([Chart("Idle", "share", idle_lines, waiting, zero=True)] if idle else []),
        Chart("Sampling speed", "tokens per second", [Line("all replies", speed)], "Reply tokens over sampling time."),
        Chart(
            "Memory",
            "bytes",
            [Line(n.removeprefix("memory/"), run.points(n)) for n in memory],
            "At the end of each step.",
            zero=True,
        ),
    ]


def _phases(run: RunFiles) -> list[Line]:
    """Seconds per phase of every step. Evaluations and checkpoints come on top of `time/step`, and count 0 where there is none."""
    whole = dict(run.points("time/step"))
    inside = {phase: dict(run.points(f"time/{phase}")) for phase in STEP_PHASES}
    beside = {phase: dict(run.points(f"time/{phase}")) for phase in EXTRA_PHASES}
    rest = {step: max(seconds - sum(p.get(step, 0.0) for p in inside.values()), 0.0) for step, seconds in whole.items()}
    if sum(rest.values()) > 0.01 * sum(whole.values()):
        beside["other"] = rest
    measured = {phase: values for phase, values in {**inside, **beside}.items() if values}
    return [
        Line(phase, [(step, values.get(step, 0.0)) for step in sorted(whole)]) for phase, values in measured.items()
    ]
