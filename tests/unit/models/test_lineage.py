"""Base, tokenizer and template travel with every artefact and are compared (F18, F34, F35, F38; faults 48, 51)."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_ray.errors import ArtifactError
from rlhf_ray.models.adapters import read_adapter
from rlhf_ray.models.backbone import Backbone, BaseIdentity
from rlhf_ray.models.lineage import check_lineage, describe, parent_of, recorded_add_eos_token
from rlhf_ray.models.merge import merge_run
from rlhf_ray.models.specs import policy_source
from rlhf_ray.storage.run_folder import RunFolder, create_run

Load = Callable[..., Backbone]
Make = Callable[..., Path]
ALPACA = SimpleNamespace(name="alpaca", sha256="a" * 64)
CHAT = SimpleNamespace(name="chat", sha256="c" * 64)


@pytest.fixture
def identity(load: Load, tiny_llama: Make) -> BaseIdentity:
    return load(tiny_llama()).identity


@pytest.fixture
def run(identity: BaseIdentity, tiny_llama: Make, save_trained: Callable[..., str], tmp_path: Path) -> RunFolder:
    run = create_run(tmp_path / "sft", "sft", {"seed": 0}, "never")
    save_trained(tiny_llama(), run.adapter_dir)
    run.update_manifest(
        base=identity.manifest(), tokenizer_sha256=identity.tokenizer_sha256, template=dict(vars(ALPACA))
    )
    run.seal()
    return run


def test_a_run_on_its_own_base_has_nothing_to_say(run: RunFolder, identity: BaseIdentity) -> None:
    source = policy_source(str(run.path))
    assert check_lineage(source, identity, ALPACA) == [] and check_lineage(source, identity, None) == []
    parent = parent_of(source, "sft")
    sha = read_adapter(run.adapter_dir).sha256
    assert parent.manifest() == {"role": "sft", "path": str(run.adapter_dir), "sha256": sha}
    lines = describe(identity, [parent], ALPACA)
    assert any(identity.weights_sha256[:12] in line for line in lines) and any(sha[:12] in line for line in lines)


def test_a_moved_base_is_the_same_base(run: RunFolder, load: Load, tiny_llama: Make, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(tiny_llama(), tmp_path / "moved"))
    assert check_lineage(policy_source(str(run.path)), load(moved).identity, ALPACA) == []


def test_another_base_of_the_same_shapes(run: RunFolder, identity: BaseIdentity, load: Load, tiny_llama: Make) -> None:
    """Fault 48, F35: PEFT loads it without a word. The error holds both hashes and both places."""
    other = load(tiny_llama(seed=1)).identity
    with pytest.raises(ArtifactError, match=r"another base \(weights differ\)") as e:
        check_lineage(policy_source(str(run.path)), other, ALPACA)
    for part in (identity.weights_sha256, other.weights_sha256, identity.path, other.path):
        assert part in str(e.value)
    assert e.value.exit_code == 5 and len(e.value.problems) == 1


def test_every_difference_is_told_with_both_hashes(run: RunFolder, identity: BaseIdentity) -> None:
    """F34 (template) and fault 51 (tokenizer), together with the configuration."""
    other = dataclasses.replace(identity, config_sha256="1" * 64, tokenizer_sha256="2" * 64)
    with pytest.raises(ArtifactError) as e:
        check_lineage(policy_source(str(run.path)), other, CHAT)
    assert len(e.value.problems) == 3
    for part in (identity.config_sha256, "1" * 64, identity.tokenizer_sha256, "2" * 64, ALPACA.sha256, CHAT.sha256):
        assert part in str(e.value)
    assert "set template=alpaca" in str(e.value)


def test_another_precision_is_a_warning(run: RunFolder, identity: BaseIdentity) -> None:
    """F35: the reward model trained on bf16 and scored on int8; recorded, not forbidden."""
    (line,) = check_lineage(policy_source(str(run.path)), dataclasses.replace(identity, precision="8bit"), ALPACA)
    assert "float32" in line and "8bit" in line


def test_a_plain_adapter_is_checked_as_far_as_it_tells(run: RunFolder, identity: BaseIdentity, tmp_path: Path) -> None:
    """F18: no manifest of ours. The base it names is compared by name; one that names none says so."""
    plain = Path(shutil.copytree(run.adapter_dir, tmp_path / "plain"))
    source = policy_source(str(plain))
    assert check_lineage(source, identity, ALPACA) == []
    config = plain / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "base_model_name_or_path": "org/other"}))
    (line,) = check_lineage(source, identity, ALPACA)
    assert "org/other" in line and identity.path in line
    config.write_text(json.dumps({**values, "base_model_name_or_path": None}))
    (line,) = check_lineage(source, identity, ALPACA)
    assert "does not say which base" in line


def test_how_a_reward_model_ends_replies_is_read_wherever_it_is(run: RunFolder, tmp_path: Path) -> None:
    """From its run, from a copy that was promoted; its stage's default where nothing says."""
    promoted = shutil.copytree(run.adapter_dir, tmp_path / "promoted")
    assert recorded_add_eos_token(policy_source(str(run.path))) and recorded_add_eos_token(policy_source(str(promoted)))
    reward = {"add_eos_token": False}
    run.update_manifest(reward=reward)
    run.seal()
    parts = {part: {} for part in ("adapter", "source", "base", "template")}
    (promoted / "manifest.json").write_text(json.dumps({"kind": "reward", **parts, "reward": reward}))
    assert not recorded_add_eos_token(policy_source(str(run.path)))
    assert not recorded_add_eos_token(policy_source(str(promoted)))


def test_a_merged_checkpoint_keeps_template_and_tokenizer(
    run: RunFolder, identity: BaseIdentity, load: Load, tiny_llama: Make
) -> None:
    """It is its own base, so its weights may differ; what it reads may not."""
    source = policy_source(str(merge_run(run.path)))
    assert check_lineage(source, identity, ALPACA) == []
    with pytest.raises(ArtifactError, match="another prompt template"):
        check_lineage(source, identity, CHAT)
    other = load(tiny_llama(bos=False)).identity
    with pytest.raises(ArtifactError, match="another tokenizer"):
        check_lineage(source, other, ALPACA)
    assert check_lineage(source, other, ALPACA, same_tokenizer=False) == []
