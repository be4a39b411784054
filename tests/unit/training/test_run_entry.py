"""A run goes on under the settings, and beside the models, that it was started with."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import pytest

from rlhf_ray.config import PipelineConfig, PPOConfig
from rlhf_ray.config.resolved import dump_yaml
from rlhf_ray.console import LocalConsole, NullConsole
from rlhf_ray.data.templates import load_template
from rlhf_ray.errors import ArtifactError, ConfigError, ResourceError
from rlhf_ray.launch.begun import begun
from rlhf_ray.models.backbone import BaseIdentity
from rlhf_ray.ppo.checkpoint import MAY_CHANGE
from rlhf_ray.runtime.session import process_session
from rlhf_ray.stages.pipeline import open_pipeline
from rlhf_ray.storage import object_store
from rlhf_ray.storage.object_store import Store, copied_config, restore
from rlhf_ray.storage.run import Run
from rlhf_ray.storage.run_folder import RunFolder, atomic_write_text, is_run, write_checkpoint
from rlhf_ray.training.run_entry import check_same_models, discarded_on_error, enter_run, finish_run, mended_functions


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


def store_is_away(monkeypatch: pytest.MonkeyPatch, *methods: str) -> None:
    def away(*arguments: Any) -> None:
        raise OSError("curlCode: 7, Couldn't connect to server")

    monkeypatch.setattr(object_store.time, "sleep", lambda seconds: None)
    for method in methods:
        monkeypatch.setattr(Store, method, away)


def test_a_place_holds_the_copies_of_one_run(enter: Entered, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another run deletes none of them, whether it is new there or comes there later, and is told."""
    uri = f"file://{tmp_path}/copies"
    with_checkpoint(first := enter(copy_to=uri))
    copied = sorted(p.relative_to(tmp_path) for p in (tmp_path / "copies").rglob("*"))
    with pytest.raises(ConfigError, match=r"copy_to: file://.* holds copies of another run; got .*step_000001 of run"):
        enter(output_dir=str(tmp_path / "other"), resume="never", copy_to=uri)
    assert not (tmp_path / "other").exists()
    other = enter(output_dir=str(tmp_path / "other"))
    enter(output_dir=str(tmp_path / "other"), copy_to=uri)
    write_checkpoint(other, 2, lambda path: atomic_write_text(path / "state.json", "{}"), keep=3)
    other.seal(("config.yaml",))
    other.copy_finished()
    told = [record.getMessage() for record in caplog.records]
    assert [line.partition(" was not copied")[0] for line in told] == ["step_000002", "the finished run"]
    assert all("holds copies of another run" in line and first.run_id in line for line in told)
    assert sorted(p.relative_to(tmp_path) for p in (tmp_path / "copies").rglob("*")) == copied


def test_a_finished_copy_is_not_taken_for_a_run_that_began_later(enter: Entered, tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/copies"
    with_checkpoint(first := enter(copy_to=uri))
    first.seal(("config.yaml",))
    first.copy_finished()
    shutil.rmtree(first.path)
    with pytest.raises(ConfigError, match=r"got final of run .*; fix: to resume that run: resume=auto; else choose"):
        enter(copy_to=uri, resume="never")
    assert enter(copy_to=uri).manifest()["status"] == "done", "resume: auto asks for that run"


def test_a_finished_run_that_was_not_copied_is_copied_at_the_next_start(
    enter: Entered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"file://{tmp_path}/copies"
    with_checkpoint(folder := enter(copy_to=uri))
    folder.seal(("config.yaml",))
    with monkeypatch.context() as outage:
        store_is_away(outage, "put")
        folder.copy_finished()
    assert Store(uri).text("final/COMMIT") is None
    enter(copy_to=uri)
    assert restore(uri, tmp_path / "back") == "final"


def test_the_copy_of_a_finished_run_has_its_report(enter: Entered, tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/copies"
    folder = enter(copy_to=uri)
    finish_run(folder, Run("ppo", "done", str(folder.path), 1, 1.0, 0, {}, {"report": "report.html"}), ("config.yaml",))
    assert restore(uri, tmp_path / "back") == "final"
    assert (tmp_path / "back" / "report.html").read_bytes() == (folder.path / "report.html").read_bytes()


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_store_that_is_away_at_the_start_is_told_in_one_line(
    enter: Entered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: Any
) -> None:
    store_is_away(monkeypatch, "folders")
    job = PPOConfig(**{**enter.fields, "resume": resume, "copy_to": f"file://{tmp_path}/copies"})
    asked: list[Callable[[], Any]] = [lambda: enter(resume=resume, copy_to=job.copy_to)]
    asked += [lambda: begun(job)] if resume == "auto" else []
    for ask in asked:
        with pytest.raises(
            ResourceError, match=r"copy_to: file://.* cannot be read: curlCode: 7.*; fix: check its"
        ) as e:
            ask()
        assert len(e.value.lines()) == 1 and e.value.exit_code == 3
    assert not (tmp_path / "run").exists()


def test_a_damaged_copied_configuration_is_left_to_the_one_before(enter: Entered, tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/copies"
    with_checkpoint(folder := enter(copy_to=uri))
    write_checkpoint(folder, 2, lambda path: atomic_write_text(path / "state.json", "{}"), keep=3)
    (tmp_path / "copies/checkpoints/step_000002/run/config.yaml").write_text("a: [")
    assert copied_config(uri) == folder.config()
    (tmp_path / "copies/checkpoints/step_000001/run/config.yaml").write_text("plain text")
    assert copied_config(uri) is None


def test_an_error_deletes_what_this_start_has_made(enter: Entered, tmp_path: Path) -> None:
    """Neither what lay hidden in the folder before, nor a run with a checkpoint."""
    (tmp_path / "run" / ".git").mkdir(parents=True)
    (tmp_path / "run" / ".git" / "HEAD").write_text("ref: refs/heads/main")

    def fails(**changes: Any) -> None:
        folder = enter(**changes)
        with pytest.raises(ValueError, match="x"), discarded_on_error(folder):
            (folder.path / "tensorboard").mkdir(exist_ok=True)
            raise ValueError("x")

    fails()
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".git"]
    shutil.rmtree(tmp_path / "run")
    fails()
    assert not (tmp_path / "run").exists()
    enter()
    fails()
    assert is_run(tmp_path / "run"), "an earlier start made it"


def test_a_run_that_another_start_made_meanwhile_is_kept(enter: Entered, monkeypatch: pytest.MonkeyPatch) -> None:
    """It took the lock first, saved a step and died; this start then fails while it builds."""
    first = RunFolder(Path(enter.fields["output_dir"]))

    @contextmanager
    def after_another(folder: RunFolder, *arguments: Any) -> Iterator[None]:
        with_checkpoint(folder)
        yield

    monkeypatch.setattr(RunFolder, "lock", after_another)
    folder = enter()
    assert folder.found is not None, "this start found nothing there"
    with pytest.raises(KeyboardInterrupt), discarded_on_error(folder):
        raise KeyboardInterrupt
    assert [checkpoint.step for checkpoint in first.checkpoints()] == [1]


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
