"""Faults that need no Ray: damaged files, a full disk, numbers that are not finite, guards, two writers."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.metrics import read_metrics
from rlhf_ray.storage.run_folder import open_run

from .conftest import REWARD, Child

pytestmark = pytest.mark.integration


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


PROGRAM = f"OMP_NUM_THREADS=1 {sys.executable} -m rlhf_ray.cli"
# Fails in step 4: an evaluation of 2 replies, three steps of 16, another evaluation.
REWARD_THAT_FAILS = REWARD.replace(
    "def score(prompts, completions, **columns):",
    """from pathlib import Path

CALLS = []


def score(prompts, completions, **columns):
    CALLS.append(len(prompts))
    if sum(CALLS) > 52 and not Path("up").exists():
        raise RuntimeError("the reward service is down")""",
)
FILES = (
    "adapter/adapter_model.safetensors",
    "value/adapter_model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
)
DAMAGES: tuple[Callable[[Path], None], ...] = (cut, flip, Path.unlink)


@pytest.mark.parametrize("number", range(len(FILES)))
def test_a_damaged_checkpoint_is_passed_over(
    world: Any, untouched: Path, stopped: Path, number: int, note: Any, same: Any
) -> None:
    """Fault 19. The newest loses a file in one way, the one before it in another; the warning names both files."""
    name = f"damaged-{number}"
    run = world.copy("stopped", name)
    newest, before = (run / "checkpoints" / f"step_00000{n}" for n in (3, 2))
    first, second = FILES[number], FILES[(number + 1) % len(FILES)]
    for place, file, damage in ((newest, first, DAMAGES[number % 3]), (before, second, DAMAGES[(number + 1) % 3])):
        # A bit flipped in a manifest reads as the damage of a file that it names, its last byte is a line end.
        (Path.unlink if file == "manifest.json" else damage)(place / file)
    said = world.finish(name)
    for place, file in ((newest, first), (before, second)):
        assert any("not usable" in line and str(place / file) in line for line in said.splitlines()), said
    assert "resuming from step 1 " in said
    note(19, same(untouched, run), "older checkpoint used, both files named, same weights and metrics")


def test_no_checkpoint_left_is_never_a_fresh_start(world: Any, stopped: Path, note: Any) -> None:
    run = world.copy("stopped", "none-left")
    for checkpoint in open_run(run, verify=False).checkpoints():
        flip(checkpoint.path / "optimizer.safetensors")
    child = world.start("resume", "runs/none-left")
    code = child.wait()
    assert len(child.text.splitlines()[-4:]) == 4 and "no valid checkpoint is left" in child.text, child.text
    note(19, code == 5, "none left: exit 5")


def test_another_reward_since_the_run_began(world: Any, stopped: Path) -> None:
    """A function may be mended, which is told; a model may not change (its sha256 stands in the manifest)."""
    run, function = world.copy("stopped", "mended"), world.folder / "mine.py"
    before = function.read_text()
    function.write_text(before.replace("1e-4", "2e-4"))
    said = world.finish("mended")
    function.write_text(before)
    assert "warning: ascii: mine.py:score has changed since this run's last start" in said, said
    assert open_run(run).manifest()["status"] == "done"


def test_resumed_from_another_folder(world: Any, untouched: Path, stopped: Path, tmp_path: Path, same: Any) -> None:
    """The job names its data and its reward function from the folder that it was started in."""
    run = world.copy("stopped", "elsewhere")
    child = Child(world.context, tmp_path, tmp_path / "log", ["resume", str(run)], {"OMP_NUM_THREADS": "1"})
    assert child.wait() == 0, child.text
    assert f"relative paths of the job start from {world.folder}, where it was started" in child.text
    assert same(untouched, run) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("point", ["save", "save_written", "save_sealed"])
def test_disk_full(world: Any, untouched: Path, point: str, note: Any, same: Any) -> None:
    """Fault 17. One line with the path and the room there is; the checkpoint before is intact."""
    name = f"full-{point}"
    child = world.start("ppo", world.job(name), fault=f"learner:{point}:step=5:full")
    code, last = child.wait(), child.text.splitlines()[-1]
    assert "bytes free" in last and "rlhf-ray resume " in last and last.endswith(f"runs/{name}"), child.text
    kept = open_run(world.run(name), verify=False).checkpoints()
    kept[-1].verify()
    assert (code, kept[-1].step) == (75, 4)
    assert not list((world.run(name) / "checkpoints").glob("*.tmp-*"))
    world.finish(name)
    note(17, same(untouched, world.run(name)), "exit 75, previous checkpoint intact, same weights and metrics")


def test_a_file_that_may_not_grow(world: Any, untouched: Path, note: Any, same: Any, until: Any) -> None:
    """Fault 17, as the kernel does it: from a moment on no file of the process may be as long as its optimizer's."""
    name = "limit"
    child = world.start("ppo", world.job(name), fault="learner:update:step=3:stop")
    run = world.run(name)
    until(lambda: " T " in Path(f"/proc/{child.pid}/stat").read_text())
    newest = open_run(run, verify=False).checkpoints()[-1]
    length = (newest.path / "optimizer.safetensors").stat().st_size
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (length - 1, length - 1))
    os.kill(child.pid, signal.SIGCONT)
    code, last = child.wait(), child.text.splitlines()[-1]
    assert "a checkpoint cannot be saved: File too large;" in last and last.endswith(f"runs/{name}"), child.text
    assert not list((run / "checkpoints").glob("*.tmp-*"))
    open_run(run, verify=False).checkpoints()[-1].verify()
    world.finish(name)
    note(17, code == 75 and same(untouched, run), "exit 75, previous checkpoint intact, same weights and metrics")


def test_the_best_adapter_is_kept_whatever_was_saved(world: Any, same: Any) -> None:
    """That of an evaluation, step 0 included; no checkpoint of that step need be left. Killed and resumed, it is the same."""
    fields = {"load_best_model_at_end": True, "eval_steps": 1, "learning_rate": 0.05}
    every = world.start("ppo", world.job("best", **fields, save_steps=1, save_total_limit=None))
    assert every.wait() == 0, every.text
    few = world.start("ppo", world.job("best-few", **fields, save_steps=4), fault="learner:update:step=7:kill")
    assert few.wait() != 0, few.text
    world.finish("best-few")
    assert same(world.run("best"), world.run("best-few"))
    rows = {
        r["step"]: r["eval/reward"] for r in read_metrics(world.run("best") / "metrics.jsonl") if "eval/reward" in r
    }
    best = max(rows, key=lambda step: (rows[step], -step))
    kept = {c.step: c.adapter_dir for c in open_run(world.run("best"), verify=False).checkpoints()}
    name = "adapter_model.safetensors"
    result = (world.run("best") / "adapter" / name).read_bytes()
    assert best < 10 and [step for step, path in kept.items() if (path / name).read_bytes() == result] == [best] * (
        best > 0
    )


def test_a_reward_that_is_gone_costs_no_step(world: Any, untouched: Path, same: Any) -> None:
    """The run ends with the step before saved, although no checkpoint was due."""
    (world.folder / "down.py").write_text(REWARD_THAT_FAILS)
    rewards = [{"name": "ascii", "function": "down.py:score"}]
    child = world.start("ppo", world.job("down", save_steps=100, rewards=rewards))
    code, run = child.wait(), world.run("down")
    assert code == 75 and "the reward service is down" in child.text.splitlines()[-1], child.text
    assert [c.step for c in open_run(run, verify=False).checkpoints()] == [3]
    (world.folder / "up").touch()
    world.finish("down")
    assert same(untouched, run)


def test_a_run_that_was_moved_goes_on_where_it_is(
    world: Any, untouched: Path, stopped: Path, tmp_path: Path, same: Any
) -> None:
    """Its data stay where the job was started, and another run may have its old name."""
    there = tmp_path / "runs" / "stopped"
    shutil.copytree(stopped, there)
    child = Child(world.context, tmp_path, tmp_path / "log", ["resume", "runs/stopped"], {"OMP_NUM_THREADS": "1"})
    assert child.wait() == 0 and "resuming from step 3 " in child.text, child.text
    assert same(untouched, there) and not (stopped / "summary.json").exists()


@pytest.fixture
def small_disk(world: Any, tmp_path: Path) -> Callable[..., list[str]]:
    """small_disk(size, command, ...) -> the lines of the commands, run beside a disk of that size (folder `small`) that nobody else
    sees; what is on it afterwards is in tmp_path."""

    def run(size: str, *commands: str) -> list[str]:
        place = world.folder / "small"
        place.mkdir(exist_ok=True)
        words = ["unshare", "-m" if os.geteuid() == 0 else "-Urm", "bash", "-c"]
        mount = f"mount -t tmpfs -o size={size} none {place}"
        if subprocess.run([*words, mount], capture_output=True).returncode:
            pytest.skip("nothing can be mounted here")
        script = "\n".join([mount, *commands, f"cp -r {place}/. {tmp_path}"])
        done = subprocess.run([*words, script], cwd=world.folder, capture_output=True, text=True, timeout=300)
        return (done.stdout + done.stderr).splitlines()

    return run


@pytest.mark.long
class TestSmallDisk:
    """Fault 17 on a real one."""

    def test_too_small_to_begin(self, world: Any, tmp_path: Path, small_disk: Any, note: Any) -> None:
        job = world.job("tight", output_dir="small/tight")
        (code, *rest) = small_disk("300k", f"{PROGRAM} ppo {job}; echo $?")
        (told,) = [line for line in rest if line.startswith("error: ")]
        assert told.startswith(f"error: output_dir: too little room for checkpoints in {world.folder}/small; expected ")
        assert "bytes for 3 checkpoints; got " in told and not list(tmp_path.iterdir())
        note(17, code == "3", "too small for three checkpoints: exit 3 before the first step")

    def test_full_on_the_way(
        self, world: Any, untouched: Path, tmp_path: Path, small_disk: Any, note: Any, same: Any
    ) -> None:
        job = world.job("filled", output_dir="small/filled", save_total_limit=None)
        more = f"mount -o remount,size=64m {world.folder}/small"
        (code, again, *rest) = small_disk(
            "900k", f"{PROGRAM} ppo {job}; echo $?", more, f"{PROGRAM} resume small/filled; echo $?"
        )
        told = [line for line in rest if line.startswith("error: ")]
        assert len(told) == 1 and "No space left on device" in told[0] and told[0].endswith("small/filled"), rest
        held = (code, again) == ("75", "0") and same(untouched, tmp_path / "filled")
        note(17, held, "exit 75, previous checkpoint intact, same weights and metrics")


class TestNotFinite:
    """Faults 6 and 20."""

    def test_one_gradient_is_left_out_and_counted(self, world: Any, note: Any) -> None:
        name = "one-nan"
        fault = "learner:gradient:step=3:nan"
        child = world.start("ppo", world.job(name, max_steps=4), fault=fault, marks=world.folder / "marks-nan")
        assert child.wait() == 0, child.text
        rows = [r for r in read_metrics(world.run(name) / "metrics.jsonl") if "policy/skipped_updates" in r]
        note(20, [r["policy/skipped_updates"] for r in rows] == [0.0, 0.0, 1.0, 0.0], "skipped and counted")

    @pytest.mark.parametrize("stage", [0, 2, pytest.param(3, marks=pytest.mark.long)])
    def test_a_first_step_that_is_left_out_whole(self, world: Any, stage: int, note: Any, same: Any) -> None:
        """Its checkpoint knows of no optimizer state, and the run goes on from it."""
        learner, nan = {"num_workers": 0, "num_threads": 1, "zero_stage": stage}, "learner:gradient:step=1:nan"
        plain = world.start("ppo", world.job(f"first-{stage}", max_steps=3, learner=learner), fault=nan)
        assert plain.wait() == 0, plain.text
        name = f"first-{stage}-killed"
        job = world.job(name, max_steps=3, learner=learner)
        child = world.start("ppo", job, fault=f"{nan},learner:update:step=2:kill")
        assert child.wait() == -signal.SIGKILL, child.text
        assert "resuming from step 1 " in world.finish(name)
        note(20, same(world.run(f"first-{stage}"), world.run(name)), "a first step left out: same weights and metrics")

    @pytest.mark.parametrize("stage", [0, 2])
    def test_three_in_a_row_stop_the_run(self, world: Any, stage: int, note: Any) -> None:
        name = f"nan-{stage}"
        learner = {"num_workers": 0, "num_threads": 1, "zero_stage": stage}
        job = world.job(name, num_ppo_epochs=2, learner=learner)
        child = world.start("ppo", job, fault="learner:gradient:step=3:nan")
        code, last = child.wait(), child.text.splitlines()[-1]
        assert last.startswith("error: step 3: 3 updates in a row had a gradient that is not finite"), child.text
        assert "the last checkpoint is step_000002" in last and last.endswith(f"rlhf-ray resume runs/{name}")
        note(20, code == 75, "three in a row: exit 75, last good named")

    def test_a_reward_that_is_not_finite_stops_the_step_before_anything_is_learned(
        self, world: Any, untouched: Path, note: Any, same: Any
    ) -> None:
        child = world.start("ppo", world.job("bad"), fault="scorer:score:step=4:nan")
        code, last = child.wait(), child.text.splitlines()[-1]
        assert "is not finite for 2 of 16 replies (first row 0)" in last and "step_000003" in last, child.text
        world.finish("bad")
        note(6, code == 75 and same(untouched, world.run("bad")), "over 5 %: exit 75, then same weights and metrics")


def test_logs_that_are_lost_do_not_stop_a_run(world: Any, untouched: Path, stopped: Path, note: Any, same: Any) -> None:
    """Fault 19. metrics.jsonl is gone, samples.jsonl cut: both are named, and the run goes on to the same weights."""
    run = world.copy("stopped", "no-logs")
    (run / "metrics.jsonl").unlink()
    cut(run / "samples.jsonl")
    said = world.finish("no-logs")
    for name in ("metrics", "samples"):
        assert f"{name}.jsonl: does not match its checkpoint; expected " in said, said
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl") if "reward/mean" in r] == [*range(4, 11)]
    weights = [(p / "adapter/adapter_model.safetensors").read_bytes() for p in (run, untouched)]
    note(19, weights[0] == weights[1], "logs lost: warning, same weights")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (
            "['good'] * len(completions)",
            "did not return a list of numbers; expected list[float]; got 'good' for reply 0",
        ),
        ("[1.0]", "returned the wrong number of rewards; expected 2; got 1"),
        ("completions[99]", "raised IndexError 3 times: list index out of range (broken-raises.py:2)"),
    ],
    ids=["text", "one", "raises"],
)
def test_a_reward_function_that_is_broken_is_mended_and_the_run_goes_on(
    world: Any, answer: str, says: str, note: Any, request: pytest.FixtureRequest
) -> None:
    """Fault 6. The line names the function; its last words are the command."""
    name = f"broken-{request.node.callspec.id}"
    source = "def score(prompts, completions):\n    return {}\n"
    (world.folder / f"{name}.py").write_text(source.format(answer))
    child = world.start("ppo", world.job(name, max_steps=2, rewards=[{"name": "my", "function": f"{name}.py:score"}]))
    code, last = child.wait(), child.text.splitlines()[-1]
    assert last == (
        f"error: reward my ({name}.py:score): {says}; fix: fix the function; then: rlhf-ray resume runs/{name}"
    ), child.text
    (world.folder / f"{name}.py").write_text(source.format("[len(c) for c in completions]"))
    world.finish(name)
    note(6, code == 75, "a broken function: exit 75, named, fixed, resumed")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_kl": 1e-6, "learning_rate": 0.05}, "kl/k1_per_response is beyond max_kl"),
        ({"max_clip_fraction": 1e-6, "learning_rate": 0.05}, "policy/clip_fraction is beyond max_clip_fraction"),
        ({"min_finished": 1.0}, "response/finished is beyond min_finished"),
    ],
    ids=["max_kl", "max_clip_fraction", "min_finished"],
)
def test_a_policy_that_runs_away_is_stopped(world: Any, changes: dict[str, Any], says: str, note: Any) -> None:
    """Fault 22. The checkpoint of that step is kept, and so is the reason."""
    (name,) = [n for n in changes if n.startswith("m")]
    child = world.start("ppo", world.job(name, **changes))
    code, last = child.wait(), child.text.splitlines()[-1]
    assert says in last, child.text
    kept = open_run(world.run(name), verify=False).checkpoints()[-1]
    assert f"the last checkpoint is {kept.path.name}" in last and last.startswith(f"error: step {kept.step}: ")
    note(22, code == 75, "exit 75 with figure and limit, checkpoint kept")


def test_two_runs_on_one_folder(world: Any, untouched: Path, note: Any, same: Any, until: Any) -> None:
    """Fault 28. The second says who holds the run; a dead holder holds nothing."""
    child = world.start("ppo", world.job("shared"), fault="learner:update:step=4:stop")
    log = world.run("shared") / "metrics.jsonl"
    until(lambda: log.exists() and len(read_metrics(log)) >= 4)
    started = time.monotonic()
    second = world.start("ppo", world.job("shared"))
    code = second.wait()
    assert "already holds a run" in second.text and code == 2, second.text
    third = world.start("resume", "runs/shared")
    code = third.wait()
    last, waited = third.text.splitlines()[-1], time.monotonic() - started
    assert f"pid {child.pid}" in last and "host " in last and waited >= 30, third.text
    child.process.kill()
    child.wait()
    world.finish("shared")
    note(28, code == 2 and same(untouched, world.run("shared")), "exit 2 naming host and pid after 30 s")
