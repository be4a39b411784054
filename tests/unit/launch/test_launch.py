"""Without a cluster a job is checked against this machine, and no Ray is started for it (exit 3, in under 2 s)."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import PipelineConfig, PPOConfig, SFTConfig
from rlhf_ray.config.resolved import written_out
from rlhf_ray.config.stored import load_stored
from rlhf_ray.console import NullConsole
from rlhf_ray.errors import LimitReached, ResourceError
from rlhf_ray.launch.launch import GROUP_TIMEOUT_S, group_timeout_s, launch
from rlhf_ray.launch.placement import role_timeout_s
from rlhf_ray.storage.run import Run
from rlhf_ray.storage.run_folder import create_run


def job(**learner: object) -> SFTConfig:
    return SFTConfig(output_dir="x", model_name_or_path="m", data={"train": "d.jsonl"}, learner=learner)


def alone(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """No cluster is given, whoever else runs one on this machine."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(folder))


def test_refused_without_a_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch, tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ResourceError, match=r"learner.num_gpus: no node has 2 GPU") as caught:
        launch(lambda config, session: None, job(num_gpus=2.0), None)  # type: ignore[arg-type,return-value]
    assert caught.value.exit_code == 3
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


def test_the_command_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch, transformers or Ray are imported."""
    alone(monkeypatch, tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    (tmp_path / "d.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    (tmp_path / "m").mkdir()
    job = {"output_dir": "run", "model_name_or_path": "m", "data": {"train": "d.jsonl"}}
    job |= {"placement": "split", "rewards": [{"function": "rlhf_ray.data.tinyworld:score"}]}
    job |= {"generator": {"num_gpus": 1.0}, "scorer": {"num_gpus": 1.0}, "learner": {"num_gpus": 1.0}}
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    code = (
        "import sys, rlhf_ray.cli as cli\n"
        "code = cli.main(['ppo', 'job.yaml'])\n"
        "print([m for m in ('ray', 'torch', 'transformers') if m in sys.modules])\n"
        "sys.exit(code)"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    print(time.monotonic() - started)
    assert "do not fit together" in done.stderr and "generator.num_gpus=0.5" in done.stderr, done.stderr
    assert done.returncode == 3
    assert done.stdout.strip() == "[]"


def test_a_driver_and_the_controller_of_its_workers_import_no_models(tmp_path: Path) -> None:
    """What `rlhf-ray ppo JOB` imports until it starts Ray, what places its actors, and what Ray Train's controller unpickles: the
    body is a name. Each of the two processes took 4 s longer when it was the function, and 1 s more with torch."""
    code = (
        "import contextlib, pickle, sys\n"
        "from rlhf_ray.config import STAGES, PipelineConfig, SFTConfig\n"
        "from rlhf_ray.stages import resume, start\n"
        "import rlhf_ray.cli.app, rlhf_ray.launch.launch as launcher, rlhf_ray.roles.actor_pool, rlhf_ray.launch.train_group\n"
        "def no_cluster(resume):\n"
        "    sys.exit('to start Ray')\n"
        "launcher.cluster = no_cluster\n"
        "data = {'train': 'd.jsonl'}\n"
        "with contextlib.suppress(SystemExit):\n"
        "    start.sft(SFTConfig(output_dir='run', model_name_or_path='m', data=data, template='chat'))\n"
        "    raise AssertionError('it did not start Ray')\n"
        "def launch(body, config, console, builders=None):\n"
        "    return pickle.loads(pickle.dumps((body, builders)))\n"
        "start.launch = launch\n"
        "for stage in ('sft', 'reward', 'evaluate', 'pipeline'):\n"
        "    print(getattr(start, stage)({**STAGES, 'pipeline': PipelineConfig}[stage].model_construct()))\n"
        "print(sorted({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *bodies, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    names = [body.split("'")[1].split(":")[1] for body in bodies]
    assert names == ["train_sft", "train_reward", "run_evaluate", "run_pipeline"]


@pytest.mark.parametrize(
    ("fix", "said"),
    [
        ("", "fix: rlhf-ray resume RUN"),
        ("fix the function", "fix: fix the function; then: rlhf-ray resume RUN"),
        ("wait; rlhf-ray resume RUN", "fix: wait; rlhf-ray resume RUN"),
    ],
)
def test_an_interruption_ends_with_the_command_that_goes_on(tmp_path: Path, fix: str, said: str) -> None:
    """Whoever raised it, where there is a run to go on with."""
    run = tmp_path / "run"

    def body(config: SFTConfig, session: object) -> Run:
        raise LimitReached.at("here", "it broke", fix=fix.replace("RUN", str(run)))

    config = SFTConfig(
        output_dir=str(run), model_name_or_path="m", data={"train": "d.jsonl"}, learner={"num_workers": 0}
    )
    with pytest.raises(LimitReached) as caught:
        launch(body, config, NullConsole())
    assert str(caught.value).endswith(fix.replace("RUN", str(run)))
    create_run(run, "sft", {}, "never")
    with pytest.raises(LimitReached) as caught:
        launch(body, config.model_copy(update={"resume": "auto"}), NullConsole())
    assert str(caught.value) == f"here: it broke; {said.replace('RUN', str(run))}"


def test_who_waits_for_a_reward_server_waits_longer_than_the_server_may_be_asked() -> None:
    """A rank that gave up first took the other one for lost, and the group was started again instead of one line that says why."""
    fields: dict[str, Any] = {"output_dir": "x", "model_name_or_path": "m", "data": {"train": "p.jsonl"}}
    url = {"url": "http://127.0.0.1:9/score", "max_retries": 20}
    asked = 21 * 60 + 20 * 300
    asking = PPOConfig(**fields, rewards=[url])
    assert group_timeout_s(asking) >= asked + 300 and role_timeout_s(asking, "scorer") >= asked + 300
    assert role_timeout_s(asking, "generator") == 1800.0
    assert role_timeout_s(PPOConfig(**fields, rewards=[url], scorer={"timeout_s": 50.0}), "scorer") == 50.0
    resumed = load_stored(PPOConfig, written_out(asking), "config.yaml")  # where all fields stand
    assert role_timeout_s(resumed, "scorer") >= asked + 300
    judged = PPOConfig(
        **fields, rewards=[{"llm": {"base_url": "http://127.0.0.1:9/v1", "model": "m", "requests_per_minute": 1.0}}]
    )
    assert group_timeout_s(judged) >= 6 * 120 + 5 * 300 + 6 * 8 * 60
    assert group_timeout_s(PPOConfig(**fields, rewards=[{"run": "r"}])) == GROUP_TIMEOUT_S
    ppo = {"data": {"train": "p.jsonl"}, "rewards": [url]}
    chain = PipelineConfig(
        output_dir="x", model_name_or_path="m", stages=["sft", "ppo"], sft={"data": {"train": "p"}}, ppo=ppo
    )
    assert group_timeout_s(chain) >= asked + 300
