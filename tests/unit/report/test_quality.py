"""What reports say of a reward model's quality, and of a policy that maximises its reward and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from rlhf_ray.report import write_report


def text_of(page: str) -> str:
    return " ".join(re.sub("<[^>]+>", " ", page).split())


def changed(path: Path, file: str, **fields: Any) -> None:
    place = path / file
    read = yaml.safe_load(place.read_text()) if file.endswith(".yaml") else json.loads(place.read_text())
    place.write_text(json.dumps({**read, **fields}))


def test_a_reward_report_shows_reliability_groups_length_and_parity(tmp_path: Path, fake: Any) -> None:
    run = fake.reward(tmp_path / "reward")
    half = {"low": 0.3, "high": 0.7, "pairs": 30.0}
    record = {
        "reliability": [{"predicted": 0.2, "observed": 0.4, **half}, {"predicted": 0.8, "observed": 0.6, **half}],
        "groups": {
            "code <b>": {"accuracy": 0.9, "low": 0.7, "high": 0.97, "pairs": 20.0},
            "chat": {"accuracy": 0.5, **half},
        },
    }
    changed(run, "manifest.json", reward={"held_out": record})
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[-1] |= {"eval/calibration_error": 0.2, "eval/accuracy_shorter_chosen": 0.4, "eval/accuracy_longer_chosen": 0.9}
    fake.lines(run / "metrics.jsonl", rows)
    summary = json.loads((run / "summary.json").read_text())
    changed(run, "summary.json", metrics={**summary["metrics"], "reload_difference": 0.0})
    page = write_report(run).read_text()
    text = text_of(page)
    assert "Reliability, against predicted. held-out pairs: (0.200, 0.400), (0.800, 0.600)" in page
    assert "code &lt;b&gt; 90% 70% to 97% 20" in text and "chat 50% 30% to 70% 30" in text
    assert "not as sure as it is right : expected calibration error 20%" in text
    assert "Accuracy 40% where the shorter reply is better, 90% where not." in text and "Scores follow length" in text
    assert "The saved adapter scores as the trained one : largest difference 0." in text


def test_a_ppo_report_draws_proxy_and_watch_and_names_the_alarm(tmp_path: Path, fake: Any) -> None:
    """On one scale: the spread of 64 replies at the start is 8 standard errors, so a fall of 0.8 at an error of 0.1 is one."""
    run = fake.ppo(tmp_path / "ppo")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "eval/reward" in row:
            row |= {"eval/reward/judge": 1.0 - 0.8 * row["step"] / 60, "eval/reward_se/judge": 0.1, "eval/rows": 64}
        if row["step"] >= 40:
            row["alarm/repetition"] = 1.0
    fake.lines(run / "metrics.jsonl", rows)
    calm = text_of(write_report(run).read_text())
    assert "Proxy and watch" not in calm and "alarm for over-optimisation" not in calm
    changed(run, "config.yaml", watch="judge", alarm={"action": "warn"})
    page = write_report(run).read_text()
    assert re.search(r"Proxy and watch\. maximised: .*; judge, not maximised: 0 to −1\.00, lowest −1\.00", page)
    text = text_of(page)
    assert "The alarm for over-optimisation went off : repetition from step 40." in text
    fake.lines(run / "metrics.jsonl", [{k: v for k, v in row.items() if not k.startswith("alarm/")} for row in rows])
    assert "No sign of over-optimisation" in text_of(write_report(run).read_text())
