"""The console script: exit codes, streams, help, start-up time. Stages are stood in for where only the command line is meant."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray import errors
from rlhf_ray.cli.app import STAGE_HELP, main
from rlhf_ray.config import STAGES, PipelineConfig
from rlhf_ray.config.hints import dotted_fields
from rlhf_ray.errors import RlhfRayError
from rlhf_ray.storage.run import Run

JOB = "output_dir: runs/ppo\nmodel_name_or_path: base\ndata: {train: prompts.jsonl}\nrewards: [{run: runs/reward}]\n"
RUN = Run("ppo", "done", "/runs/ppo", 3, 1.5, 0, {"reward/mean": 0.5, "kl/coef": float("nan")}, {"adapter": "adapter"})


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    for folder in ("base", "runs/reward"):
        Path(folder).mkdir(parents=True)
    Path("job.yaml").write_text(JOB)
    return "job.yaml"


def script(*args: str, setup: str = "", timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """`rlhf-ray ARGS` in a process of its own; `setup` runs first, to stand in for a stage."""
    code = f"import sys\n{setup}\nfrom rlhf_ray.cli import main\nsys.exit(main({list(args)!r}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, check=False)


def stage(body: str) -> str:
    """Setup code that puts a module with the function ppo(config) in place of the stage."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    return f"import types\nstage = types.ModuleType('stage')\ndef ppo(config):\n{lines}\nstage.ppo = ppo\n" + (
        "sys.modules['rlhf_ray.stages.start'] = stage\n"
    )


# ---------------------------------------------------------------- help


@pytest.mark.alone
def test_help_is_quick_and_imports_nothing_heavy() -> None:
    setup = (
        "import atexit\natexit.register(lambda: print(sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr))"
    )
    done = script("--help", setup=setup)
    loaded = done.stderr
    assert done.returncode == 0
    for heavy in ("torch", "ray", "transformers", "pydantic_core", "numpy", "rich"):
        assert f"'{heavy}'" not in loaded
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        script("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for args in ([], ["--help"], ["-h"]):
        assert main(args) == 0
        out, err = capsys.readouterr()
        commands = [line.split()[0] for line in out.split("Commands:\n")[1].splitlines()]
        assert commands == ["sft", "dpo", "reward", "ppo", "evaluate", "pipeline", "sweep", "serve", "demo", "resume", "merge",
                            "generate", "chat", "score", "plan", "report", "submit", "doctor", "promote",
                            "rollback", "adapters", "api-key", "data", "import"]  # fmt: skip
        assert err == "" and "..." not in out.split("Commands:\n")[1]


@pytest.mark.parametrize("name", STAGE_HELP)
def test_stage_help_lists_every_field_with_type_default_and_meaning(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "900")
    assert main([name, "--help"]) == 0
    rows = capsys.readouterr().out.split("Field of the job file")[1].splitlines()[1:]
    cls = STAGES.get(name, PipelineConfig)
    first = {row.split()[0]: row for row in rows}
    assert set(first) == {f for f in dotted_fields(cls) if not f.startswith("value.lora.")}
    for field, info in cls.model_fields.items():
        assert info.description and info.description in first[field]
    assert " required " in first["output_dir"]
    if name == "ppo":
        assert "number > 0" in first["learning_rate"] and " 2e-5 " in first["learning_rate"]


def test_stage_help_is_readable_in_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["ppo", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("rewards[].function") for line in lines)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import rlhf_ray

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{rlhf_ray.__version__}\n"


# ---------------------------------------------------------------- errors and exit codes


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["pppo", "x"], "error: No such command 'pppo'"),
        (["ppo"], "error: Missing argument 'JOB.yaml'; fix: see `rlhf-ray ppo --help`"),
        (
            ["ppo", "x.yaml", "--kl_coef=3"],
            "error: No such option: --kl-coef; fix: fields of a job have no dashes: kl_coef=VALUE",
        ),
        (
            ["sft", "x.yaml", "--cutoff_len", "3"],
            "error: No such option: --cutoff-len; fix: fields of a job have no dashes: max_length=VALUE",
        ),
        (["ppo", "nowhere.yaml"], "error: nowhere.yaml: no such file"),
        (["ppo", "job.yaml", "kl_coef"], "error: override kl_coef: no value; expected field=value, e.g. kl_coef=0.1"),
        (["ppo", "job.yaml", "gamma=2"], "error: override gamma=2: out of range"),
        (["generate", "--instruction", "hi"], "error: Missing option '--policy'"),
        (["generate", "--policy", "base"], "error: Invalid value: give exactly one of --instruction, --file; got none"),
        (
            ["generate", "--policy", "base", "--file", "a", "--instruction", "b"],
            "error: Invalid value: give exactly one of",
        ),
        (
            ["generate", "--policy", "base", "--instruction", "a", "--top_p", "5"],
            "error: generate: top_p: out of range; expected number > 0 and <= 1; got 5; fix: the default is 1",
        ),
        (
            ["generate", "--policy", "base", "--instruction", "a", "--temperature", "0"],
            "error: generate: temperature: out of range; expected number from 0.01 to 100.0; got 0; fix: the default is 1",
        ),
        (
            ["generate", "--policy", "base", "--instruction", "a", "--greedy", "--temperature", "0.5"],
            "error: generate: temperature: temperature, top_p and top_k have no effect with do_sample: false",
        ),
        (
            ["generate", "--policy", "base", "--instruction", "a", "--max-new-tokens", "0"],
            "error: Invalid value for '--max-new-tokens'",
        ),
        (
            ["score", "--run", "a", "--function", "b.py:c", "--completion", "x"],
            "error: Invalid value: give exactly one of --run, --model",
        ),
        (["score", "--function", "nocolon", "--completion", "x"], "error: score: function: malformed"),
    ],
)
def test_a_wrong_command_line_or_job_is_one_line_and_exit_code_2(
    args: list[str], line: str, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(line) and err.count("\n") == 1


ERRORS = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, RlhfRayError)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda c: c.__name__)
def test_each_error_of_ours_has_its_code_and_its_lines(
    error: type[RlhfRayError], job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ppo(config: Any) -> Run:
        raise error([errors.Problem("a:1", "bad"), errors.Problem("b", "worse", fix="mend it")])

    monkeypatch.setitem(sys.modules, "rlhf_ray.stages.start", SimpleNamespace(ppo=ppo))  # type: ignore[misc]
    assert main(["ppo", job, "--json"]) == error.exit_code
    out, err = capsys.readouterr()
    assert out == "" and err == "error: a:1: bad\nerror: b: worse; fix: mend it\n"


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        (
            "raise KeyError('x')",
            1,
            "error: a bug in rlhf_ray: KeyError: 'x'; run again with --debug for the traceback\n",
        ),
        (
            "raise ValueError('two\\nlines')",
            1,
            "error: a bug in rlhf_ray: ValueError: two lines; run again with --debug for the traceback\n",
        ),
        (
            "raise MemoryError",
            3,
            "error: out of memory: no memory left; fix: lower per_device_train_batch_size or rollout_chunk_size\n",
        ),
        (
            "raise OSError(28, 'No space left on device', 'out/model.safetensors')",
            3,
            "error: out/model.safetensors: cannot be written: No space left on device; fix: free some space, and run it again\n",
        ),
        (
            "raise PermissionError(13, 'Permission denied', 'runs/ppo/.report.html.tmp-0123abcd')",
            2,
            "error: runs/ppo/report.html: cannot be read or written: Permission denied; "
            "fix: check its permissions, or name another place\n",
        ),
        (
            "raise OSError(30, 'Read-only file system', b'/mnt/keys.json')",
            2,
            "error: /mnt/keys.json: cannot be read or written: Read-only file system; "
            "fix: check its permissions, or name another place\n",
        ),
        (
            "raise FileNotFoundError('no name')",
            1,
            "error: a bug in rlhf_ray: FileNotFoundError: no name; run again with --debug for the traceback\n",
        ),
        ("raise KeyboardInterrupt", 75, "error: runs/ppo: interrupted; fix: start it again\n"),
        (
            "import os, signal, pathlib, time\npathlib.Path('runs/ppo').mkdir()\n"
            "pathlib.Path('runs/ppo/manifest.json').write_text('{}')\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)",
            75,
            "error: runs/ppo: interrupted; fix: rlhf-ray resume runs/ppo\n",
        ),
    ],
)
def test_what_else_can_end_a_command(body: str, code: int, line: str, job: str) -> None:
    done = script("ppo", job, setup=stage(body))
    assert (done.returncode, done.stdout, done.stderr) == (code, "", line)


def test_ctrl_c_outside_of_a_run(job: str) -> None:
    setup = "import rlhf_ray.config.load as l\ndef load(*a): raise KeyboardInterrupt\nl.load = load"
    done = script("ppo", job, setup=setup)
    assert (done.returncode, done.stdout, done.stderr) == (75, "", "error: interrupted\n")


def test_debug_adds_the_traceback(job: str) -> None:
    done = script("ppo", job, "--debug", setup=stage("raise KeyError('x')"))
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.splitlines()[-1].startswith("error: a bug in rlhf_ray: KeyError: 'x'")
    quiet = script("ppo", "nowhere.yaml", "--debug")
    assert quiet.returncode == 2 and "Traceback" in quiet.stderr


def test_the_real_script_exits_with_2(job: str) -> None:
    exe = Path(sys.executable).with_name("rlhf-ray")
    if not exe.exists():
        pytest.skip("the package is not installed with its console script")
    done = subprocess.run([exe, "ppo", job, "gamma=2"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "error: override gamma=2: out of range; expected number from 0 to 1; got 2; fix: the default is 1\n"
    )


def test_a_reader_that_leaves_is_no_bug() -> None:
    code = "import sys\nfrom rlhf_ray.cli import main\nsys.exit(main(['ppo', '--help']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        err = process.stderr.read().decode()
    assert "Traceback" not in err and "bug" not in err


# ---------------------------------------------------------------- streams


NOISY = """
import os, subprocess
print("printed")
os.write(1, b"written\\n")
subprocess.run(["echo", "from a child"])
from rlhf_ray.storage.run import Run
return Run("ppo", "done", config.output_dir, 3, 1.5, 0, {"reward/mean": 0.5, "kl/coef": float("nan")}, {"adapter": "adapter"})
"""


def test_stdout_carries_the_summary_and_nothing_else(job: str) -> None:
    done = script("ppo", job, "--json", setup=stage(NOISY))
    assert done.returncode == 0
    summary = json.loads(done.stdout)
    assert list(summary) == ["stage", "status", "run_dir", "steps", "seconds", "seed", "metrics", "artifacts"]
    assert summary["metrics"] == {"reward/mean": 0.5, "kl/coef": None}
    for noise in ("printed", "written", "from a child"):
        assert noise in done.stderr


def test_without_json_stdout_is_empty(job: str) -> None:
    done = script("ppo", job, "output_dir=runs/else", setup=stage(NOISY))
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.endswith("ppo: done in runs/else\n")


# ---------------------------------------------------------------- what commands hand on


def test_stages_get_the_checked_configuration(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setitem(sys.modules, "rlhf_ray.stages.start", SimpleNamespace(ppo=lambda c: seen.append(c) or RUN))  # type: ignore[misc]
    assert main(["ppo", job, "lora.r=4", "kl_coef=1e-2"]) == 0
    (config,) = seen
    assert (type(config), config.lora.r, config.kl_coef) == (STAGES["ppo"], 4, 0.01)


def test_generate_hands_on_what_was_asked_and_prints_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def run(**asked: Any) -> list[dict[str, Any]]:
        seen.update(asked)
        return [{"policy": "base", "prompt": "Say hé", "completion": "hé\nyou", "reward": None}]

    monkeypatch.setitem(sys.modules, "rlhf_ray.stages.generate", SimpleNamespace(generate=run))  # type: ignore[misc]
    monkeypatch.setattr("rlhf_ray.models.specs.policy_source", lambda spec: None)  # the run is not there
    args = ["generate", "--policy", "base", "--policy", "runs/ppo@40", "--instruction", "Say hé", "--top_k", "5"]
    assert main([*args, "--max_new_tokens", "7", "--load_in_8bit"]) == 0
    assert capsys.readouterr().out == "policy: base\ncompletion: hé\nyou\n\n"
    assert seen["policies"] == ["base", "runs/ppo@40"] and seen["instruction"] == "Say hé" and seen["file"] is None
    assert (seen["max_new_tokens"], seen["load_in_8bit"], seen["load_in_4bit"]) == (7, True, False)
    assert (seen["sampling"].do_sample, seen["sampling"].top_k, seen["sampling"].temperature) == (True, 5, 1.0)
    assert main([*args, "--json", "--show-prompt"]) == 0
    assert json.loads(capsys.readouterr().out) == {"policy": "base", "prompt": "Say hé", "completion": "hé\nyou"}
    assert main([*args, "--out", "replies.jsonl"]) == 0
    assert capsys.readouterr().out == ""


def test_score_hands_on_the_reward(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: dict[str, Any] = {}

    def run(**asked: Any) -> list[dict[str, Any]]:
        seen.update(asked)
        return [{"reward": 0.25}]

    monkeypatch.setitem(sys.modules, "rlhf_ray.stages.score", SimpleNamespace(score=run))  # type: ignore[misc]
    assert main(["score", "--function", "f.py:score", "--prompt", "p", "--completion", "c"]) == 0
    assert capsys.readouterr().out == "reward: 0.25\n\n"
    assert (seen["source"].function, seen["prompt"], seen["completion"], seen["file"]) == ("f.py:score", "p", "c", None)


# ---------------------------------------------------------------- the package


def test_importing_the_package_is_quick_and_lazy() -> None:
    code = "import sys, rlhf_ray; print({m.split('.')[0] for m in sys.modules} & {'torch', 'ray', 'pydantic', 'transformers'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"


def test_every_public_name_is_there() -> None:
    import rlhf_ray

    assert {"SFTConfig", "RewardConfig", "PPOConfig", "sft", "reward", "ppo", "load_run"} <= set(rlhf_ray.__all__)
    missing = []
    for name in rlhf_ray.__all__:
        try:
            getattr(rlhf_ray, name)
        except (ImportError, AttributeError) as error:
            missing.append(f"{name}: {error}")
    assert missing == []
    assert set(rlhf_ray.__all__) <= set(dir(rlhf_ray))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rlhf_ray.nothing
