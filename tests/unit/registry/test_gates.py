"""What keeps an adapter out of the registry, how it reads, and what overrides it."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.registry import Registry
from rlhf_ray.storage.run_folder import RunFolder, create_run

Make = Callable[..., RunFolder]
SFT = [{"step": 0, "eval/loss": 3.0}, {"step": 5, "loss": 2.0, "eval/loss": 2.0}, {"step": 10, "eval/loss": 1.5}]


def lines_of(registry: Registry, source: Any, **options: Any) -> dict[str, str]:
    """Gate -> its line, of a promotion that is refused or not."""
    lines: list[str] = []
    with contextlib.suppress(ConfigError):
        registry.promote(str(source), "helper", log=lines.append, **options)
    return {line.split()[1]: " ".join(line.split()[2:]) for line in lines}


def refusal(registry: Registry, source: Any, **options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        registry.promote(str(source), "helper", **options)
    assert not (registry.path / "aliases" / "helper.json").exists()
    return str(error.value)


def test_a_policy_that_improved(registry: Registry, make_run: Make) -> None:
    lines = lines_of(registry, make_run("run").path)
    assert lines["kl"] == "passed: 2.50 nats per reply; at most 10 (default)"
    assert lines["reward"].startswith(
        "passed: eval/reward 0.300 -> 0.700, gain 0.400 = 14.1 standard errors; more than 2"
    )
    assert lines["integrity"].startswith("passed: 4 tensors, sha256 ")
    assert lines["base"] == "passed: /models/tiny (74696e797469); first version of this name"


@pytest.mark.parametrize(
    ("final", "options", "message"),
    [
        (
            (0.7, 0.02, 10.5),
            {},
            "gate kl: failed; expected at most 10 (default); got 10.5 nats per reply; fix: another step or",
        ),
        ((0.7, 0.02, 2.5), {"max_kl": 2.0}, "gate kl: failed; expected at most 2 (--max-kl); got 2.50"),
        ((0.7, 0.02, None), {}, "gate kl: failed; expected at most 10 (default); got nan"),
        (
            (0.35, 0.02, 1.0),
            {},
            "gate reward: failed; expected more than 2 standard errors above its start; got eval/reward 0.300",
        ),
        ((0.2, 0.02, 1.0), {}, "gain -0.100 = -3.54 standard errors"),
        ((None, 0.02, 1.0), {}, "gate reward: failed"),
        ((0.7, None, 1.0), {}, "of too few prompts for a standard error"),
        (
            (0.7, 0.02, 1.0),
            {"min_reward": 0.8},
            "gate reward: failed; expected at least 0.8 (--min-reward); got eval/reward 0.700",
        ),
    ],
)
def test_a_policy_that_did_not(registry: Registry, make_run: Make, final: Any, options: Any, message: str) -> None:
    """None: not finite, as JSON tells it."""
    told = refusal(registry, make_run("run", evals=((0, 0.3, 0.02, 0.0), (10, *final))).path, **options)
    assert message in told and '--force --reason "..."' in told


def test_a_policy_is_judged_by_the_reward_that_watches(registry: Registry, make_run: Make) -> None:
    """What it maximised went up, what watched went down."""
    kl = {"eval/kl_k1_per_response": 2.0}
    rows = [
        {
            "step": step,
            "eval/reward": up,
            "eval/reward_se": 0.02,
            "eval/reward/gold": down,
            "eval/reward_se/gold": 0.02,
            **kl,
        }
        for step, up, down in ((0, 0.3, 0.6), (10, 0.7, 0.4))
    ]
    told = refusal(registry, make_run("run", rows=rows, watch="gold").path)
    assert "gate reward: failed" in told and "eval/reward/gold 0.600 -> 0.400" in told
    assert lines_of(registry, make_run("other", rows=rows).path)["reward"].startswith("passed: eval/reward 0.300")


def test_all_failures_are_told_at_once(registry: Registry, make_run: Make) -> None:
    told = refusal(registry, make_run("run", evals=((0, 0.3, 0.02, 0.0), (10, 0.3, 0.02, 30.0))).path)
    assert [line.split(":")[0] for line in told.splitlines()] == ["gate kl", "gate reward"]


def test_the_limits_can_be_set(registry: Registry, make_run: Make) -> None:
    run = make_run("run", evals=((0, 0.3, 0.02, 0.0), (10, 0.31, 0.02, 30.0)))
    done = registry.promote(str(run.path), "helper", max_kl=30.0, min_reward=0.31)
    assert done.entry.manifest["forced"] is None
    assert {g["gate"]: g["limit"] for g in done.entry.manifest["gates"]}["kl"] == "at most 30 (--max-kl)"


def test_force_is_recorded(registry: Registry, make_run: Make) -> None:
    run = make_run("run", evals=((0, 0.3, 0.02, 0.0), (10, 0.3, 0.02, 30.0)))
    entry = registry.promote(str(run.path), "helper", force=True, reason="a demonstration").entry
    forced = entry.manifest["forced"]
    assert (
        (forced["gates"], forced["reason"]) == (["kl", "reward"], "a demonstration") and forced["by"] and forced["when"]
    )
    assert {g["gate"]: g["status"] for g in entry.manifest["gates"]}["kl"] == "failed"
    assert registry.history("helper")[0]["forced"] == ["kl", "reward"]


def test_force_without_a_failure_is_no_force(registry: Registry, make_run: Make) -> None:
    entry = registry.promote(str(make_run("run").path), "helper", force=True, reason="to be sure").entry
    assert entry.manifest["forced"] is None and registry.history("helper")[0]["forced"] == []


def test_what_was_not_measured_does_not_pass(registry: Registry, make_run: Make) -> None:
    told = refusal(registry, make_run("blind", rows=[{"step": 10, "reward/mean": 1.0}]).path)
    assert told.count("not measured at step 10: nothing was held out") == 2
    rows = [
        {"step": s, "eval/reward": 0.1 * s, "eval/reward_se": 0.01, "eval/kl_k1_per_response": 0.1} for s in (0, 10)
    ]
    told = refusal(registry, make_run("halfway", rows=rows).path, step=5)
    assert "not measured at step 5: held-out prompts were tried at steps 0, 10" in told


def test_mid_training_is_not_the_start(registry: Registry, make_run: Make) -> None:
    """With `eval_on_start: false` the first evaluation is of a policy that was trained already."""
    evals = ((5, 0.2, 0.02, 1.5), (10, 0.7, 0.02, 2.5))
    told = refusal(registry, make_run("run", evals=evals, eval_on_start=False).path)
    assert "gate reward: failed" in told and "got eval/reward 0.700, not measured before training" in told
    sft = refusal(registry, make_run("sft", stage="sft", rows=SFT[1:]).path)
    assert "gate loss: failed" in sft and "got held-out loss 1.50, not measured before training" in sft


def test_a_step_has_its_own_figures(registry: Registry, make_run: Make) -> None:
    run = make_run("run")
    for source, step in ((f"{run.path}@5", None), (str(run.path), 5)):
        done = registry.promote(source, "helper", step=step)
        assert (
            done.entry.manifest["source"]["step"] == 5 and done.entry.manifest["metrics"]["after"]["eval/reward"] == 0.6
        )
    assert done.entry.sha256 != registry.promote(str(run.path), "helper").entry.sha256
    with pytest.raises(ConfigError, match="names another step; expected 5; got 10"):
        registry.promote(f"{run.path}@5", "helper", step=10)
    with pytest.raises(ArtifactError, match="no checkpoint of step 7; expected one of 5, 10"):
        registry.promote(f"{run.path}@7", "helper")


def test_the_best_step_has_its_own_figures(registry: Registry, make_run: Make) -> None:
    """With load_best_model_at_end the result is the adapter of an earlier step than the last."""
    done = registry.promote(str(make_run("run", load_best_model_at_end=True).path), "helper")
    assert done.entry.manifest["source"]["step"] == 5 and done.entry.manifest["metrics"]["after"]["eval/reward"] == 0.6


def test_an_sft_run(registry: Registry, make_run: Make) -> None:
    run = make_run("sft", stage="sft", rows=SFT)
    lines = lines_of(registry, run.path)
    assert lines["kl"] == lines["reward"] == "not applicable: an SFT adapter is itself the reference"
    assert lines["loss"] == "passed: held-out loss 3.00 -> 1.50 nats per token; below its start"
    assert registry.resolve("helper").kind == "sft"
    for option in ("max_kl", "min_reward"):
        with pytest.raises(ConfigError, match="has no meaning for a run of stage sft"):
            registry.promote(str(run.path), "other", **{option: 1.0})


def test_an_sft_run_that_learned_nothing(registry: Registry, make_run: Make) -> None:
    run = make_run("sft", stage="sft", rows=[SFT[0], {"step": 10, "eval/loss": 3.1}])
    assert "gate loss: failed; expected below its start; got held-out loss 3.00 -> 3.10" in refusal(registry, run.path)


@pytest.mark.parametrize(("low", "passes"), [(0.55, True), (0.5, False), (0.4, False)])
def test_a_reward_run(registry: Registry, make_run: Make, low: float, passes: bool) -> None:
    run = make_run("reward", stage="reward", rows=[{"step": 10, "eval/accuracy": 0.6, "eval/accuracy_low": low}])
    run.update_manifest(
        reward={"add_eos_token": True, "fixture": [{"input_ids": [1], "score": 0.5}], "held_out_scores": {}}
    )
    lines = lines_of(registry, run.path)
    assert lines["accuracy"].startswith("passed" if passes else "failed")
    assert lines["kl"] == "not applicable: a reward model samples nothing"
    if passes:
        entry = registry.resolve("helper")
        assert entry.kind == "reward" and entry.manifest["reward"]["fixture"][0]["score"] == 0.5
        at_step = registry.promote(f"{run.path}@10", "other").entry
        assert at_step.manifest["reward"] == {"add_eos_token": True}


# ---------------------------------------------------------------- sweeps


@pytest.fixture
def make_sweep(make_run: Make, tmp_path: Path) -> Callable[..., RunFolder]:
    """A sweep of two trials, c1 and c2, of which c2 won."""

    def make(name: str, choice: Any = "c2", status: str = "done", rows: Any = None, **config: Any) -> RunFolder:
        sweep = create_run(tmp_path / name, "sweep", {"seed": 0, **config}, "never")
        for seed, trial in enumerate(("c1", "c2")):
            make_run(f"{name}/trials/{trial}", seed=seed, rows=rows)
        told = {"rule": "highest mean eval/reward", "setting": None}
        if choice is not None:
            told = {**told, "setting": choice, "run_dir": f"trials/{choice}"}
        (sweep.path / "sweep.json").write_text(json.dumps({"schema": 1, "metric": "eval/reward", "choice": told}))
        if status == "done":
            sweep.seal(("config.yaml", "sweep.json"))
        return sweep

    return make


def test_a_sweep_gives_its_winner_under_its_cap(registry: Registry, make_sweep: Callable[..., RunFolder]) -> None:
    sweep = make_sweep("sweep", kl_cap=3.0)
    entry = registry.promote(str(sweep.path), "helper").entry
    source = entry.manifest["source"]
    assert source["run_dir"] == str(sweep.path / "trials" / "c2") and source["sweep"]["choice"]["setting"] == "c2"
    assert {g["gate"]: g["limit"] for g in entry.manifest["gates"]}["kl"] == "at most 3 (kl_cap of the sweep)"
    tight = make_sweep("tight", kl_cap=2.0)
    with pytest.raises(ConfigError, match="gate kl: failed; expected at most 2 "):
        registry.promote(str(tight.path), "tight")
    assert registry.promote(str(tight.path), "tight", max_kl=4.0).is_new


def confirmed(step: int, reward: float, kl: float) -> dict[str, float]:
    """An evaluation by which the adapter is good, with what the prompts that chose nothing say."""
    chose = {"eval/reward": 0.3 + 0.04 * step, "eval/reward_se": 0.02, "eval/kl_k1_per_response": 0.25 * step}
    apart = {"reward": reward, "reward_se": 0.02, "kl_k1_per_response": kl}
    return {"step": step, **chose, **{f"eval/confirm/{name}": value for name, value in apart.items()}}


@pytest.mark.parametrize(
    ("reward", "kl", "failed", "line"),
    [
        (0.34, 2.0, ["reward"], "failed: eval/confirm/reward 0.300 -> 0.340, gain 0.040 = 1.41 standard errors"),
        (
            0.50,
            9.0,
            ["kl"],
            "failed: 9.00 nats per reply on prompts that chose nothing; at most 5 (kl_cap of the sweep)",
        ),
        (0.50, 2.0, [], "passed: eval/confirm/reward 0.300 -> 0.500, gain 0.200 = 7.07 standard errors"),
    ],
)
def test_a_winner_is_judged_where_nothing_was_chosen(
    registry: Registry, make_sweep: Callable[..., RunFolder], reward: float, kl: float, failed: list[str], line: str
) -> None:
    """By the prompts that chose it, it went from 0.3 to 0.7 at 2.5 nats."""
    sweep = make_sweep("sweep", rows=[confirmed(0, 0.3, 0.0), confirmed(10, reward, kl)], kl_cap=5.0)
    lines = lines_of(registry, sweep.path)
    assert [gate for gate, told in lines.items() if told.startswith("failed")] == failed
    assert any(told.startswith(line) for told in lines.values()), lines


def test_a_winner_of_a_sweep_that_set_no_prompts_apart(
    registry: Registry, make_sweep: Callable[..., RunFolder]
) -> None:
    lines = lines_of(registry, make_sweep("sweep").path)
    assert lines["reward"].startswith(
        "passed: eval/reward 0.300 -> 0.700, gain 0.400 on the prompts that chose it = 14.1"
    )


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"choice": None}, ConfigError, "the sweep has no winner by highest mean eval/reward"),
        ({"status": "running"}, ConfigError, "the sweep has not finished"),
        ({"choice": "../../etc"}, ArtifactError, "choice.run_dir is not a trial"),
        ({"choice": "c3"}, ConfigError, "no such folder"),
    ],
)
def test_a_sweep_without_a_winner(
    registry: Registry, make_sweep: Callable[..., RunFolder], options: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        registry.promote(str(make_sweep("sweep", **options).path), "helper")


# ---------------------------------------------------------------- what cannot be forced


def spoil_weights(run: RunFolder) -> None:
    path = run.adapter_dir / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def poison(run: RunFolder) -> None:
    path = run.adapter_dir / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    run.seal()


def no_target(run: RunFolder) -> None:
    path = run.adapter_dir / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": []}))
    run.seal()


def forget(**values: Any) -> Callable[[RunFolder], None]:
    return lambda run: run.update_manifest(**values)


def another_template(run: RunFolder) -> None:
    run.update_manifest(template={"name": "alpaca_short", "sha256": "0" * 64})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_weights, "file has changed"),
        (poison, "holds values that are not finite"),
        (no_target, "a list of module names"),
        (lambda run: (run.adapter_dir / "adapter_model.safetensors").unlink(), "file is missing"),
        (forget(base=None), "base.weights_sha256 is not recorded: the adapter could not be matched to its base"),
        (forget(tokenizer_sha256=None), "tokenizer_sha256 is not recorded"),
        (forget(template=None), "template.sha256 is not recorded"),
        (another_template, "is not the prompt template of this run any more"),
    ],
)
def test_damage_is_never_forced(
    registry: Registry, make_run: Make, spoil: Callable[[RunFolder], Any], message: str
) -> None:
    run = make_run("run")
    spoil(run)
    with pytest.raises(ArtifactError, match=message):
        registry.promote(str(run.path), "helper", force=True, reason="please")
    assert not registry.path.exists()


def test_an_adapter_that_does_nothing(registry: Registry, make_run: Make) -> None:
    with pytest.raises(ArtifactError, match="every lora_B is zero: the adapter does nothing"):
        registry.promote(str(make_run("run", zero_b=True).path), "helper", force=True, reason="please")


def test_a_run_that_stored_no_template_text(registry: Registry, make_run: Make) -> None:
    """The shipped templates, and a file that is still the same, are found again by their hash."""
    run = make_run("run")
    told = run.manifest()["template"]
    run.update_manifest(template={"name": told["name"], "sha256": told["sha256"]})
    assert registry.promote(str(run.path), "helper").entry.manifest["template"] == told


def test_what_has_no_adapter(registry: Registry, make_run: Make, tmp_path: Path) -> None:
    running = make_run("running", done=False)
    chain = create_run(tmp_path / "chain", "pipeline", {"seed": 0}, "never")
    make_run("chain/ppo")
    (tmp_path / "empty").mkdir()
    for source, kind, message in (
        (
            running.path,
            ConfigError,
            "the run has not finished; expected a finished run, or a step; fix: rlhf-ray resume .*5, 10",
        ),
        (chain.path, ConfigError, "a run of stage pipeline has no adapter; .*fix: give one of its runs: .*chain/ppo"),
        (tmp_path / "nowhere", ConfigError, "no such folder; expected a run folder"),
        (tmp_path / "empty", ArtifactError, "is not a run"),
    ):
        with pytest.raises(kind, match=message):
            registry.promote(str(source), "helper")
    assert registry.promote(f"{running.path}@10", "helper").is_new


# ---------------------------------------------------------------- lineage


def test_lineage_goes_back_to_the_base(registry: Registry, make_run: Make) -> None:
    def parent(role: str, run: RunFolder, sha256: str | None = None) -> dict[str, str]:
        from rlhf_ray.models.adapter_files import read_adapter

        return {"role": role, "path": str(run.adapter_dir), "sha256": sha256 or read_adapter(run.adapter_dir).sha256}

    sft = make_run("sft", stage="sft", rows=SFT, seed=1)
    reward = make_run("reward", stage="reward", rows=[], seed=2, parents=[parent("sft", sft)])
    parents = [parent("reference", sft), parent("helpful", reward), parent("other", sft, "0" * 64)]
    gone = {"role": "lost", "path": "/nowhere/adapter", "sha256": "1" * 64}
    run = make_run("ppo", seed=3, parents=[*parents, gone])
    lineage = registry.promote(str(run.path), "helper").entry.manifest["lineage"]
    reference, helpful, other, lost = lineage["parents"]
    assert (reference["found"], reference["stage"], reference["parents"]) == ("same", "sft", [])
    assert (helpful["stage"], helpful["parents"][0]["sha256"]) == ("reward", reference["sha256"])
    assert (other["found"], lost["found"]) == ("changed", "gone")
    assert reference["base"]["weights_sha256"] == run.manifest()["base"]["weights_sha256"]
    assert lineage["base"] == []
