"""SFT and reward runs that are stopped or killed go on to the run that nobody touched; no item of their checkpoints is in vain."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.metrics import read_metrics
from rlhf_ray.storage.run_folder import describe_files, open_run

from .dropping import Drop, state, tensors

pytestmark = pytest.mark.integration
STAGES = ("sft", "reward")
STEPS = 10
FIELDS: dict[str, Any] = {
    "template": "none",
    "learner": {"num_workers": 0, "num_threads": 1},
    "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
    "max_length": 64,
    "train_batch_size": 16,
    "per_device_train_batch_size": 8,
    "max_steps": STEPS,
    "eval_steps": 4,
    "logging_steps": 3,  # so that most checkpoints lie between two logged steps
    "save_steps": 1,
    "learning_rate": 1e-2,
    "load_best_model_at_end": True,
    "report_to": [],
}


@pytest.fixture(scope="module")
def world(make_world: Any, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path]) -> Any:
    """Jobs of both stages in one process: dropout, a loss that is summed over steps, epochs of five steps, the best step kept."""
    folder = tmp_path_factory.mktemp("supervised")
    pairs = [(f"Say {i % 10} {i}.", "abcdefghij"[i % 10] * (1 + i % 4)) for i in range(90)]
    sft = [{"instruction": asked, "input": "", "output": response} for asked, response in pairs]
    reward = [{"prompt": asked, "chosen": response, "rejected": response[::-1] + "?!"} for asked, response in pairs]
    for name, rows in (("sft", sft), ("reward", reward)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return make_world(folder, {**FIELDS, "model_name_or_path": str(tiny_llama())})


def job(world: Any, stage: str, name: str, **changes: Any) -> list[str]:
    """The command that runs the stage into runs/NAME."""
    return [stage, world.job(name, data={"train": f"{stage}.jsonl", "held_out_fraction": 0.1}, **changes)]


@pytest.fixture(scope="module")
def untouched(world: Any) -> dict[str, Path]:
    """The runs of ten steps that nobody touched, by stage."""
    for stage in STAGES:
        child = world.start(*job(world, stage, f"{stage}-untouched"))
        assert child.wait() == 0, child.text
    return {stage: world.run(f"{stage}-untouched") for stage in STAGES}


def newest(run: Path) -> int:
    kept = open_run(run, verify=False).checkpoints()
    return kept[-1].step if kept else 0


def some(*short: tuple[str, int]) -> list[Any]:
    """Every step of both stages; those that are not `short` are left to the long run."""
    every = [(stage, step) for stage in STAGES for step in range(1, STEPS)]
    return [pytest.param(*pair, marks=() if pair in short else pytest.mark.long) for pair in every]


@pytest.mark.parametrize(("stage", "step"), some(("sft", 4), ("reward", 5)))
def test_sigterm_in_every_step(
    world: Any, untouched: dict[str, Path], stage: str, step: int, note: Any, same: Any
) -> None:
    """Fault 11. The step is finished and saved, although no checkpoint was due; 75 comes with the command that goes on."""
    name = f"{stage}-term-{step}"
    argv = job(world, stage, name, save_steps=100)
    child = world.start(*argv, fault=f"learner:update:step={step}:term", marks=world.folder / f"marks-{name}")
    code, last = child.wait(), child.text.splitlines()[-1]
    assert last == f"error: runs/{name}: SIGTERM; step {step} is saved; fix: rlhf-ray resume runs/{name}", child.text
    assert newest(world.run(name)) == step
    said = world.finish(name)
    assert f"{stage}: resuming from step {step} " in said
    note(11, code == 75 and same(untouched[stage], world.run(name)), "exit 75, no step lost, same weights and metrics")


@pytest.mark.parametrize(
    ("stage", "seed"),
    [pytest.param(s, n, marks=() if (s, n) == ("reward", 0) else pytest.mark.long) for s in STAGES for n in range(5)],
)
def test_killed_at_random(world: Any, untouched: dict[str, Path], stage: str, seed: int, note: Any, same: Any) -> None:
    """Fault 10: kill -9 at any moment, `resume` in the next."""
    name = f"{stage}-kill-{seed}"
    world.kill(job(world, stage, name, save_steps=2), name, random.Random(seed).uniform(0.0, 1.5))
    world.finish(name)
    note(10, same(untouched[stage], world.run(name)), "same weights and metrics")


class TestNumbersThatAreNotFinite:
    """Fault 20."""

    @pytest.mark.parametrize("stage", STAGES)
    def test_one_gradient_is_left_out_and_counted(self, world: Any, stage: str, note: Any, same: Any) -> None:
        """The very first update, before there is any optimizer state, and a later one; and the same in a run that is killed beside
        them, and goes on from checkpoints between two logged steps."""
        nan = "learner:gradient:step=1:nan,learner:gradient:step=5:nan"
        plain = world.start(*job(world, stage, f"{stage}-nan", save_total_limit=None), fault=nan)
        assert plain.wait() == 0, plain.text
        run = world.run(f"{stage}-nan")
        counts = {r["step"]: r["skipped_updates"] for r in read_metrics(run / "metrics.jsonl") if "epoch" in r}
        assert counts == {1: 1, 3: 0, 6: 1, 9: 0, 10: 0}
        for kill in (2, 6):
            name = f"{stage}-nan-killed-{kill}"
            child = world.start(*job(world, stage, name), fault=f"{nan},learner:update:step={kill}:kill")
            assert child.wait() == -signal.SIGKILL, child.text
            child = world.start("resume", f"runs/{name}", fault=nan)
            assert child.wait() == 0, child.text
            assert f"resuming from step {kill - 1} " in child.text
            note(20, same(run, world.run(name)), "skipped and counted; killed beside it: same weights and metrics")

    @pytest.mark.parametrize("stage", STAGES)
    def test_three_in_a_row_stop_the_run(self, world: Any, stage: str, note: Any) -> None:
        name = f"{stage}-nan-thrice"
        fault = ",".join(f"learner:gradient:step={n}:nan" for n in (4, 5, 6))
        child = world.start(*job(world, stage, name, save_steps=3), fault=fault)
        code, last = child.wait(), child.text.splitlines()[-1]
        assert last.startswith("error: step 6: 3 updates in a row had a gradient that is not finite"), child.text
        assert "the last checkpoint is step_000003" in last and last.endswith(f"rlhf-ray resume runs/{name}")
        note(20, code == 75, "three in a row: exit 75, last good named")
        world.finish(name)

    @pytest.mark.long
    def test_one_rank_is_enough(self, world: Any, note: Any, same: Any) -> None:
        """What one of two ranks meets, both leave out."""
        two = {"learner": {"num_workers": 2, "num_threads": 1}}
        child = world.start(*job(world, "sft", "sft-two-nan", **two), fault="learner:gradient:step=4:rank=1:nan")
        assert child.wait(600) == 0, child.text
        rows = read_metrics(world.run("sft-two-nan") / "metrics.jsonl")
        counts = [r["skipped_updates"] for r in rows if "epoch" in r]
        note(20, counts == [0, 0, 1, 0, 0], "one of two ranks: skipped and counted")


@pytest.mark.parametrize("point", ["save_written", "save_sealed", "save_renamed"])
@pytest.mark.parametrize("stage", [pytest.param("sft", marks=pytest.mark.long), "reward"])
def test_killed_in_a_save(world: Any, untouched: dict[str, Path], stage: str, point: str, note: Any, same: Any) -> None:
    """Fault 18."""
    name = f"{stage}-{point}"
    child = world.start(*job(world, stage, name), fault=f"learner:{point}:step=7:kill")
    assert child.wait() == -signal.SIGKILL, child.text
    world.finish(name)
    note(18, same(untouched[stage], world.run(name)), "same weights and metrics")


@pytest.fixture(scope="module")
def stopped(world: Any) -> dict[str, Path]:
    """Runs that were killed in their eighth step: seven checkpoints, the last one between two logged steps."""
    for stage in STAGES:
        child = world.start(
            *job(world, stage, f"{stage}-stopped", save_total_limit=None), fault="learner:update:step=8:kill"
        )
        assert child.wait() == -signal.SIGKILL, child.text
    return {stage: world.run(f"{stage}-stopped") for stage in STAGES}


def window(checkpoint: Path) -> None:
    path = checkpoint / "state.json"
    values = json.loads(path.read_text())
    (found,) = values["windows"]
    assert found["loss"] and found["items"], "nothing would be lost"
    fresh = {**found, "loss": 0.0, "items": 0.0, "sums": {}}
    path.write_text(json.dumps({**values, "windows": [fresh]}))


def epoch(checkpoint: Path) -> None:
    path = checkpoint / "trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "global_step": 2}))


ITEMS: dict[str, Drop] = {
    "nothing": lambda checkpoint: None,
    "adapter": tensors("adapter/adapter_model.safetensors", "lora_B"),
    "head": tensors("adapter/adapter_model.safetensors", "score"),
    "mean of gradients": tensors("optimizer.safetensors", "::exp_avg"),
    "mean of squared gradients": tensors("optimizer.safetensors", "::exp_avg_sq"),
    "optimizer step": tensors("optimizer.safetensors", "::step"),
    "Trainer's step": epoch,
    "sums since the last logged step": window,
    "length of metrics.jsonl": state(metrics_bytes=0),
    "first values": state(first={}),
    "tokens": state(task={"trained_tokens": 0.0}),
}
ONE_STAGE = {"head": "reward", "tokens": "sft"}


@pytest.mark.parametrize(
    "item", [pytest.param(i, marks=() if i in ("nothing", "head") else pytest.mark.long) for i in ITEMS]
)
@pytest.mark.parametrize("stage", STAGES)
def test_a_dropped_item_is_missed(
    world: Any, untouched: dict[str, Path], stopped: dict[str, Path], stage: str, item: str, same: Any
) -> None:
    """Each but the first makes another run of it."""
    if ONE_STAGE.get(item, stage) != stage:
        pytest.skip(f"a {stage} run has none")
    name = f"{stage}-without-{item.replace(' ', '-')}"
    run = world.copy(f"{stage}-stopped", name)
    drop_from_newest(run, ITEMS[item])
    child = world.start("resume", f"runs/{name}")
    code = child.wait()
    assert code in (0, 5), child.text
    assert (code == 0 and same(untouched[stage], run)) == (item == "nothing"), child.text


def drop_from_newest(run: Path, drop: Drop) -> None:
    """Under a manifest that says all is well."""
    checkpoint = max((run / "checkpoints").glob("step_*"))
    drop(checkpoint)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    files = describe_files(checkpoint, skip=("manifest.json",))
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "files": files}))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("stage", [pytest.param("sft", marks=pytest.mark.long), "reward"])
def test_a_damaged_checkpoint_is_passed_over(
    world: Any, untouched: dict[str, Path], stopped: dict[str, Path], stage: str, note: Any, same: Any
) -> None:
    """Fault 19. Steps 7, 6 and 5 each lose a file in another way; if none is left nothing starts afresh."""
    name = f"{stage}-damaged"
    run = world.copy(f"{stage}-stopped", name)
    broken = [
        run / "checkpoints" / f"step_00000{n}" / f
        for n, f in zip((7, 6, 5), ("optimizer.safetensors", "state.json", "trainer_state.json"))
    ]
    for path, damage in zip(broken, (flip, Path.unlink, lambda p: p.write_bytes(p.read_bytes()[:-1]))):
        damage(path)
    said = world.finish(name)
    assert all(any("not usable" in line and str(path) in line for line in said.splitlines()) for path in broken), said
    assert f"{stage}: resuming from step 4 " in said
    note(19, same(untouched[stage], run), "older checkpoint used, files named, same weights and metrics")
    run = world.copy(f"{stage}-stopped", f"{name}-all")
    for checkpoint in open_run(run, verify=False).checkpoints():
        flip(checkpoint.path / "optimizer.safetensors")
    child = world.start("resume", f"runs/{name}-all")
    code = child.wait()
    assert "no valid checkpoint is left" in child.text, child.text
    note(19, code == 5, "none left: exit 5")


@pytest.mark.parametrize("stage", ["sft", pytest.param("reward", marks=pytest.mark.long)])
def test_what_changed_meanwhile_is_refused(world: Any, stopped: dict[str, Path], stage: str) -> None:
    """Other settings (exit 2), data (exit 4) or base (exit 5) would make a third run; where and how often may change."""
    name = f"{stage}-changed"
    run = world.copy(f"{stage}-stopped", name)
    child = world.start(*job(world, stage, name, resume="auto", learning_rate=2e-2, save_total_limit=None))
    assert child.wait() == 2 and "learning_rate" in child.text and "expected 0.01; got 0.02" in child.text, child.text

    data = world.folder / f"{stage}.jsonl"
    before = data.read_bytes()
    data.write_bytes(before.replace(b"Say 3", b"Say 4"))
    child = world.start("resume", f"runs/{name}")
    assert child.wait() == 4 and "data sha256 differs" in child.text and "--reset-data" in child.text, child.text
    data.write_bytes(before)

    path = run / "manifest.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "base": {**whole["base"], "weights_sha256": "0" * 64}}))
    child = world.start("resume", f"runs/{name}")
    assert child.wait() == 5 and "the base is not the one that this run was started with" in child.text, child.text
    path.write_text(json.dumps(whole))

    child = world.start(
        *job(world, stage, name, resume="auto", save_steps=5, per_device_train_batch_size=4, logging_steps=1)
    )
    assert child.wait() == 0 and "resuming from step 7 " in child.text, child.text
    steps = [row["step"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    assert steps == [1, 3, 6, 8, 9, 10]


def test_a_checkpoint_of_an_older_version_starts_over_and_says_so(
    world: Any, untouched: dict[str, Path], stopped: dict[str, Path], note: Any, same: Any
) -> None:
    """Fault 29. It held the adapter alone."""
    run = world.copy("sft-stopped", "sft-older")

    def adapter_alone(checkpoint: Path) -> None:
        for file in ("state.json", "trainer_state.json", "optimizer.safetensors"):
            (checkpoint / file).unlink()

    drop_from_newest(run, adapter_alone)
    said = world.finish("sft-older")
    assert "checkpoints contain only the adapter; the run starts again from the beginning" in said
    note(29, same(untouched["sft"], run), "older SFT checkpoint: starts over, says so")


def test_a_worker_of_ray_that_is_killed(world: Any, untouched: dict[str, Path], note: Any, same: Any) -> None:
    """Fault 7: Ray Train starts it again, and it goes on from its newest checkpoint to the bits of one process."""
    one = {"learner": {"num_workers": 1, "num_threads": 1}}
    child = world.start(
        *job(world, "reward", "reward-ray", **one),
        fault="learner:update:step=6:kill", marks=world.folder / "marks-ray",
    )  # fmt: skip
    assert child.wait(600) == 0, child.text
    assert "the learner group was lost; start 2" in child.text and "resuming from step 5 " in child.text
    note(7, same(untouched["reward"], world.run("reward-ray")), "started again by itself, same weights and metrics")


@pytest.mark.long
def test_two_ranks_go_on(world: Any, note: Any, same: Any) -> None:
    """Fault 7 with gradients and sums that are spread over ranks."""
    two = {"learner": {"num_workers": 2, "num_threads": 1}}
    plain = world.start(*job(world, "sft", "sft-two", **two))
    assert plain.wait(600) == 0, plain.text
    fault = "learner:update:step=6:rank=1:kill"
    child = world.start(*job(world, "sft", "sft-two-killed", **two), fault=fault, marks=world.folder / "marks-two")
    assert child.wait(600) == 0, child.text
    assert "resuming from step 5 " in child.text, child.text
    note(7, same(world.run("sft-two"), world.run("sft-two-killed")), "two ranks: same weights and metrics")


@pytest.mark.parametrize(
    ("stage", "call"),
    [pytest.param("sft", 3, marks=pytest.mark.long), ("reward", 8), pytest.param("ppo", 12, marks=pytest.mark.long)],
)
def test_a_pipeline_goes_on_inside_the_stage_that_was_stopped(
    world: Any, stage: str, call: int, note: Any, same: Any
) -> None:
    """Faults 10 and 11. SFT and reward take five steps each, PPO three; the n-th update of the process belongs to `stage`."""
    learning = {
        "max_steps": 5,
        "train_batch_size": 16,
        "per_device_train_batch_size": 16,
        "max_length": 64,
        "learning_rate": 1e-2,
    }
    fields = {
        **{k: world.fields[k] for k in ("model_name_or_path", "template", "learner", "report_to")},
        "stages": ["sft", "reward", "ppo"],
        "sft": {**learning, "data": {"train": "sft.jsonl", "held_out_fraction": 0.1}, "lora": {"r": 4, "lora_alpha": 8}},
        "reward": {**learning, "data": {"train": "reward.jsonl", "held_out_fraction": 0.1}},
        "ppo": {"data": {"train": "sft.jsonl", "eval_max_rows": 4}, "rollout_batch_size": 8, "rollout_chunk_size": 8,
                "num_mini_batches": 1, "num_ppo_epochs": 1, "response_length": 4, "max_steps": 3, "save_steps": 1,
                "allow_chance_rewards": True},
    }  # fmt: skip
    runs = {}
    for name, fault in (("plain", ""), ("killed", f"learner:update:call={call}:term")):
        folder = f"chain-{stage}-{name}"
        path = world.folder / f"{folder}.yaml"
        path.write_text(json.dumps({**fields, "output_dir": f"runs/{folder}"}))
        child = world.start("pipeline", path.name, fault=fault)
        code = child.wait(300)
        if fault:
            last = child.text.splitlines()[-1]
            assert code == 75 and last.endswith(f"is saved; fix: rlhf-ray resume runs/{folder}"), child.text
            said = world.finish(folder)
            assert f"{stage}: resuming from step " in said, said
        else:
            assert code == 0, child.text
        runs[name] = world.run(folder)
    held = all(same(runs["plain"] / part, runs["killed"] / part) for part in ("sft", "reward", "ppo"))
    note(11, held, "a pipeline inside a stage: exit 75, resumes there, same weights and metrics")
