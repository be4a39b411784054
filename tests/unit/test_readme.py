"""The documents say only what is there: fields, metrics, commands, jobs, figures of results, and links. README stays short."""

from __future__ import annotations

import importlib.util
import json
import re
import statistics
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
import yaml
from pydantic import BaseModel

from rlhf_ray.config import EvaluateConfig, PipelineConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_ray.config.load import load_any, load_dict
from rlhf_ray.metrics import METRICS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MIGRATING = (ROOT / "MIGRATING.md").read_text(encoding="utf-8")
FIGURES = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
TRIED = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
FOLDERS = ("rlhf_ray", "cluster", "jobs", "tests", "benchmarks")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.md"))])
STAGES: dict[str, type[BaseModel]] = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}


def fields_of(cls: type[BaseModel], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, info in cls.model_fields.items():
        found.add(prefix + name)
        for kind in (info.annotation, *get_args(info.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= fields_of(kind, f"{prefix}{name}.")
    return found


def tables() -> list[tuple[str, type[BaseModel], list[list[str]]]]:
    found = []
    for heading, stage, body in re.findall(r"^### (.*?`rlhf-ray (\w+)`)\n(.*?)(?=^#|\Z)", MIGRATING, re.M | re.S):
        rows = [[c.strip() for c in line.strip("|").split("|")] for line in body.splitlines() if line.startswith("|")]
        fields = [r for r in rows[2:] if len(r) == 3]
        found.append((heading, STAGES[stage], fields))
    return found


def test_there_are_six_migration_tables() -> None:
    assert [len(rows) > 10 for _, _, rows in tables()] == [True] * 6


@pytest.mark.parametrize(("heading", "cls", "rows"), tables(), ids=[t[0] for t in tables()])
def test_every_field_of_a_migration_table_exists(heading: str, cls: type[BaseModel], rows: list[Any]) -> None:
    known = fields_of(cls)
    for theirs, ours, parity in rows:
        assert theirs, heading
        if ours == "dropped":
            continue
        name = ours.strip("`")
        assert name in known, f"{heading}: {theirs} -> {name}"
        for other in re.findall(r"`(\w+): [^`]*`", parity):
            if not other.startswith(("name",)):
                assert other in known or any(k.endswith(f".{other}") for k in known), f"{heading}: {theirs}: {other}"


def test_every_metric_of_the_migration_table_exists() -> None:
    body = MIGRATING.split("| our metric | TRL's name |")[1].split("\n\n")[0]
    names = re.findall(r"^\| `([^`]+)` \| (\S+) \|", body, re.M)
    assert len(names) > 8
    for ours, trl in names:
        assert METRICS[ours].trl == trl


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", README, re.S))
def test_every_job_in_readme_is_a_job(block: str) -> None:
    values = yaml.safe_load(block)
    is_pipeline = "ppo" in values
    config: Any = load_dict(PipelineConfig if is_pipeline else PPOConfig, values, "README.md")
    if is_pipeline:
        assert [config.stage_config(stage).output_dir for stage in config.stages][-1].endswith("/evaluate")


def test_the_rewards_and_policies_in_the_page_of_jobs_are_some() -> None:
    block, compared = re.findall(r"```yaml\n(.*?)```", (ROOT / "jobs/README.md").read_text(encoding="utf-8"), re.S)
    values = {"output_dir": "x", "model_name_or_path": "x", "data": {"train": "x"}}
    config = load_dict(PPOConfig, {**values, **yaml.safe_load(block)}, "jobs/README.md")
    assert [len(reward.members) for reward in config.rewards] == [3, 0, 0] and config.rewards[0].std_coef == 1
    judged = load_dict(EvaluateConfig, {**values, **yaml.safe_load(compared)}, "jobs/README.md")
    assert [policy.best_of for policy in judged.policies] == [1, 1, 16, 1, 1] and judged.judge == ("gpt", "rm")


@pytest.mark.parametrize("name", ["sweep", "serve"])
def test_the_job_in_a_packages_readme_is_a_job(name: str, tmp_path: Path) -> None:
    text = (ROOT / "rlhf_ray" / name / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\n(output_dir: .*?)```", text, re.S)
    assert blocks
    for block in blocks:
        (tmp_path / "job.yaml").write_text(block)
        assert load_any(tmp_path / "job.yaml", check_files=False)[0] == name


def test_every_command_is_in_readmes_table_and_every_command_there_exists() -> None:
    from typer.main import get_command

    from rlhf_ray.cli import app

    there = set(get_command(app).commands)  # type: ignore[attr-defined]
    rows = [line.split("|")[1] for line in README.splitlines() if line.startswith("| `rlhf-ray ")]
    told = {name for row in rows for name in re.findall(r"`(?:rlhf-ray )?([a-z][a-z-]*)", row)}
    assert told == there


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda p: p.stem)
def test_every_benchmark_result_is_told(path: Path) -> None:
    """benchmarks/README.md quotes each committed result, and the figures it quotes are those of the file."""
    (line,) = [line for line in FIGURES.splitlines() if f"results/{path.name}" in line]
    told = {float(x) for x in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.])", line)}
    known = set(_numbers(json.loads(path.read_text())["measured"]))
    assert len({x for x in told for k in known if abs(x - k) <= 0.006 * max(abs(k), 1.0)}) >= 2, (told, known)


def _numbers(value: Any) -> Iterator[float]:
    """Every number in a report, however deep."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def beside(path: str) -> ModuleType:
    """A script of the project, which pytest's import mode does not put on the path."""
    name = Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def test_the_tables_of_figures_are_what_the_script_makes_of_the_results() -> None:
    assert beside("benchmarks/write_readme.py").written(FIGURES) == FIGURES


def settings_of(study: str) -> list[dict[str, Any]]:
    report = json.loads((ROOT / f"benchmarks/results/kl_study_{study}.json").read_text())
    found: list[dict[str, Any]] = report["measured"]["settings"]
    return found


def test_the_verdict_of_the_study_is_that_of_a_simulation() -> None:
    """Five equal penalties, measured as those of the bundled task were: scores of three seeds, interpolated at 2 nats, the spread
    known from 16 settings. How often is their range as large as the one that was seen, and what is there once in 20 times?"""
    (block,) = re.findall(r"<!-- study-tiny-verdict.*?-->(.*?)<!-- end", FIGURES, re.S)
    seen, p, least = (
        float(x) for x in re.findall(r"within ([\d.]+) .*p = ([\d.]+)\).*\nbelow ([\d.]+)", block, re.S)[0]
    )
    settings, shares, scores = settings_of("tiny"), [], []
    for penalty in ("kl", "clamped_kl", "bregman", "jensen_shannon", "squared_error"):
        points = sorted((s["kl_k1"], s["score"]) for s in settings if s["kl_penalty"] == penalty)
        ((x0, y0), (x1, y1)) = next((a, b) for a, b in pairwise(points) if a[0] <= 2.0 <= b[0])
        t = (2.0 - x0) / (x1 - x0)
        scores.append((1 - t) * y0 + t * y1)
        shares.append(((1 - t) ** 2 + t**2) ** 0.5)
    thirds = [(s["score_low"], 3 * s["score"] - s["score_low"] - s["score_high"], s["score_high"]) for s in settings]
    error = (sum(statistics.variance(three) for three in thirds) / len(thirds) / 3) ** 0.5
    draw, times = torch.Generator().manual_seed(0), 100_000
    noise = torch.randn(times, 5, generator=draw, dtype=torch.float64) * torch.tensor(shares) * error
    spread = torch.randn(times, 2 * len(settings), generator=draw, dtype=torch.float64).square().mean(dim=1).sqrt()
    ranges = (noise.amax(dim=1) - noise.amin(dim=1)) / spread
    exact = max(scores) - min(scores)
    assert seen == pytest.approx(exact, abs=5e-4)
    assert float((ranges >= exact).double().mean()) == pytest.approx(p, abs=0.01)
    assert float((ranges >= least).double().mean()) == pytest.approx(0.05, abs=0.005)


def test_the_prose_of_the_study_quotes_its_results() -> None:
    """What the lists below the tables say, from the files that they are about."""
    found = {(name, s["kl_penalty"], s["kl_coef"]): s for name in ("tiny", "stories") for s in settings_of(name)}
    prose = " ".join(FIGURES.split("What this says, and what it does not:")[1].split("`jobs/sweep_kl.yaml`")[0].split())
    free, js, kl = (found["stories", *of] for of in (("none", 0.0), ("jensen_shannon", 0.3), ("kl", 0.2)))
    assert f"jensen_shannon 0.3 ended at {js['kl_k1']:.1f} nats, kl 0.2 at {kl['kl_k1']:.1f}" in prose
    assert f"jensen_shannon 6: {found['tiny', 'jensen_shannon', 6.0]['length_ratio']:.2f} of their length" in prose
    assert f"went to {found['tiny', 'none', 0.0]['kl_k1']:.1f} nats for a score not shown to be worse" in prose
    assert f"went to {free['kl_k1']:.0f} nats for {free['score']:.2f} of at most 1" in prose
    best = max((s for key, s in found.items() if key[0] == "tiny"), key=lambda s: s["score"])
    assert f"The highest of 16 means was picked for being the highest: {best['score']:.3f}" in prose
    assert all(s["length_ratio"] > 0.99 for key, s in found.items() if key[0] == "stories")
    script = beside("benchmarks/write_readme.py")
    for name, told in (("tiny", "(mean of three seeds) is"), ("stories", "standard error of a score")):
        assert f"{told} {script.standard_error_of_a_score(script.measured(f'kl_study_{name}')):.3f}" in FIGURES


def test_the_tables_of_faults_and_bad_inputs_have_a_place_and_every_row() -> None:
    """`make chaos` and `make bad-inputs` write them there."""
    tables = beside("tests/readme_tables.py")
    titles = {"faults": beside("tests/fault_table.py").FAULTS, "bad-inputs": beside("tests/bad_inputs.py").TITLES}
    for name, rows in titles.items():
        assert f"readme_tables.py {name} " in (ROOT / "Makefile").read_text()
        told = re.findall(r"^\| (\d+) \| (.*?) \|", "\n".join(tables.table_of(TRIED, name)), re.M)
        assert {int(number): title for number, title in told} == rows
        assert tables.put(TRIED, name, "\n".join(tables.table_of(TRIED, name))) == TRIED
        assert tables.table_of(tables.put(TRIED, name, "| a new one |\n"), name) == ["| a new one |"]


@pytest.mark.parametrize("pattern", beside("tests/bad_inputs.py").TESTS)
def test_every_pattern_of_the_bad_inputs_names_tests(pattern: str) -> None:
    """A test file that moves would leave the count without a word."""
    place, *_, name = pattern.split("::")
    functions = re.findall(r"def (test_\w+)", (ROOT / place).read_text(encoding="utf-8"))
    assert any(fnmatchcase(function, name) for function in functions)


def test_readme_can_be_read_in_one_go() -> None:
    assert len(README.splitlines()) <= 220


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings of a document."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()).replace(" ", "-")
        same = sum(1 for other in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other))
        found.add(f"{slug}-{same}" if same else slug)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_link_of_a_document_leads_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        other = (path.parent / place).resolve() if place else path
        assert other.exists() and other.is_relative_to(ROOT), f"{path.name}: {target}"
        if anchor:
            assert anchor in anchors(other.read_text(encoding="utf-8")), f"{path.name}: {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_file_that_a_document_names_exists(path: Path) -> None:
    for name in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`", path.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"{path.name}: {name}"


def test_there_are_documents_beside_their_subjects() -> None:
    told = {path.relative_to(ROOT).as_posix() for path in DOCUMENTS}
    assert {f"{name}/README.md" for name in ("jobs", "benchmarks", "tests", "cluster")} < told
    assert {f"rlhf_ray/{name}/README.md" for name in ("sweep", "registry", "serve")} < told


@pytest.mark.parametrize("path", sorted(ROOT.glob("jobs/*.yaml")), ids=lambda p: p.name)
def test_every_job_file_is_in_the_table_of_jobs(path: Path) -> None:
    assert f"| `{path.name}` |" in (ROOT / "jobs" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(ROOT.rglob("jobs/pictures/*")), ids=lambda p: p.name)
def test_pictures_are_small(path: Path) -> None:
    assert path.suffix == ".png" and path.stat().st_size <= 150_000
