"""Run folders, their checkpoints, and what is refused (F7, F31; faults 17-19, 28, 29, 55-59)."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.errors import ArtifactError, ConfigError, Interrupted, InvariantError
from rlhf_ray.storage import checkpoints, files
from rlhf_ray.storage.files import sha256_file
from rlhf_ray.storage.run_folder import (
    RunFolder,
    atomic_save_tensors,
    config_changes,
    create_run,
    drop_from_checkpoint,
    git_commit,
    is_run,
    open_run,
    verify_files,
    versions,
    write_checkpoint,
)

CONFIG = {"seed": 3, "lora": {"r": 8}, "stop": (1, 2)}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return create_run(tmp_path / "run", "ppo", CONFIG, "never")


def writer(value: float) -> Any:
    def write(folder: Path) -> None:
        (folder / "adapter").mkdir()
        atomic_save_tensors(folder / "adapter" / "w.safetensors", {"w": torch.full((4,), value)})
        (folder / "state.json").write_text(json.dumps({"value": value}))

    return write


def small(folder: Path) -> None:
    (folder / "state.json").write_text("{}")


def save_steps(run: RunFolder, *steps: int, keep: int = 10, protect: frozenset[int] = frozenset()) -> None:
    for step in steps:
        write_checkpoint(run, step, writer(float(step)), keep, protect)


def steps(run: RunFolder) -> list[int]:
    return [c.step for c in run.checkpoints()]


def _save_and_die(run: RunFolder, cut: int) -> None:
    count = 0

    def dying(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return os._exit(42) if count == cut else function(*args, **kwargs)

        return call

    try:
        for name in ("fsync", "rename", "replace", "mkdir"):
            setattr(os, name, dying(getattr(os, name)))
        write_checkpoint(run, 2, small, 10)
        os._exit(0)
    except BaseException:
        os._exit(1)


class TestRunFolder:
    def test_it_says_what_it_is(self, run: RunFolder) -> None:
        manifest = run.manifest()
        assert (manifest["stage"], manifest["status"], manifest["seed"], manifest["schema"]) == ("ppo", "running", 3, 1)
        assert manifest["versions"]["torch"] == torch.__version__
        assert run.config() == {"seed": 3, "lora": {"r": 8}, "stop": [1, 2]}
        assert is_run(run.path) and open_run(run.path).run_id == run.run_id

    def test_a_run_is_never_overwritten_and_the_error_names_the_resume_command(self, run: RunFolder) -> None:
        with pytest.raises(ConfigError, match=re.escape(f"rlhf-ray resume {run.path}")) as e:
            create_run(run.path, "ppo", CONFIG, "never")
        assert e.value.exit_code == 2

    def test_auto_opens_the_run_that_is_there_unless_it_is_of_another_stage(self, run: RunFolder) -> None:
        assert create_run(run.path, "ppo", CONFIG, "auto").run_id == run.run_id
        with pytest.raises(ConfigError, match="another stage"):
            create_run(run.path, "sft", CONFIG, "auto")

    @pytest.mark.parametrize("resume", ["never", "auto"])
    def test_foreign_folders_and_files_are_refused(self, tmp_path: Path, resume: str) -> None:
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "cat.jpg").write_text("cat")
        with pytest.raises(ConfigError, match=r"cat\.jpg"):
            create_run(tmp_path / "photos", "sft", CONFIG, resume)
        with pytest.raises(ConfigError, match="is a file"):
            create_run(tmp_path / "photos" / "cat.jpg", "sft", CONFIG, resume)
        with pytest.raises(ConfigError, match="cannot write"):
            create_run(tmp_path / "photos" / "cat.jpg" / "run", "sft", CONFIG, resume)
        assert (tmp_path / "photos" / "cat.jpg").read_text() == "cat"

    def test_scratch_folders_of_the_job_itself_are_not_foreign(self, tmp_path: Path) -> None:
        (tmp_path / "run" / ".train-x").mkdir(parents=True)
        assert create_run(tmp_path / "run", "sft", CONFIG, "never").stage == "sft"

    def test_an_unwritable_place_is_refused_at_the_start(self) -> None:
        with pytest.raises(ConfigError, match="cannot write to /proc/rlhf"):
            create_run("/proc/rlhf/run", "sft", CONFIG, "never")

    def test_a_changed_result_is_found_on_opening(self, run: RunFolder) -> None:
        run.adapter_dir.mkdir()
        (run.adapter_dir / "adapter_config.json").write_text("{}")
        run.seal()
        assert open_run(run.path).manifest()["status"] == "done"
        recorded = run.manifest()["files"]["adapter/adapter_config.json"]["sha256"]
        (run.adapter_dir / "adapter_config.json").write_text("[]")
        with pytest.raises(ArtifactError) as e:
            open_run(run.path)
        assert recorded in str(e.value) and "adapter_config.json" in str(e.value) and e.value.exit_code == 5

    def test_what_is_no_run(self, tmp_path: Path, run: RunFolder) -> None:
        with pytest.raises(ConfigError, match="no such folder"):
            open_run(tmp_path / "nowhere")
        with pytest.raises(ArtifactError, match="is not a run"):
            open_run(tmp_path)
        run.update_manifest(schema=2)
        with pytest.raises(ArtifactError, match="newer version"):
            open_run(run.path)
        run.update_manifest(schema=True)
        with pytest.raises(ArtifactError, match="schema"):
            open_run(run.path)

    def test_config_changes_are_named_by_their_field(self) -> None:
        new = {"seed": 3, "lora": {"r": 16}, "stop": [1, 2], "extra": 1}
        assert config_changes(CONFIG, new) == {"lora.r": (8, 16), "extra": (None, 1)}

    def test_a_manifest_cannot_point_outside(self, tmp_path: Path) -> None:
        entry = {"sha256": "0" * 64, "bytes": 1}
        for name in ("../secret", "/etc/hostname"):
            with pytest.raises(ArtifactError, match="outside its folder"):
                verify_files(tmp_path, {"files": {name: entry}})
        (tmp_path / "link").symlink_to("/etc/hostname")
        with pytest.raises(ArtifactError, match="plain file"):
            verify_files(tmp_path, {"files": {"link": entry}})

    def test_provenance_helpers(self) -> None:
        assert {"python", "torch", "peft", "transformers"} <= versions().keys()
        commit = git_commit()
        assert commit is None or re.fullmatch(r"[0-9a-f]{40}", commit)

    def test_a_second_writer_is_told_who_holds_the_run_and_a_dead_one_holds_nothing(self, run: RunFolder) -> None:
        """Fault 28. The other process is killed without a chance to clean up."""
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            with run.lock():
                os.write(write_end, b"held")
                time.sleep(600)
            os._exit(1)
        try:
            assert os.read(read_end, 4) == b"held"
            with pytest.raises(ConfigError, match=f"pid {pid}"), run.lock():
                pass
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        with run.lock():
            pass


class TestCheckpoints:
    def test_the_newest_is_found_and_holds_what_was_written(self, run: RunFolder) -> None:
        save_steps(run, 5, 40)
        newest, warnings = run.newest_checkpoint()
        assert newest is not None and (newest.step, warnings) == (40, [])
        assert json.loads((newest.path / "state.json").read_text()) == {"value": 40.0}
        assert newest.path.name == "step_000040" and newest.path.stat().st_mode & 0o777 == 0o700
        assert (run.path / "checkpoints" / "LATEST").read_text() == "step_000040\n"
        assert run.checkpoint(5).adapter_dir.is_dir()
        with pytest.raises(ArtifactError, match="one of 5, 40"):
            run.checkpoint(6)

    def test_no_checkpoint_yet_is_no_error(self, run: RunFolder) -> None:
        assert run.newest_checkpoint() == (None, [])

    @pytest.mark.parametrize("damage", ["flip", "cut", "delete", "unreadable", "manifest", "no manifest"])
    def test_a_damaged_newest_is_passed_over_with_a_warning(
        self, run: RunFolder, damage: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault 19: each file in turn, each way of losing it."""
        save_steps(run, 1, 2)
        newest = run.checkpoints()[-1].path
        weights = newest / "adapter" / "w.safetensors"
        data = bytearray(weights.read_bytes())
        if damage == "flip":
            data[-1] ^= 1
            weights.write_bytes(data)
        elif damage == "cut":
            weights.write_bytes(data[:-1])
        elif damage == "delete":
            weights.unlink()
        elif damage == "unreadable":

            def unreadable(path: Path) -> str:
                if path == weights:
                    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
                return sha256_file(path)

            monkeypatch.setattr(checkpoints, "sha256_file", unreadable)
        elif damage == "manifest":
            (newest / "manifest.json").write_text("{")
        else:
            (newest / "manifest.json").unlink()
        found, warnings = run.newest_checkpoint()
        assert found is not None and found.step == 1 and len(warnings) == 1 and "step_000002" in warnings[0]

    def test_the_warning_names_file_and_both_hashes(self, run: RunFolder) -> None:
        save_steps(run, 1, 2)
        state = run.checkpoints()[-1].path / "state.json"
        recorded = run.checkpoints()[-1].manifest()["files"]["state.json"]["sha256"]
        state.write_text(json.dumps({"value": 3.0}))
        (line,) = run.newest_checkpoint()[1]
        assert str(state) in line and recorded in line and checkpoints.sha256_file(state) in line

    def test_a_newest_checkpoint_that_is_gone_is_named(self, run: RunFolder) -> None:
        """Fault 19. A hint that is older than what is there, or no hint at all, says nothing."""
        save_steps(run, 1, 2, 3)
        hint = run.path / "checkpoints" / "LATEST"
        for text in ("step_000001\n", "", "../step_000009", "\udcff"):
            hint.write_text(text, errors="surrogateescape")
            assert run.newest_checkpoint()[1] == []
        hint.write_text("step_000003\n")
        shutil.rmtree(run.path / "checkpoints" / "step_000003")
        (run.path / "checkpoints" / "step_000002" / "state.json").unlink()
        found, warnings = run.newest_checkpoint()
        assert found is not None and found.step == 1 and len(warnings) == 2
        assert warnings[0] == "checkpoint step_000003 is missing; it was the newest one"
        assert warnings[1].startswith("checkpoint step_000002 is not usable: ")

    def test_never_a_silent_fresh_start(self, run: RunFolder) -> None:
        """Faults 19, 57; F31: checkpoints that are all damaged, or all gone, end the job with exit code 5."""
        save_steps(run, 1, 2)
        for checkpoint in run.checkpoints():
            (checkpoint.path / "state.json").unlink()
        with pytest.raises(ArtifactError, match="no valid checkpoint"):
            run.newest_checkpoint()
        for checkpoint in run.checkpoints():
            shutil.rmtree(checkpoint.path)
        with pytest.raises(ArtifactError, match="is missing, and there is no other"):
            run.newest_checkpoint()

    def test_a_checkpoint_of_another_run_or_step_is_refused(self, run: RunFolder, tmp_path: Path) -> None:
        save_steps(run, 1)
        other = create_run(tmp_path / "other", "ppo", CONFIG, "never")
        save_steps(other, 2)
        shutil.copytree(other.path / "checkpoints" / "step_000002", run.path / "checkpoints" / "step_000002")
        found, warnings = run.newest_checkpoint()
        assert found is not None and found.step == 1 and "another run" in warnings[0]
        shutil.rmtree(run.path / "checkpoints" / "step_000002")
        os.rename(run.path / "checkpoints" / "step_000001", run.path / "checkpoints" / "step_000009")
        with pytest.raises(ArtifactError, match="wrong step"):
            run.newest_checkpoint()

    def test_pruning_keeps_the_newest_and_the_protected(self, run: RunFolder) -> None:
        save_steps(run, 1, 2, 3, 4, 5, keep=2, protect=frozenset({1}))
        assert steps(run) == [1, 4, 5]

    def test_pruning_counts_valid_checkpoints_only(self, run: RunFolder) -> None:
        save_steps(run, 1, 2)
        (run.checkpoints()[-1].path / "state.json").unlink()
        save_steps(run, 3, keep=2)
        assert steps(run) == [1, 2, 3]
        save_steps(run, 4, keep=2)
        assert steps(run) == [3, 4]

    def test_a_save_reads_its_own_files_alone(self, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        """Once each; what this run kept is not hashed again at every save, unless it has changed."""
        hashed: list[Path] = []
        for module in (checkpoints, files):
            monkeypatch.setattr(module, "sha256_file", lambda path: hashed.append(path) or sha256_file(path))
        save_steps(run, 1, 2, 3, 4, keep=2)
        assert len(hashed) == 4 * 2 and steps(run) == [3, 4]
        (run.path / "checkpoints/step_000004/state.json").write_text("{}")
        hashed.clear()
        save_steps(run, 5, keep=2)
        assert steps(run) == [3, 4, 5], "the changed one is looked at, and does not count"
        assert len(hashed) == 2 + 1

    def test_nothing_that_is_not_finite_is_saved(self, run: RunFolder) -> None:
        save_steps(run, 1)
        with pytest.raises(InvariantError, match="tensor w is not finite"):
            write_checkpoint(run, 2, writer(float("inf")), 3)
        assert steps(run) == [1] and not list((run.path / "checkpoints").glob("*.tmp-*"))

    def test_a_damaged_checkpoint_is_replaced_when_the_run_reaches_its_step_again(self, run: RunFolder) -> None:
        save_steps(run, 1, 2)
        (run.checkpoints()[-1].path / "state.json").unlink()
        save_steps(run, 2)
        newest, warnings = run.newest_checkpoint()
        assert newest is not None and newest.step == 2 and not warnings

    def test_every_cut_point_of_a_save_leaves_a_valid_checkpoint(self, tmp_path: Path) -> None:
        """Fault 18. The process dies just before its n-th flush, rename or new folder, for every n, until a save runs through."""
        seen, n, status = set(), 0, 42
        while status == 42:
            n += 1
            run = create_run(tmp_path / str(n), "ppo", CONFIG, "never")
            write_checkpoint(run, 1, small, 10)
            pid = os.fork()
            if pid == 0:  # a child that dies as by kill -9, and never returns to pytest
                _save_and_die(run, n)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            newest, _ = run.newest_checkpoint()
            assert newest is not None and newest.step in (1, 2), f"cut point {n}"
            seen.add(newest.step)
            write_checkpoint(run, 2, small, 10)  # the next save cleans up
            assert steps(run) == [1, 2]
            assert not [p.name for p in (run.path / "checkpoints").iterdir() if "-" in p.name], f"cut point {n}"
        assert status == 0 and n > 10 and seen == {1, 2}

    def test_a_full_disk_ends_the_run_resumably(self, run: RunFolder) -> None:
        """Fault 17: exit 75, the previous checkpoint intact, nothing half written, the resume command in the line."""
        save_steps(run, 1)

        def large(folder: Path) -> None:
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
            try:
                (folder / "big.bin").write_bytes(b"x" * (1 << 20))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        with pytest.raises(Interrupted, match=re.escape(f"rlhf-ray resume {run.path}")) as e:
            write_checkpoint(run, 2, large, 3)
        assert e.value.exit_code == 75 and e.value.__cause__.errno == errno.EFBIG  # type: ignore[union-attr]
        assert steps(run) == [1] and not list((run.path / "checkpoints").glob("*tmp*"))
        assert run.newest_checkpoint()[1] == []

    def test_a_part_can_be_dropped_and_the_rest_still_verifies(self, run: RunFolder) -> None:
        save_steps(run, 1)
        checkpoint = run.checkpoints()[0]
        drop_from_checkpoint(checkpoint, "adapter")
        assert not checkpoint.adapter_dir.exists()
        run.checkpoint(1)
