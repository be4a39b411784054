"""A run goes on under the settings, and beside the models, that it was started with."""

from __future__ import annotations

import io
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import pytest

from rlhf_ray.config import PipelineConfig, PPOConfig
from rlhf_ray.config.resolved import dump_yaml
from rlhf_ray.console import LocalConsole, NullConsole
from rlhf_ray.data.templates import load_template
from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.models.backbone import BaseIdentity
from rlhf_ray.ppo.checkpoint import MAY_CHANGE
from rlhf_ray.runtime.session import process_session
from rlhf_ray.stages.pipeline import open_pipeline
from rlhf_ray.storage.object_store import Store, restore
from rlhf_ray.storage.run_folder import RunFolder, atomic_write_text, write_checkpoint
from rlhf_ray.training.run_entry import check_same_models, enter_run, mended_functions


@dataclass
class Entered:
    """Comes into the run again with some fields changed."""

    fields: dict[str, Any]

    def __call__(self, said: TextIO | None = None, **changes: Any) -> RunFolder:
        config = PPOConfig(**{**self.fields, "resume": "auto", **changes})
        with ExitStack() as held:
            return enter_run(
                config,
                process_session(LocalConsole(file=said) if said else NullConsole(), num_threads=1),
                held,
                "ppo",
                MAY_CHANGE,
            )


@pytest.fixture
def enter(tmp_path: Path) -> Entered:
    fields = {
        "output_dir": str(tmp_path / "run"),
        "model_name_or_path": "base",
        "data": {"train": "prompts.jsonl"},
        "rewards": [{"function": "rule.py:score"}],
        "learner": {"num_workers": 0},
    }
    return Entered(fields)


def with_checkpoint(folder: RunFolder) -> None:
    write_checkpoint(folder, 1, lambda path: atomic_write_text(path / "state.json", "{}"), keep=3)


WHAT: dict[str, tuple[dict[str, Any], str]] = {
    "rate": ({"learning_rate": 1.0}, "learning_rate: {run} holds a run with another value; expected 2e-05; got 1.0"),
    "penalty": ({"kl_penalty": "jensen_shannon"}, "kl_penalty: {run} holds a run with another value; "),
    "section": ({"lora": {"r": 4}}, "lora.r: {run} holds a run with another value; expected 16; got 4"),
    "seed": ({"seed": 1}, "seed: {run} holds a run with another value; expected 0; got 1"),
    "data": ({"data": {"train": "other.jsonl"}}, "data.train: {run} holds a run with another value; "),
}


@pytest.mark.parametrize(("changes", "message"), WHAT.values(), ids=WHAT)
def test_a_changed_setting_is_shown_and_refused(enter: Entered, changes: dict[str, Any], message: str) -> None:
    """Fault 56: old and new value of each field; nothing of the run is touched."""
    with_checkpoint(folder := enter())
    before = (folder.path / "config.yaml").read_bytes(), (folder.path / "manifest.json").read_bytes()
    with pytest.raises(ConfigError) as caught:
        enter(**changes)
    (line,) = caught.value.lines()
    assert line.startswith(f"error: {message.format(run=folder.path)}")
    assert line.endswith("fix: put it back, or choose another output_dir")
    assert before == ((folder.path / "config.yaml").read_bytes(), (folder.path / "manifest.json").read_bytes())


def test_all_changed_settings_come_at_once(enter: Entered) -> None:
    with_checkpoint(enter())
    with pytest.raises(ConfigError) as caught:
        enter(learning_rate=1.0, seed=1)
    assert [line.split(": ")[1] for line in caught.value.lines()] == ["learning_rate", "seed"]


class TestOfAnOlderVersion:
    """Fault 29: a configuration that lacks fields which came later, or has one that was taken away."""

    @staticmethod
    def rewrite(folder: RunFolder, without: tuple[str, ...] = (), **more: Any) -> None:
        values = {k: v for k, v in folder.config().items() if k not in without} | more
        atomic_write_text(folder.path / "config.yaml", dump_yaml(values))

    def test_a_field_that_came_later_had_its_default(self, enter: Entered) -> None:
        with_checkpoint(folder := enter())
        sections = {"lora": {"r": 16}, "learner": {"num_workers": 0}, "value": {}}
        self.rewrite(folder, ("importance_sampling_cap", "max_staleness", "min_response_length"), **sections)
        enter()
        with pytest.raises(ConfigError) as caught:
            enter(importance_sampling_cap=3.0)
        (line,) = caught.value.lines()
        assert line.startswith("error: importance_sampling_cap: ") and "expected 2.0; got 3.0" in line
        self.rewrite(folder, ("importance_sampling_cap",), learning_rate=1.0)
        with pytest.raises(ConfigError, match="learning_rate: "):
            enter()

    @pytest.mark.parametrize("value", [None, False, [], 0.0])
    def test_a_field_that_is_gone_and_was_off_is_passed_over(self, enter: Entered, value: Any) -> None:
        with_checkpoint(folder := enter())
        self.rewrite(folder, bygone=value, lora={**folder.config()["lora"], "old": value})
        enter()

    def test_a_field_that_is_gone_and_was_on_is_refused_by_name(self, enter: Entered) -> None:
        with_checkpoint(folder := enter())
        self.rewrite(folder, bygone=0.5, rewards=[{**folder.config()["rewards"][0], "old": "x"}])
        with pytest.raises(ConfigError) as caught:
            enter()
        what = "the run was started with a field that this version no longer has"
        places = (("bygone", "0.5"), ("rewards[0].old", '"x"'))
        starts = {
            f"error: {folder.path}/config.yaml: {name}: {what}; got {got}; fix: resume with" for name, got in places
        }
        assert {line[: line.index(" the version")] for line in caught.value.lines()} == starts


def test_where_and_how_often_may_change(enter: Entered) -> None:
    with_checkpoint(enter())
    enter(save_steps=7, save_total_limit=None, per_device_train_batch_size=2, max_kl=9.0, stop_grace_s=5.0)


def test_what_may_change_is_told_and_kept(enter: Entered) -> None:
    """Fault 56: the start after the next one finds the run as it went on, not as it began."""
    with_checkpoint(folder := enter(max_kl=10.0))
    said = io.StringIO()
    enter(said, max_kl=20.0, save_steps=[2, 3], learner={"num_workers": 0, "zero_stage": 2}, resume="auto")
    assert said.getvalue().splitlines() == [
        "ppo: continuing with learner.zero_stage 2 (was 0)",
        "ppo: continuing with max_kl 20.0 (was 10.0)",
        "ppo: continuing with save_steps [2, 3] (was null)",
    ]
    kept = folder.config()
    assert (kept["max_kl"], kept["save_steps"], kept["learner"]["zero_stage"]) == (20.0, [2, 3], 2)
    with pytest.raises(ConfigError):
        enter(learning_rate=1.0, max_kl=30.0)
    assert folder.config() == kept
    said = io.StringIO()
    enter(said, max_kl=20.0, save_steps=[2, 3], learner={"num_workers": 0, "zero_stage": 2})
    assert said.getvalue() == ""

    folder.update_manifest(status="done")
    enter(said, max_kl=5.0)
    assert folder.config() == kept and said.getvalue() == ""


def test_the_name_and_how_it_was_started_stay(enter: Entered, tmp_path: Path) -> None:
    with_checkpoint(folder := enter(resume="never"))
    (tmp_path / "moved").symlink_to(folder.path)
    enter(output_dir=str(tmp_path / "moved"), max_kl=3.0)
    kept = folder.config()
    assert (kept["output_dir"], kept["resume"], kept["max_kl"]) == (str(folder.path), "never", 3.0)


def test_a_pipeline_keeps_what_may_change_and_refuses_the_rest_first(enter: Entered, tmp_path: Path) -> None:
    """What its stages would refuse when their turn comes is refused before anything is written."""
    fields = {**enter.fields, "output_dir": str(tmp_path / "all"), "resume": "auto", "stages": ["ppo"]}
    own = {name: fields.pop(name) for name in ("data", "rewards")}

    def begin(**changes: Any) -> RunFolder:
        config = PipelineConfig(**fields, ppo={**own, **changes})
        with ExitStack() as held:
            return open_pipeline(config, process_session(NullConsole(), num_threads=1), "pipeline", held)

    folder = begin(max_kl=10.0)
    enter.fields |= {"output_dir": str(tmp_path / "all" / "ppo")}
    with_checkpoint(enter(max_kl=10.0))
    assert begin(max_kl=20.0).config()["ppo"]["max_kl"] == 20.0
    with pytest.raises(ConfigError, match="learning_rate: ") as caught:
        begin(max_kl=30.0, learning_rate=1.0)
    assert len(caught.value.lines()) == 1 and folder.config()["ppo"]["max_kl"] == 20.0


def test_copies_may_go_elsewhere(enter: Entered, tmp_path: Path) -> None:
    """The next checkpoint goes to the new place; what the old one holds stays. A finished run is copied there once, its sealed
    configuration untouched."""
    first, second, third = (f"file://{tmp_path}/{name}" for name in ("first", "second", "third"))
    with_checkpoint(enter(copy_to=first))
    folder = enter(copy_to=second)
    write_checkpoint(folder, 2, lambda path: atomic_write_text(path / "state.json", "{}"), keep=3)
    assert [Store(uri).folders("checkpoints") for uri in (first, second)] == [["step_000001"], ["step_000002"]]
    assert enter(copy_to=None).copy_to is None and enter(copy_to=second).copy_to == second

    folder.seal(("config.yaml",))
    enter(copy_to=third)
    folder.verify()
    commit = tmp_path / "third" / "final" / "COMMIT"
    assert commit.is_file() and restore(third, tmp_path / "back") == "final"
    made = commit.stat().st_mtime_ns
    enter(copy_to=third)
    assert commit.stat().st_mtime_ns == made


def test_without_a_checkpoint_the_new_settings_are_taken(enter: Entered) -> None:
    enter()
    assert enter(seed=1, learning_rate=1.0).config()["learning_rate"] == 1.0


def test_other_models_are_refused_once_there_is_a_checkpoint(enter: Entered) -> None:
    """Both hashes are told; a parent of a role that was not there is none of its business."""
    folder, template = enter(), load_template("none")
    identity = BaseIdentity("base", None, "c" * 64, "w" * 64, "t" * 64)
    parents = [{"role": "sft", "path": "runs/sft", "sha256": "s" * 64}]
    other = replace(identity, weights_sha256="x" * 64, tokenizer_sha256="y" * 64)
    check_same_models(folder, other, template, parents)
    folder.update_manifest(
        base=identity.manifest(), tokenizer_sha256="t" * 64, template=template.manifest(), parents=parents
    )
    with_checkpoint(folder)
    check_same_models(folder, identity, template, [*parents, {"role": "judge", "path": "j", "sha256": "j" * 64}])
    with pytest.raises(ArtifactError) as caught:
        check_same_models(folder, other, load_template("alpaca"), [{**parents[0], "sha256": "z" * 64}])
    told = [line.partition(" is not the one that this run was started with; ") for line in caught.value.lines()]
    assert [who for who, _, _ in told] == [
        "error: base: the base",
        "error: base: the tokenizer",
        "error: alpaca: the template",
        "error: runs/sft: the sft adapter",
    ]
    assert told[0][2] == f"expected sha256 {'w' * 64}; got sha256 {'x' * 64}"


def test_a_reward_function_that_was_mended_is_told(enter: Entered) -> None:
    folder = enter()
    parents = [{"role": "short", "path": "mine.py:short", "sha256": "a" * 64}]
    assert mended_functions(folder, parents) == []
    folder.update_manifest(parents=parents)
    assert mended_functions(folder, parents) == []
    (told,) = mended_functions(folder, [{**parents[0], "sha256": "b" * 64}])
    assert told.startswith("short: mine.py:short has changed") and "sha256 aaaaaaaaaaaa, now bbbbbbbbbbbb" in told
