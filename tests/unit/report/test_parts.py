"""The parts of a report: escaping, checks, comparison of policies, samples, reading of folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.report.compare import compared, comparison, comparison_table
from rlhf_ray.report.findings import ppo_findings
from rlhf_ray.report.folder import RunFiles, read_folder
from rlhf_ray.report.html import Html, join, tag
from rlhf_ray.report.ppo import ppo_story
from rlhf_ray.report.samples import samples_section
from rlhf_ray.report.supervised import reward_story, sft_story


def run_with(rows: list[dict[str, Any]], stage: str = "ppo", **summary: Any) -> RunFiles:
    return RunFiles(Path("run"), stage, {}, "", {}, summary, rows, [])


def steady(**metrics: float) -> list[dict[str, Any]]:
    return [{"step": step, **metrics} for step in range(1, 13)]


@pytest.mark.parametrize(("steps", "says"), [
    ((0, 50), ("went from 40% to 95% in 50 steps.", "from 5.00 at the start")),
    ((31, 50), ("went from 40% at step 31 to 95% at step 50.", "from 5.00 at step 31")),
])  # fmt: skip
def test_a_first_figure_that_is_none_of_the_start_is_told_with_its_step(steps: Any, says: tuple[str, str]) -> None:
    figures = ({"eval/accuracy": 0.4, "eval/margin": 5.0}, {"eval/accuracy": 0.95, "eval/margin": 6.0})
    rows = [{"step": step, **figure} for step, figure in zip(steps, figures)]
    story = reward_story(run_with(rows, "reward", steps=50))
    assert story.sentence.endswith(says[0]) and says[1] in [tile.detail for tile in story.tiles]


def test_markers_of_a_template_stay_out_of_the_headings_of_samples() -> None:
    """A prompt was headed "Name a bird.<|im_end|>"."""
    for start, end in (
        ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
        ("<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"),
        ("### Instruction:\n", "\n\n### Response:"),
    ):
        rows = [
            {"step": 0, "prompt": f"{start}{text}{end}", "reply": "Wren."}
            for text in ("Name a bird.", "Add 1 < 2 > 3 bird.")
        ]
        found = samples_section(rows)
        assert "Name a bird.<" in str(found) and "Name a bird.&lt;" not in str(found)


def test_everything_is_escaped_unless_it_is_markup() -> None:
    assert tag("p", "a < b & c", tag("b", '"x"'), class_="n", data_x="'\"<>") == (
        '<p class="n" data-x="&#x27;&quot;&lt;&gt;">a &lt; b &amp; c<b>&quot;x&quot;</b></p>'
    )
    assert tag("meta", charset="utf-8") == '<meta charset="utf-8">'
    assert tag("details", open=True, hidden=False, title=None) == "<details open></details>"
    assert join(None, False, 0, ["<", Html("<br>")], ("x",)) == "0&lt;<br>x"
    assert tag("p", "\x1b[2J\x00", title="\x07") == '<p title="\\x07">\\x1b[2J\\x00</p>'


@given(st.text())
def test_no_text_opens_a_tag(text: str) -> None:
    assert not set('<>"') & set(tag("p", text)[3:-4]) and not set('<>"') & set(tag("p", title=text)[10:-6])


# One metric out of range at a time, beside values that are in order: check, and the row that trips it.
GOOD = {
    "reward/std": 0.5,
    "kl/k1_per_response": 4.0,
    "kl/k3_per_response": 4.0,
    "response/length": 50.0,
    "response/finished": 0.9,
    "policy/entropy": 1.5,
    "policy/clip_fraction": 0.1,
    "value/explained_variance": 0.5,
    "ratio/first_minibatch_max_deviation": 0.0,
}
BAD = [
    ("All replies had the same reward", {"reward/std": 0.0}),
    ("The policy is far from its reference", {"kl/k1_per_response": 10.5, "kl/k3_per_response": 10.5}),
    ("KL is negative", {"kl/k1_per_response": -0.5}),
    ("Few replies end by themselves", {"response/finished": 0.49}),
    ("Many tokens are clipped", {"policy/clip_fraction": 0.31}),
    ("The value model does not help", {"value/explained_variance": 0.0}),
    ("The ratio of the first minibatch is not 1", {"ratio/first_minibatch_max_deviation": 1.1e-4}),
]


def rising(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "reward/mean": row["step"] / 10} for row in rows]


def concerns(rows: list[dict[str, Any]]) -> list[str]:
    return [finding.title for finding in ppo_findings(run_with(rows)) if finding.concern]


def test_a_healthy_run_raises_no_concern() -> None:
    findings = ppo_findings(run_with(rising(steady(**GOOD))))
    assert len(findings) == 10 and not any(finding.concern for finding in findings)


@pytest.mark.parametrize(("title", "change"), BAD)
def test_each_concern_is_raised_by_its_metric_alone(title: str, change: dict[str, float]) -> None:
    """F14: a negative KL is shown and raises an alarm."""
    assert concerns(rising(steady(**{**GOOD, **change}))) == [title]


@pytest.mark.parametrize(
    ("name", "start", "end", "title"),
    [
        ("response/length", 50.0, 90.0, "Replies grew"),
        ("policy/entropy", 1.5, 0.2, "Replies have collapsed"),
        ("reward/mean", 1.0, 0.9, "Training reward did not rise"),
    ],
)
def test_concerns_about_a_trend(name: str, start: float, end: float, title: str) -> None:
    rows = rising(steady(**GOOD))
    for row in rows:
        row[name] = start if row["step"] < 6 else end
    assert concerns(rows) == [title]


def test_a_rise_within_the_noise_of_steps_is_no_rise() -> None:
    """First quarter 0.9, 1.1, 1.0, last one 0.95, 1.15, 1.05: 0.05 higher, and each has the error 0.1 / sqrt(3)."""
    rows = rising(steady(**GOOD))
    for row, value in zip(rows, [0.9, 1.1, 1.0, *[1.0] * 6, 0.95, 1.15, 1.05], strict=True):
        row["reward/mean"] = value
    assert concerns(rows) == ["Training reward did not rise beyond its noise"]
    for row in rows[-3:]:
        row["reward/mean"] += 0.2  # 0.25 higher, two standard errors are 2 sqrt(2 / 3) 0.1 = 0.163
    assert concerns(rows) == []


def test_the_report_says_which_adapter_was_kept() -> None:
    rows = [{"step": s, "eval/reward": r} for s, r in ((0, 0.1), (4, 0.9), (8, 0.5))]
    ended = replace(run_with(rows), config={"load_best_model_at_end": True}, summary={"metrics": {"best/step": 4.0}})
    told = ppo_story(ended).sentence
    assert told.endswith(
        "The adapter that was kept is that of step 4, where it was 0.900: the highest of 3, and so likely too high."
    )
    assert "kept" not in ppo_story(replace(ended, config={})).sentence
    assert "kept" not in ppo_story(replace(ended, summary={"metrics": {"best/step": 8.0}})).sentence


def test_over_optimisation_is_told_apart_from_noise() -> None:
    rows = rising(steady(**GOOD))
    for row, reward in zip(rows[::3], (0.0, 1.0, 1.2, 0.7), strict=True):
        row |= {"eval/reward": reward, "eval/reward_se": 0.1}
    assert concerns(rows) == [
        "Held-out reward is past its best",
        "Nothing independent was measured",
    ]  # 0.5 lower, with 2 sqrt(2) 0.1 = 0.28 of noise
    rows[9]["eval/reward"] = 1.0
    assert concerns(rows) == ["Nothing independent was measured"]


def test_checks_without_metrics_are_left_out() -> None:
    assert ppo_findings(run_with([{"step": 1, "loss": 1.0}])) == []


def results(**values: float) -> dict[str, float]:
    return {name.replace("__", "/"): value for name, value in values.items()}


def test_policies_come_in_the_order_of_the_job_or_of_the_chain() -> None:
    numbers = results(reward__ppo=1.0, reward__base=0.0, reward__extra=0.5, reward__sft=0.4)
    assert comparison(numbers, {})[0] == ["base", "sft", "ppo", "extra"]
    config = {"policies": [{"name": "ppo"}, {"name": "base"}, "rubbish", {"name": "absent"}]}
    assert comparison(numbers, config)[0] == ["ppo", "base"]
    assert comparison({"loss": 1.0, "time/step": 2.0}, {}) == ([], {})


def test_the_table_shows_errors_beside_values_and_gaps_as_dashes() -> None:
    numbers = results(reward__a=1.0, reward__b=2.0, reward_se__a=0.1, reward_se__b=0.1, win_rate__b=0.75)
    policies, table = comparison(numbers, {})
    html = comparison_table(policies, table)
    assert "1.00<small> ± 0.10</small>" in html and "75%" in html and html.count('class="interval"') == 2
    assert html.count("–</td>") == 1 and "reward_se" not in html


@pytest.mark.parametrize(
    ("low", "high", "words"), [(-0.01, 0.41, "does not differ clearly"), (0.01, 0.39, "differs clearly")]
)
def test_a_difference_is_clear_by_its_paired_interval(low: float, high: float, words: str) -> None:
    """Means 0.2 apart with errors of 0.1 each would never be told apart as if of different prompts: 1.96 sqrt(0.02) = 0.277."""
    numbers = results(reward__sft=0.0, reward__ppo=0.2, reward_se__sft=0.1, reward_se__ppo=0.1, reward__base=0.1)
    numbers |= results(score_difference__ppo=0.2, score_difference_low__ppo=low, score_difference_high__ppo=high)
    numbers |= results(score_difference__base=0.1)
    config = {"rewards": [{"name": "rm"}, {"name": "rule"}]}
    told = compared(*comparison(numbers, config), {**config, "judge": "rule"})
    assert f"; by rule, prompt by prompt, ppo {words} from sft (0.200, 95% interval" in told
    assert "by rm, prompt by prompt" in compared(*comparison(numbers, config), config)
    alone = {name: value for name, value in numbers.items() if "score_difference" not in name}
    assert "differ" not in compared(*comparison(alone, config), config), "means say nothing of a paired difference"


def test_the_true_reward_comes_first() -> None:
    numbers = results(reward__a=1.0, reward__b=2.0, true_reward__a=5.0, true_reward__b=6.0)
    policies, table = comparison(numbers, {})
    assert list(table) == ["true_reward", "reward"]
    assert compared(policies, table, {}) == "True reward: 5.00 for a and 6.00 for b."


def test_the_frame_all_prompts_share_is_said_once() -> None:
    samples = [
        {"step": 1, "prompt": f"Below is a task.\n\n### Task:\n{x}\n\n### Reply:\n", "reply": "r"} for x in ("ab", "ac")
    ]
    html = str(samples_section(samples))
    assert html.count("Below is a task.") == 1 and "Below is a task. ### Task: […] ### Reply:" in html
    assert '<pre class="prompt">ab</pre>' in html and '<pre class="prompt">ac</pre>' in html


@pytest.mark.parametrize(
    "prompts",
    [["same"], ["same", "same"], ["abc", "abd"], ["a\nx", "b\nx"], ["", "a"], ["\n", "\n\n"], ["a\n\nb", "a\nb"]],
)
def test_prompts_lose_only_the_lines_they_share(prompts: list[str]) -> None:
    html = str(samples_section([{"step": 1, "prompt": p, "reply": "r"} for p in prompts]))
    assert html.count('<pre class="prompt">') == len(prompts)
    if prompts == ["abc", "abd"]:
        assert '<pre class="prompt">abc</pre>' in html


def test_samples_without_replies_make_no_section() -> None:
    assert samples_section([]) is None and samples_section([{"step": 1, "reply": None}, {"step": 2}]) is None


def test_long_and_empty_replies() -> None:
    html = str(
        samples_section([{"step": 1, "prompt": "p", "reply": "x" * 5000}, {"step": 2, "prompt": "p", "reply": " "}])
    )
    assert "… (2,000 more characters)" in html and "x" * 3001 not in html and "<em>empty reply</em>" in html


def test_a_step_written_twice_counts_as_written_last() -> None:
    rows = [
        {"step": 2, "loss": 9.0},
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": float("nan")},
    ]
    run = run_with([*rows, {"step": "x", "loss": 1.0}, {"loss": 5.0}, {"step": 4, "loss": True}])
    assert run.points("loss") == [(1.0, 3.0), (2.0, 2.0)] and run.steps == 4


def test_the_stage_is_known_from_the_metrics_where_nothing_else_says_it(fake: SimpleNamespace, tmp_path: Path) -> None:
    for stage in ("sft", "reward", "ppo"):
        path = getattr(fake, stage)(tmp_path / stage)
        for name in ("manifest.json", "summary.json"):
            (path / name).unlink()
        assert read_folder(path).stage == stage


def test_reward_models_at_chance_and_overfitting_are_told() -> None:
    rows = [
        {"step": s, "eval/accuracy": 0.55, "eval/accuracy_low": 0.49, "eval/accuracy_high": 0.61} for s in (1, 2, 3)
    ]
    for row, loss in zip(rows, (0.7, 0.6, 0.75), strict=True):
        row |= {"eval/loss": loss, "eval/length_correlation": 0.8}
    titles = [f.title for f in reward_story(run_with(rows, "reward")).findings if f.concern]
    assert titles == ["The model may be no better than chance", "Scores follow length", "Held-out loss has risen again"]
    assert [f.concern for f in sft_story(run_with(rows[:2] * 2, "sft")).findings] == []


def test_metrics_of_a_summary_may_be_null() -> None:
    run = run_with([], metrics={"reward/ppo": None, "reward/base": 1, "text": "x"})
    assert run.results == {"reward/base": 1.0}
    assert json.dumps(run_with([], metrics=[1]).results) == "{}"
