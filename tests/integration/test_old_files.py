"""Folders that an older version left are read as they were: finished runs, runs to go on with, a sweep, a registry.

tests/old_files/make.py and make_defaults_1.py made them, at the commits that they name. Only commands and public names are used
here, so that the tests hold for any arrangement of the code.
"""

from __future__ import annotations

import csv
import io
import json
import lzma
import re
import tarfile
import tomllib
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlhf_ray import load_run

pytestmark = pytest.mark.integration
PROJECT = Path(__file__).resolve().parents[2]
ARCHIVE = PROJECT / "tests" / "old_files" / "fixtures.tar.xz"
DEFAULTS_1 = ARCHIVE.with_name("defaults_1.tar.xz")
ADAPTER = "adapter_model.safetensors"
ASK = ("--instruction", "Name the toad.", "--greedy", "--max-new-tokens", "8", "--json")
Command = Callable[..., str]


@pytest.fixture(scope="module")
def archive() -> bytes:
    return lzma.decompress(ARCHIVE.read_bytes())


@pytest.fixture
def old(archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The old folders, byte by byte as they were, in a place that is not where they were made; the current folder."""
    return unpacked(archive, tmp_path, monkeypatch)


@pytest.fixture
def older_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The same for half-done jobs that say nothing of what got another default since; on what they were made."""
    place = unpacked(lzma.decompress(DEFAULTS_1.read_bytes()), tmp_path, monkeypatch)
    return dict(json.loads((place / "answers.json").read_text())["made_on"])


def unpacked(archive: bytes, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
        packed.extractall(place, filter="tar")
    monkeypatch.chdir(place)
    monkeypatch.delenv("RLHF_RAY_REGISTRY", raising=False)
    return place


@pytest.fixture
def answers(old: Path) -> dict[str, Any]:
    return dict(json.loads((old / "answers.json").read_text()))


@pytest.fixture
def made_here(old: Path, answers: dict[str, Any]) -> None:
    """Finished runs as if they had been made here: `merge` and `score` find the base where the manifest says."""
    for path in old.glob("runs/*/manifest.json"):
        path.write_text(path.read_text().replace(answers["place"], str(old)))


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """command("resume", "half/sft") -> what it printed on stdout; it must exit 0."""
    script = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["scripts"]["rlhf-ray"]
    module, _, name = script.partition(":")
    main = getattr(import_module(module), name)

    def run(*words: str) -> str:
        capfd.readouterr()
        code, told = main(list(words)), capfd.readouterr()
        assert code == 0, f"rlhf-ray {' '.join(words)} ended with {code}: {told.err}"
        return told.out

    return run


@pytest.fixture
def own_ray(ray_of: Callable[..., Any]) -> Any:
    return ray_of(num_cpus=2)


def elsewhere(made_on: dict[str, str]) -> dict[str, str]:
    """What bits depend on and is another one here than where the folders were made: name -> how it differs."""
    from transformers import __version__ as transformers

    cpu = re.search("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())
    here = {"torch": torch.__version__, "transformers": transformers, "cpu": cpu[1] if cpu else ""}
    here |= {"instructions": torch.backends.cpu.get_cpu_capability()}
    return {name: f"{value} -> {here[name]}" for name, value in made_on.items() if value != here[name]}


def metrics(run: Path) -> list[dict[str, Any]]:
    """All that repeats."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k.split("/")[0] not in ("time", "memory", "faults")} for row in rows]


def require_same(run: str, undisturbed: str, made_on: dict[str, str]) -> None:
    """Weights and metrics of `run` are, to the bit, those of `undisturbed`; on another machine, near them, with a warning.

    Metrics that the version which made `undisturbed` did not have are not compared."""
    pairs = [
        (load_file(Path(run) / name / ADAPTER), load_file(Path(undisturbed) / name / ADAPTER))
        for name in ("adapter", "value")
        if (Path(undisturbed) / name).is_dir()
    ]
    expected = metrics(Path(undisturbed))
    rows = [{k: v for k, v in row.items() if k in old} for row, old in zip(metrics(Path(run)), expected, strict=True)]
    assert pairs and all(a.keys() == b.keys() for a, b in pairs)
    bits = all(torch.equal(a[key], b[key]) for a, b in pairs for key in b)
    if bits and rows == expected:
        return
    differ = elsewhere(made_on)
    assert differ, f"{run} is not {undisturbed}: {'metrics' if bits else 'weights'} differ"
    warnings.warn(f"{run} was compared with a tolerance: {differ}", stacklevel=2)
    for a, b in pairs:
        gap = torch.cat([(a[key] - b[key]).abs().flatten() for key in b])
        assert gap.mean() < 1e-4, f"{run} is far from {undisturbed}: {gap.mean():.2e} in the mean"
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, other in zip(rows, expected):
        assert row == pytest.approx(other, rel=0.05, abs=0.02, nan_ok=True)


SAMPLED = (
    "reward/",
    "kl/",
    "response/",
    "policy/entropy",
    "value/mean",
    "returns/",
    "advantage/",
    "sampler/",
    "tokens/",
)


def require_same_rollout(run: str, undisturbed: str, step: int, made_on: dict[str, str], but: str = "-") -> None:
    """Up to `step` metrics are, to the bit, those of `undisturbed`, and so is all of `step` that comes before its update.

    What follows is another run: the version that made the folders let DeepSpeed clip all gradients together to 1.0."""
    rows, expected = ({row["step"]: row for row in metrics(Path(r))} for r in (run, undisturbed))
    assert step in expected and rows.keys() == expected.keys()
    for number in (n for n in expected if n <= step):
        told = {
            k: v
            for k, v in expected[number].items()
            if number < step or (k.startswith(SAMPLED) and not k.startswith(but))
        }
        found = {k: rows[number].get(k) for k in told}
        assert told and (found == told or elsewhere(made_on)), f"{run} is not {undisturbed} at step {number}"
        assert found == pytest.approx(told, rel=0.05, abs=0.02, nan_ok=True)
    assert (Path(run) / "adapter" / ADAPTER).is_file()


def go_on(command: Command, run: str) -> dict[str, Any]:
    """`resume`, which keeps what was logged before: the run goes on, it does not start again."""
    logs = [path for path in Path(run).rglob("metrics.jsonl") if path.stat().st_size]
    # A line that was written after the checkpoint is written again.
    kept = {path: path.read_text().splitlines()[:1] for path in logs}
    done: dict[str, Any] = json.loads(command("resume", run, "--json"))
    assert logs and all(path.read_text().splitlines()[:1] == lines for path, lines in kept.items())
    assert done["status"] == "done" and load_run(run).status == "done"
    return done


# -------------------------------------------------------------------------------------------------------- finished runs

FINISHED = {"sft": 4, "reward": 3, "ppo": 3, "split": 4, "pipeline": 5, "pipeline/evaluate": 0, "sweep": 0}


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_run(old: Path, command: Command, name: str) -> None:
    """It is listed as it was, nothing is done to it again, and its report can be written."""
    folder = old / "runs" / name
    summary = json.loads((folder / "summary.json").read_text())
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    run = load_run(f"runs/{name}")
    assert (run.stage, run.status, run.run_dir) == (summary["stage"], "done", str(folder))
    assert run.steps == summary["steps"] and run.metrics == summary["metrics"]
    if FINISHED[name]:
        assert run.steps == FINISHED[name]
    again = json.loads(command("resume", f"runs/{name}", "--json"))
    assert again["metrics"] == summary["metrics"]
    assert before == {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    written = Path(command("report", f"runs/{name}").strip())
    assert summary["stage"] in written.read_text()


def test_policies_and_a_reward_model_answer(
    old: Path, command: Command, answers: dict[str, Any], made_here: None
) -> None:
    """As they did when they were made; a run, a checkpoint in it, a merged checkpoint, versions of a registry."""
    for policy, expected in answers["generate"].items():
        found = json.loads(command("generate", "--policy", policy, "--model", "base", *ASK))
        assert found["completion"] == expected["completion"], policy
        for figure in ("reward", "kl"):
            assert found.get(figure) == pytest.approx(expected.get(figure), abs=1e-3), f"{policy}: {figure}"
    prompts = [
        json.loads(command("generate", "--policy", policy, "--show-prompt", *ASK))["prompt"]
        for policy in ("runs/ppo", "runs/ppo@3")
    ]
    assert prompts[0] == prompts[1] and "Name the toad." in prompts[0], "a checkpoint has its run's template"
    reply = ("--prompt", "Name the toad.", "--completion", "yesyes", "--json")
    assert json.loads(command("score", "--run", "runs/reward", *reply)) == pytest.approx(answers["score"], abs=1e-3)


def test_a_run_is_merged(old: Path, command: Command, made_here: None) -> None:
    """A merge that is there is recognised; made anew it is the same."""
    merged = Path("runs/sft-adapter-merged")
    assert command("merge", "runs/sft").strip() == str(merged.absolute())
    weights = load_file(merged / "model.safetensors")
    again = Path(command("merge", "runs/sft", "--output-dir", "again").strip())
    for key, tensor in load_file(again / "model.safetensors").items():
        torch.testing.assert_close(tensor, weights[key])


# ---------------------------------------------------------------------------------------------------- runs to go on with


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_a_half_done_run_goes_on(old: Path, command: Command, answers: dict[str, Any], name: str) -> None:
    half = load_run(f"half/{name}")
    assert half.status == "running" and half.steps > 0
    go_on(command, f"half/{name}")
    if name == "ppo":
        require_same_rollout("half/ppo", "runs/ppo", half.steps + 1, answers["made_on"])
    else:
        require_same(f"half/{name}", f"runs/{name}", answers["made_on"])


def test_a_half_done_pipeline_goes_on(old: Path, command: Command, answers: dict[str, Any]) -> None:
    """Cut off in its second stage of four."""
    sft = Path("half/pipeline/sft/adapter", ADAPTER).stat().st_mtime_ns
    done = go_on(command, "half/pipeline")
    assert Path("half/pipeline/sft/adapter", ADAPTER).stat().st_mtime_ns == sft
    for stage in ("sft", "reward"):
        require_same(f"half/pipeline/{stage}", f"runs/pipeline/{stage}", answers["made_on"])
    require_same_rollout("half/pipeline/ppo", "runs/pipeline/ppo", 1, answers["made_on"])
    assert done["metrics"].keys() >= load_run("runs/pipeline").metrics.keys(), "later versions measure more"


def test_a_half_done_split_run_goes_on(own_ray: Any, old: Path, command: Command, answers: dict[str, Any]) -> None:
    """Its checkpoint holds a rollout that waits for its step, which an adapter sampled that is gone."""
    assert Path("half/split/checkpoints/step_000002/waiting/account.json").is_file()
    go_on(command, "half/split")
    # Its KL was measured without the weights of stale tokens.
    require_same_rollout("half/split", "runs/split", 3, answers["made_on"], but="kl/k")


# -------------------------------------------------------------------------------- defaults that were other ones then

HOW = {"resume": ("resume", "half/{0}"), "its job file again": ("{0}", "jobs/{0}.yaml", "resume=auto")}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["pipeline", "ppo", "sweep"])
def test_it_ends_under_the_defaults_that_it_was_begun_with(
    older_defaults: dict[str, str], command: Command, request: pytest.FixtureRequest, name: str, how: str
) -> None:
    """PPO of the pipeline and two trials of the sweep had not begun. Under today's defaults the critic's rate, its warm-up and
    clipping, the reward's scale and Adam's epsilon would be other ones. Equal to the run that nobody cut off, bit for bit."""
    if name == "sweep":
        request.getfixturevalue("own_ray")
    command(*(word.format(name) for word in HOW[how]))
    pairs = {name: [""], "pipeline": ["sft", "reward", "ppo"]}[name]
    if name == "sweep":
        pairs = [f"trials/{trial.name}" for trial in Path("runs/sweep/trials").iterdir()]
        assert len(pairs) == 3
    for part in pairs:
        require_same(f"half/{name}/{part}", f"runs/{name}/{part}", older_defaults)
    ended, undisturbed = load_run(f"half/{name}"), load_run(f"runs/{name}")
    if not elsewhere(older_defaults):
        told = {k: v for k, v in undisturbed.metrics.items() if not {"time", "memory"} & set(k.split("/"))}
        # An evaluation has no half: its rows are cut as now, and rewards have other last bits.
        for k, v in told.items():
            assert ended.metrics.get(k) == (pytest.approx(v, abs=1e-5) if k.startswith("evaluate/") else v), k
    kept = yaml.safe_load(Path(f"half/{name}/config.yaml").read_text())
    assert kept.get("defaults_version", 1) == 1


# ---------------------------------------------------------------------------------------------------- sweep and registry


def table(sweep: str) -> list[dict[str, str]]:
    with open(Path(sweep) / "trials.csv") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_a_half_done_sweep_goes_on(own_ray: Any, old: Path, command: Command, answers: dict[str, Any]) -> None:
    """Two trials are taken as they are, the third goes on from its checkpoint; its row is there, and a winner."""
    kept = {path: path.read_bytes() for path in Path("half/sweep").glob("trials/*/summary.json")}
    assert len(kept) == 2
    go_on(command, "half/sweep")
    assert kept == {path: path.read_bytes() for path in kept}
    found, expected = table("half/sweep"), table("runs/sweep")
    assert [row["trial"] for row in found] == [row["trial"] for row in expected]
    assert {row["status"] for row in found} == {"done"}
    assert json.loads(Path("half/sweep/sweep.json").read_text())["choice"]["run_dir"]
    for trial in Path("runs/sweep/trials").iterdir():
        run = f"half/sweep/trials/{trial.name}"
        if Path(run, "summary.json") in kept:
            require_same(run, str(trial), answers["made_on"])
        else:
            require_same_rollout(run, str(trial), 1, answers["made_on"])


def test_a_sweep_has_a_winner(old: Path, command: Command) -> None:
    """Its table and choice are read from its folder: the winner's adapter gets a name."""
    choice = json.loads(Path("runs/sweep/sweep.json").read_text())["choice"]
    forced = ("--alias", "best", "--force", "--reason", "a test", "--json")
    told = json.loads(command("promote", "runs/sweep", *forced))
    gates = {gate["gate"]: gate for gate in told["gates"]}
    assert "50" in gates["kl"]["limit"] and "kl_cap of the sweep" in gates["kl"]["limit"]
    best = load_file(Path("runs/sweep", choice["run_dir"], "adapter", ADAPTER))
    promoted = load_file(Path(told["path"]) / ADAPTER)
    assert best.keys() == promoted.keys() and all(torch.equal(best[key], promoted[key]) for key in best)


def test_a_registry(old: Path, command: Command) -> None:
    """Names, versions and history; a version that is there is recognised, a promotion is taken back, the next one is counted on."""
    listed = {entry["name"]: entry for entry in json.loads(command("adapters", "--json"))}
    assert listed.keys() == {"helper", "judge"}
    before = json.loads(command("adapters", "helper", "--json"))
    known = json.loads(Path("registry/aliases/helper.json").read_text())
    assert (known["live"], [event["action"] for event in known["history"]]) == (2, ["promote", "promote"])
    first, second = (known["versions"][number]["id"] for number in ("1", "2"))
    assert first in json.dumps(before) and second in json.dumps(before)
    forced = ("--alias", "helper", "--force", "--reason", "a test", "--json")
    same = json.loads(command("promote", "runs/ppo", *forced))
    assert (same["id"], same["is_new"], same["changed"]) == (second, False, False)
    back = json.loads(command("rollback", "helper", "--json"))
    assert back["id"] == first and [e["action"] for e in back["history"]] == ["promote", "promote", "rollback"]
    third = json.loads(command("promote", "runs/split@3", *forced))
    assert third["id"].startswith("helper@v3-") and third["previous"] == first
