"""Versions, aliases, history: what promote, rollback and resolve do, and what they refuse."""

from __future__ import annotations

import json
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.errors import ArtifactError, ConfigError, ResourceError
from rlhf_ray.models.adapter_files import read_adapter
from rlhf_ray.registry import Registry, store
from rlhf_ray.registry.alias import lived
from rlhf_ray.storage.lock import held
from rlhf_ray.storage.run_folder import RunFolder

Make = Callable[..., RunFolder]


def listing(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != ".owner")


def test_a_promoted_adapter_is_a_read_only_peft_folder_with_its_story(registry: Registry, make_run: Make) -> None:
    run = make_run("ppo", kl_coef=0.02)
    done = registry.promote(str(run.path), "helper")
    entry, files = done.entry, read_adapter(run.adapter_dir)
    assert (done.is_new, done.changed, done.previous) == (True, True, None)
    assert entry.id == f"helper@v1-{files.sha256[:8]}" and entry.path == registry.path / "adapters" / entry.id
    assert listing(entry.path) == ["adapter_config.json", "adapter_model.safetensors", "manifest.json"]
    assert entry.load().sha256 == entry.sha256 == files.sha256
    for path in (entry.path, *entry.path.iterdir()):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o222
    manifest = entry.manifest
    assert (manifest["kind"], manifest["forced"], manifest["source"]["step"]) == ("policy", None, 10)
    assert manifest["config"]["kl_coef"] == 0.02 and manifest["source"]["run_id"] == run.run_id
    assert manifest["metrics"]["before"]["eval/reward"] == 0.30 and manifest["metrics"]["after"]["eval/reward"] == 0.70
    assert {g["gate"]: g["status"] for g in manifest["gates"]} == dict.fromkeys(
        ("integrity", "kl", "reward", "base"), "passed"
    )
    assert entry.stop_token_ids == (2,) and entry.base["path"] == "/models/tiny"
    assert registry.names() == ["helper"]
    assert [(e["action"], e["version"], e["from"]) for e in registry.history("helper")] == [("promote", 1, None)]


def test_the_run_may_go(registry: Registry, make_run: Make, tmp_path: Path) -> None:
    """All that serving needs is in the registry, a template file of the user's included."""
    text = {"prompt_inputs": "{instruction} with {input}:", "prompt_noinputs": "{instruction}:"}
    (tmp_path / "mine.json").write_text(json.dumps(text))
    run = make_run("ppo", template=str(tmp_path / "mine.json"))
    sha256 = registry.promote(str(run.path), "helper").entry.sha256
    shutil.rmtree(run.path)
    (tmp_path / "mine.json").unlink()
    entry = registry.resolve("helper")
    template = entry.template()
    assert entry.load().sha256 == sha256 and template.content()["prompt_no_input"] == "{instruction}:"
    assert template.name == "mine" and template.sha256 == entry.manifest["template"]["sha256"]


def test_versions_go_up_and_stay(registry: Registry, make_run: Make) -> None:
    entries = [registry.promote(str(make_run(f"run{i}", seed=i).path), "helper").entry for i in range(3)]
    assert [entry.version for entry in entries] == [1, 2, 3]
    assert registry.resolve("helper").id == entries[2].id
    for entry in entries:
        for spec in (f"helper@v{entry.version}", entry.id):
            assert registry.resolve(spec).sha256 == entry.sha256


def test_rollback_goes_back_one_by_one_and_never_to_what_was_taken_back(registry: Registry, make_run: Make) -> None:
    runs = [str(make_run(f"run{i}", seed=i).path) for i in range(4)]
    for run in runs[:3]:
        registry.promote(run, "helper")
    assert registry.rollback("helper", reason="worse in use").version == 2
    assert registry.resolve("helper").version == 2
    assert registry.promote(runs[3], "helper").entry.version == 4
    assert registry.rollback("helper").version == 2
    assert registry.rollback("helper").version == 1
    with pytest.raises(
        ConfigError, match="nothing was live before this version; expected one of v1, v2, v3, v4; got v1"
    ):
        registry.rollback("helper")
    assert registry.rollback("helper", "v3").version == 3
    assert registry.rollback("helper").version == 1
    history = registry.history("helper")
    assert [e["version"] for e in history] == [1, 2, 3, 2, 4, 2, 1, 3, 1]
    assert history[3]["reason"] == "worse in use" and "@" in history[3]["by"] and history[3]["from"] == 3


@pytest.mark.parametrize(
    ("events", "stack"),
    [
        ("p1 p2 p3 r2 r1", [1]),
        ("p1 p2 p1 p3", [1, 2, 1, 3]),
        ("p1 p2 p1 r2", [1, 2]),
        ("p1 p2 r1 r2", [1, 2]),
        ("p1 p2 p3 r1 p2", [1, 2]),
    ],
)
def test_what_lived(events: str, stack: list[int]) -> None:
    words = {"p": "promote", "r": "rollback"}
    assert lived([{"action": words[e[0]], "version": int(e[1])} for e in events.split()]) == stack


def test_the_same_adapter_makes_no_new_version(registry: Registry, make_run: Make) -> None:
    first, second = make_run("first"), make_run("second", seed=1)
    registry.promote(str(first.path), "helper")
    again = registry.promote(str(first.path), "helper")
    assert (again.entry.version, again.is_new, again.changed) == (1, False, False)
    assert len(registry.history("helper")) == 1
    registry.promote(str(second.path), "helper")
    back = registry.promote(str(first.path), "helper")
    assert (back.entry.version, back.is_new, back.changed, back.previous) == (
        1,
        False,
        True,
        registry.resolve("helper@v2").id,
    )
    assert registry.rollback("helper").version == 2
    other = registry.promote(str(first.path), "other")  # another name is another story
    assert other.entry.version == 1 and other.is_new


def test_the_same_weights_with_another_scale_or_template_are_another_version(
    registry: Registry, make_run: Make
) -> None:
    for number, changes in enumerate(({}, {"alpha": 16.0}, {"template": "alpaca"}), start=1):
        done = registry.promote(str(make_run(f"run{number}", **changes).path), "helper")
        assert (done.entry.version, done.is_new) == (number, True)


def test_a_damaged_version_is_made_anew(registry: Registry, make_run: Make) -> None:
    run = str(make_run("run").path)
    path = registry.promote(run, "helper").entry.path
    damage(path / "adapter_model.safetensors")
    assert registry.promote(run, "helper").entry.version == 2
    assert registry.resolve("helper").version == 2
    with pytest.raises(ArtifactError, match="file has changed"):
        registry.rollback("helper")
    assert registry.resolve("helper").version == 2


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def test_another_base_is_refused_unless_forced(registry: Registry, make_run: Make) -> None:
    registry.promote(str(make_run("one").path), "helper")
    other = str(make_run("two", seed=1, base="large").path)
    with pytest.raises(ConfigError) as error:
        registry.promote(other, "helper")
    (problem,) = error.value.problems
    assert str(problem).startswith("gate base: failed; expected that of helper@v1-")
    assert "got /models/large" in str(problem) and "another --alias, or --force --reason" in problem.fix
    with pytest.raises(ConfigError, match="--force: needs a reason"):
        registry.promote(other, "helper", force=True, reason=" ")
    done = registry.promote(other, "helper", force=True, reason="the large model is here")
    assert done.entry.manifest["forced"]["gates"] == ["base"] == registry.history("helper")[-1]["forced"]
    assert done.entry.manifest["forced"]["reason"] == "the large model is here" and done.entry.manifest["forced"]["by"]


def test_a_name_is_of_policies_or_of_reward_models(registry: Registry, make_run: Make) -> None:
    rows = [{"step": 10, "eval/accuracy": 0.8, "eval/accuracy_low": 0.7}]
    reward = str(make_run("reward", stage="reward", seed=3, rows=rows).path)
    assert registry.promote(reward, "judge").entry.load().head is not None
    registry.promote(str(make_run("ppo").path), "helper")
    with pytest.raises(ConfigError, match="helper is the name of a policy adapter; expected policy; got reward"):
        registry.promote(reward, "helper", force=True, reason="why not")


@pytest.mark.parametrize(
    "name", ["", "../x", "a/b", "a@v1", ".hidden", "-x", "a b", "a\n", "ä", "x" * 65, "a\0", "%2e", "BASE"]
)
def test_no_name_becomes_a_path(registry: Registry, make_run: Make, name: str) -> None:
    run = str(make_run("run").path)
    registry.promote(run, "helper")
    before = listing(registry.path)
    for call in (
        lambda: registry.promote(run, name),
        lambda: registry.resolve(name),
        lambda: registry.rollback(name),
        lambda: registry.alias(name),
        lambda: registry.history(name),
    ):
        with pytest.raises(ConfigError):
            call()
    assert listing(registry.path) == before


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("helpr", "no adapter of this name; expected helper; got 'helpr'; fix: did you mean helper?"),
        ("helper@v2", "helper has no version v2; expected one of v1"),
        ("helper@v1-00000000", "names an adapter other than the one that is there; expected helper@v1-"),
        ("helper@1", "is not a name of an adapter; expected NAME, NAME@v3 or NAME@v3-1a2b3c4d; got 'helper@1'"),
        ("helper@v0", "is not a name of an adapter"),
        ("helper@v1-", "is not a name of an adapter"),
    ],
)
def test_what_is_not_there(registry: Registry, make_run: Make, spec: str, message: str) -> None:
    registry.promote(str(make_run("run").path), "helper")
    with pytest.raises(ConfigError, match=re.escape(message)):
        registry.resolve(spec)


def test_rollback_to_what_is_not_there(registry: Registry, make_run: Make) -> None:
    registry.promote(str(make_run("run").path), "helper")
    for to, message in (("v7", "has no version v7"), ("1", "is live already"), ("first", "--to: is not a version")):
        with pytest.raises(ConfigError, match=message):
            registry.rollback("helper", to)


def test_names_that_differ_in_case_only(registry: Registry, make_run: Make) -> None:
    run = str(make_run("run").path)
    registry.promote(run, "helper")
    with pytest.raises(ConfigError, match="Helper differs from helper in upper and lower case only"):
        registry.promote(run, "Helper")


def test_every_change_of_a_promoted_adapter_is_noticed(registry: Registry, make_run: Make) -> None:
    entry = registry.promote(str(make_run("run").path), "helper").entry
    entry.path.chmod(0o755)

    def refused(pattern: str) -> None:
        with pytest.raises(ArtifactError, match=pattern):
            registry.resolve("helper")

    for name in ("adapter_config.json", "adapter_model.safetensors", "manifest.json"):
        path = entry.path / name
        path.chmod(0o644)
        kept = path.read_bytes()
        path.write_bytes(kept[:-2] + b"\n\n" if name.endswith("json") else kept[:-1] + b"\0")
        refused(f"{name}: .*(file has changed|cannot be read)")
        path.write_bytes(kept)
        path.unlink()
        refused(f"{name}: file is missing")
        path.symlink_to("/etc/hostname")
        refused("not a plain file|cannot be read|file has changed")
        path.unlink()
        path.write_bytes(kept)
        assert registry.resolve("helper").id == entry.id
    manifest = entry.path / "manifest.json"
    kept = manifest.read_bytes()
    manifest.write_text(
        json.dumps({**json.loads(kept), "stop_token_ids": [7]})
    )  # still a manifest, of the same id and files
    refused("manifest.json: file has changed; expected sha256")
    manifest.write_bytes(kept)
    (entry.path / "adapter_model.bin").write_bytes(b"")
    refused("adapter_model.bin: does not belong in a promoted adapter")
    (entry.path / "adapter_model.bin").unlink()
    elsewhere = registry.path / "elsewhere"
    entry.path.rename(elsewhere)
    refused("the folder of this version is missing")
    entry.path.symlink_to(elsewhere)
    refused("is not a folder")


@pytest.mark.parametrize(
    "change",
    [
        {"live": 2},
        {"name": "other"},
        {"versions": {}},
        {"schema": 0},
        {"history": []},
        {"versions": {"1": {"id": "../../x", "adapter_sha256": "0" * 64, "manifest_sha256": "0" * 64, "base": {}}}},
    ],
)
def test_a_damaged_alias_file_is_no_new_name(registry: Registry, make_run: Make, change: dict[str, Any]) -> None:
    run = str(make_run("run").path)
    registry.promote(run, "helper")
    path = registry.path / "aliases" / "helper.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    for call in (lambda: registry.resolve("helper"), lambda: registry.promote(run, "helper"), registry.names):
        with pytest.raises(ArtifactError, match=r"helper\.json"):
            call()
    path.unlink()
    with pytest.raises(ArtifactError, match="file is missing, though the name has adapters"):
        registry.promote(run, "helper")


def test_a_newer_registry_is_refused(registry: Registry, make_run: Make) -> None:
    registry.promote(str(make_run("run").path), "helper")
    (registry.path / "registry.json").write_text('{"schema": 99}')
    with pytest.raises(ArtifactError, match="written by a newer version"):
        registry.resolve("helper")


def test_only_a_registry_is_taken_for_one(make_run: Make, tmp_path: Path) -> None:
    run = make_run("run")
    with pytest.raises(
        ConfigError, match=r"no registry at .*nowhere; expected a folder .*; fix: --registry DIR, or set"
    ):
        Registry(tmp_path / "nowhere").names()
    assert not (tmp_path / "nowhere").exists()
    for folder in (run.path, run.path / "config.yaml"):
        with pytest.raises(ConfigError, match="is not a registry"):
            Registry(folder).promote(str(run.path), "helper")
    with pytest.raises(ConfigError, match="expected a local or NFS folder; got s3://bucket/x"):
        Registry("s3://bucket/x")


def test_where_the_registry_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLHF_RAY_REGISTRY", raising=False)
    assert Registry().path == tmp_path / "registry"
    monkeypatch.setenv("RLHF_RAY_REGISTRY", "/shared/adapters")
    assert Registry().path == Path("/shared/adapters")
    assert Registry("here").path == tmp_path / "here"


def test_poll_changes_with_every_change_and_only_then(registry: Registry, make_run: Make) -> None:
    tokens = [registry.poll()]
    runs = [str(make_run(f"run{i}", seed=i).path) for i in range(2)]
    for change in (
        lambda: registry.promote(runs[0], "helper"),
        lambda: registry.promote(runs[1], "helper"),
        lambda: registry.rollback("helper"),
        lambda: registry.promote(runs[1], "other"),
    ):
        change()
        tokens.append(registry.poll())
    assert len(set(tokens)) == 5
    registry.resolve("helper")
    registry.promote(runs[1], "other")  # nothing new
    assert registry.poll() == tokens[-1]


def test_a_writer_that_waits_too_long_names_the_other(
    registry: Registry, make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(make_run("run").path)
    registry.promote(run, "helper")
    monkeypatch.setattr(store, "WAIT_S", 0.2)
    with (
        held(registry.path / ".lock"),
        pytest.raises(ConfigError, match=r"another process is writing to this registry .*pid"),
    ):
        registry.promote(run, "other")
    assert registry.promote(run, "other").is_new


def test_a_full_disk_leaves_what_was_live(registry: Registry, make_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [str(make_run(f"run{i}", seed=i).path) for i in range(2)]
    registry.promote(runs[0], "helper")
    before = listing(registry.path)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "copyfile", full)
        with pytest.raises(ResourceError, match="no room; what was live still is"):
            registry.promote(runs[1], "helper")
    assert listing(registry.path) == before and registry.resolve("helper").version == 1
    assert registry.promote(runs[1], "helper").entry.version == 2
