"""What is to be promoted, read from a run or a sweep: the adapter, checked; what was measured of it; what it was made from."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.data.templates import load_template
from rlhf_ray.errors import ArtifactError, ConfigError, Problem
from rlhf_ray.metrics import read_metrics
from rlhf_ray.models.adapter_files import AdapterFiles, read_adapter
from rlhf_ray.storage.files import read_json
from rlhf_ray.storage.run_folder import RunFolder, is_run, open_run
from rlhf_ray.sweep.evaluation import evaluated

KINDS = {"ppo": "policy", "sft": "sft", "dpo": "dpo", "reward": "reward"}
_AT_STEP = re.compile(r"(?P<run>.+)@(?P<step>\d{1,12})")
_TRIAL = re.compile(r"trials/[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Candidate:
    """run: opened and verified.  step: of the adapter.  kind: policy, sft, dpo or reward.  files: passed the gate.
    before, after: held-out metrics before training and at `step`; empty where nothing was measured.  measured: steps that were.
    sweep: {run_dir, metric, kl_cap, choice} of the sweep that chose it, None for a run."""

    run: RunFolder
    step: int
    kind: str
    files: AdapterFiles
    manifest: dict[str, Any]
    config: dict[str, Any]
    before: dict[str, float]
    after: dict[str, float]
    measured: tuple[int, ...]
    sweep: dict[str, Any] | None

    @property
    def template(self) -> dict[str, Any]:
        """{name, sha256, content}."""
        return dict(self.manifest["template"])

    @property
    def base(self) -> dict[str, Any]:
        return dict(self.manifest["base"])

    def identity(self) -> dict[str, Any]:
        """What makes two adapters the same to whoever is served by them."""
        return identity(self.files.sha256, self.files.config, self.manifest)


def identity(sha256: str, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """config: checked values of adapter_config.json.   manifest: of a run, or of a promoted adapter."""
    shape = {k: v for k, v in config.items() if k not in ("base_model_name_or_path", "revision", "lora_dropout")}
    return {
        "adapter": {"sha256": sha256, **shape},
        "base": {k: manifest["base"].get(k) for k in ("weights_sha256", "config_sha256")},
        "tokenizer": manifest["tokenizer_sha256"],
        "template": manifest["template"]["sha256"],
        "stop": manifest.get("stop_token_ids"),
    }


def read_candidate(source: str, step: int | None = None) -> Candidate:
    """source: RUN, RUN@STEP or SWEEP (the adapter of the trial that won).   step: of a checkpoint; default: the run's result.

    Raises ConfigError for what is no such thing or has no adapter, ArtifactError for what is damaged: hashes, the gate of
    models/adapter_files.py, an adapter that does nothing, a run that does not say which base, tokenizer and template it had."""
    folder, at_step = _split(source)
    if None not in (step, at_step) and step != at_step:
        raise ConfigError.at("--step", f"{source} names another step", str(at_step), str(step))
    step = at_step if step is None else step
    run, sweep = open_run(folder), None
    if run.stage == "sweep":
        run, sweep = _chosen(run, folder)
    if run.stage not in KINDS:
        stages = [name for name in ("ppo", "dpo", "sft", "reward") if is_run(run.path / name)]
        fix = f"give one of its runs: {', '.join(f'{folder}/{name}' for name in stages)}" if stages else ""
        raise ConfigError.at(
            folder, f"a run of stage {run.stage} has no adapter", "a run of ppo, sft, dpo, reward or sweep", "", fix
        )
    manifest, config = run.manifest(), run.config()
    adapter_dir, step = _adapter_of(run, folder, step)
    files = read_adapter(adapter_dir)
    _check_whole(run, files, manifest)
    manifest["template"] = _with_content(run, manifest["template"], config)
    before, after, measured = _held_out(run, step)
    return Candidate(run, step, KINDS[run.stage], files, manifest, config, before, after, measured, sweep)


def _split(source: str) -> tuple[str, int | None]:
    found = _AT_STEP.fullmatch(source)
    if found is None or Path(source).exists():
        return source, None
    return found["run"], int(found["step"])


def _chosen(sweep: RunFolder, where: str) -> tuple[RunFolder, dict[str, Any]]:
    """The run that won the sweep. ConfigError if the sweep has not ended or nothing won."""
    if sweep.manifest()["status"] != "done":
        fix = f"rlhf-ray resume {where}, or promote one of its trials"
        raise ConfigError.at(where, "the sweep has not finished", "a winner", "", fix)
    record, config = read_json(sweep.path / "sweep.json"), sweep.config()
    choice = record.get("choice")
    if not isinstance(choice, dict) or choice.get("setting") is None:
        rule = choice.get("rule", "its rule") if isinstance(choice, dict) else "its rule"
        raise ConfigError.at(
            where,
            f"the sweep has no winner by {rule}",
            "a winner",
            "",
            f"promote one of its trials: {where}/trials/...",
        )
    if not _TRIAL.fullmatch(str(choice.get("run_dir"))):
        raise ArtifactError.at(
            f"{where}/sweep.json", "choice.run_dir is not a trial", "trials/ID", repr(choice.get("run_dir"))
        )
    told = {"run_dir": str(sweep.path), "metric": record["metric"], "kl_cap": config.get("kl_cap"), "choice": choice}
    return open_run(sweep.path / choice["run_dir"]), told


def _adapter_of(run: RunFolder, where: str, step: int | None) -> tuple[Path, int]:
    """Folder and step. Without a step the run's result, which may be that of its best step."""
    if step is not None:
        return run.checkpoint(step).adapter_dir, step
    if not (run.adapter_dir / "adapter_config.json").is_file() or run.manifest()["status"] != "done":
        steps = [c.step for c in run.checkpoints()]
        fix = f"rlhf-ray resume {where}" + (f", or --step with one of {', '.join(map(str, steps))}" if steps else "")
        raise ConfigError.at(where, "the run has not finished", "a finished run, or a step", "", fix)
    return run.adapter_dir, run.result_step()


def _check_whole(run: RunFolder, files: AdapterFiles, manifest: Mapping[str, Any]) -> None:
    """Does the adapter do anything, and does its run say what it belongs on?"""
    problems, where = [], str(run.path / "manifest.json")
    if not any(bool(t.any()) for name, t in files.tensors.items() if name.endswith("lora_B.weight")):
        problems.append(Problem(files.path, "every lora_B is zero: the adapter does nothing"))
    base = manifest.get("base") or {}
    for name, found in (
        *((f"base.{part}", base.get(part)) for part in ("path", "weights_sha256", "config_sha256")),
        ("tokenizer_sha256", manifest.get("tokenizer_sha256")),
        ("template.sha256", (manifest.get("template") or {}).get("sha256")),
    ):
        if not isinstance(found, str):
            problems.append(Problem(where, f"{name} is not recorded: the adapter could not be matched to its base"))
    ArtifactError.raise_all(problems)


def _with_content(run: RunFolder, record: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The template with its text. A run that did not store the text has a template file, or a shipped one, of the same hash."""
    if isinstance(record.get("content"), dict):
        return record
    try:
        template = load_template(str(config.get("template")))
    except ConfigError as error:
        raise ArtifactError([Problem(str(run.path), "does not store its prompt template"), *error.problems]) from error
    if template.sha256 != record["sha256"]:
        raise ArtifactError.at(
            str(config.get("template")),
            "is not the prompt template of this run any more",
            record["sha256"],
            template.sha256,
        )
    return template.manifest()


def _held_out(run: RunFolder, step: int) -> tuple[dict[str, float], dict[str, float], tuple[int, ...]]:
    """The evaluation before training (of step 0; none with `eval_on_start: false`), that of `step`, and the steps of all. NaN where
    a figure is not finite. The result of a sweep's DPO trial has reward and KL as well, from an evaluation of its own
    (sweep/evaluation.py)."""
    path = run.path / "metrics.jsonl"
    by_step: dict[int, dict[str, float]] = {}
    for row in read_metrics(path) if path.is_file() else []:
        found = {k: _number(v) for k, v in row.items() if k.startswith("eval/")}
        if found and isinstance(row.get("step"), int):
            by_step.setdefault(row["step"], {}).update(found)
    before, after = by_step.get(0, {}) if step else {}, by_step.get(step, {})
    if run.stage == "dpo" and step == run.result_step() and (sampled := evaluated(run.path, verify=True)) is not None:
        before, after = {**before, **sampled[0]}, {**after, **sampled[1]}
    return before, after, tuple(sorted(by_step))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def as_json(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}
